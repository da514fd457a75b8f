/* Reading and writing rows of f32, f16 or bf16 as vectors of sixteen floats, tails included. */
#ifndef BRIM_ROWS_H
#define BRIM_ROWS_H

#include "pool.h"
#include "vec.h"

INLINE int64_t dtype_size(int dtype) { return dtype == BRIM_F32 ? 4 : 2; }
INLINE char *at(void *base, int dtype, int64_t index) { return (char *)base + index * dtype_size(dtype); }

INLINE v16f load16(int dtype, const void *base, int64_t i) {
    if (dtype == BRIM_F32) return loadf((const float *)base + i);
    if (dtype == BRIM_BF16) return load_bf16((const uint16_t *)base + i);
    return load_f16((const uint16_t *)base + i);
}
INLINE void store16(int dtype, void *base, int64_t i, v16f v) {
    if (dtype == BRIM_F32)
        storef((float *)base + i, v);
    else if (dtype == BRIM_BF16)
        store_bf16((uint16_t *)base + i, v);
    else
        store_f16((uint16_t *)base + i, v);
}
INLINE float load1(int dtype, const void *base, int64_t i) {
    if (dtype == BRIM_F32) return ((const float *)base)[i];
    uint16_t h = ((const uint16_t *)base)[i];
    return dtype == BRIM_BF16 ? bf16_to_float(h) : f16_to_float(h);
}
INLINE void store1(int dtype, void *base, int64_t i, float x) {
    if (dtype == BRIM_F32)
        ((float *)base)[i] = x;
    else
        ((uint16_t *)base)[i] = dtype == BRIM_BF16 ? float_to_bf16(x) : float_to_f16(x);
}

/* The same for the first `n` < 16 lanes; lanes beyond are zero on load and untouched on store. */
INLINE v16f load_part(int dtype, const void *base, int64_t i, int64_t n) {
    v16f v = splat(0.0f);
    for (int64_t j = 0; j < n; j++) v[j] = load1(dtype, base, i + j);
    return v;
}
INLINE void store_part(int dtype, void *base, int64_t i, int64_t n, v16f v) {
    float tmp[16];
    memcpy(tmp, &v, 64);
    for (int64_t j = 0; j < n; j++) store1(dtype, base, i + j, tmp[j]);
}
INLINE v16f load_upto(int dtype, const void *base, int64_t i, int64_t n) {
    return n >= 16 ? load16(dtype, base, i) : load_part(dtype, base, i, n);
}
INLINE void store_upto(int dtype, void *base, int64_t i, int64_t n, v16f v) {
    if (n >= 16)
        store16(dtype, base, i, v);
    else
        store_part(dtype, base, i, n, v);
}

#endif
