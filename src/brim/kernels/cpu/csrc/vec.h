/* Sixteen-lane float vectors on any machine. Owns the vector type, conversions to and from bf16 and f16, exp and tanh.
 *
 * GCC vector extensions carry the arithmetic everywhere; AVX512 intrinsics replace the few operations that the compiler
 * would not find. Contraction is off (see build.py): a fused multiply-add happens only where FMA16 says so. */
#ifndef BRIM_VEC_H
#define BRIM_VEC_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef float v16f __attribute__((vector_size(64), aligned(64)));
typedef int32_t v16i __attribute__((vector_size(64), aligned(64)));
typedef uint32_t v16u __attribute__((vector_size(64), aligned(64)));
typedef uint8_t v16b __attribute__((vector_size(16), aligned(16)));
typedef uint16_t v16h __attribute__((vector_size(32), aligned(32)));

#define INLINE static inline __attribute__((always_inline))

#ifdef __AVX512F__
#define FMA16(a, b, c) ((v16f)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#else
#define FMA16(a, b, c) ((a) * (b) + (c))
#endif

INLINE v16f splat(float x) { return (v16f){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16i splati(int32_t x) { return (v16i){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16i lanes(void) { return (v16i){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

INLINE v16f loadf(const float *p) {
    v16f v;
    memcpy(&v, p, 64);
    return v;
}
INLINE void storef(float *p, v16f v) { memcpy(p, &v, 64); }

/* mask lanes are all ones or all zeros */
INLINE v16f choose(v16i mask, v16f yes, v16f no) { return (v16f)(((v16i)yes & mask) | ((v16i)no & ~mask)); }
INLINE v16f max16(v16f a, v16f b) {
#ifdef __AVX512F__
    return (v16f)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose(a > b, a, b);
#endif
}
INLINE v16f min16(v16f a, v16f b) {
#ifdef __AVX512F__
    return (v16f)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return choose(a < b, a, b);
#endif
}

/* One bit a lane of a mask. */
INLINE uint32_t mask_bits(v16i mask) {
#ifdef __AVX512DQ__
    return _mm512_movepi32_mask((__m512i)mask);
#else
    uint32_t bits = 0;
    for (int j = 0; j < 16; j++) bits |= (uint32_t)(mask[j] & 1) << j;
    return bits;
#endif
}

/* Horizontal results in a fixed order of lanes: halves folded onto each other. */
INLINE float hsum(v16f v) {
    float s[16];
    memcpy(s, &v, 64);
    for (int w = 8; w; w >>= 1)
        for (int i = 0; i < w; i++) s[i] += s[i + w];
    return s[0];
}
INLINE float hmax(v16f v) {
    float s[16];
    memcpy(s, &v, 64);
    for (int w = 8; w; w >>= 1)
        for (int i = 0; i < w; i++) s[i] = s[i] > s[i + w] ? s[i] : s[i + w];
    return s[0];
}

INLINE int32_t hmaxi(v16i v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t s = v[0];
    for (int i = 1; i < 16; i++) s = v[i] > s ? v[i] : s;
    return s;
#endif
}
INLINE int32_t hsumi(v16i v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t s = 0;
    for (int i = 0; i < 16; i++) s += v[i];
    return s;
#endif
}
/* The low bytes of sixteen integers. */
INLINE void narrow16(int8_t *p, v16i v) {
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int i = 0; i < 16; i++) p[i] = (int8_t)v[i];
#endif
}

/* scalar conversions */
INLINE float bf16_to_float(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
INLINE uint16_t float_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
INLINE float f16_to_float(uint16_t h) {
#ifdef __F16C__
    return _cvtsh_ss(h);
#else
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, mag = h & 0x7fffu, u;
    float f;
    if (mag >= 0x7c00u) {
        u = 0x7f800000u | (mag << 13);
    } else if (mag >= 0x400u) {
        u = (mag << 13) + 0x38000000u;
    } else {
        f = (float)mag * 0x1p-24f;
        memcpy(&u, &f, 4);
    }
    u |= sign;
    memcpy(&f, &u, 4);
    return f;
#endif
}
INLINE uint16_t float_to_f16(float f) {
#ifdef __F16C__
    return (uint16_t)_cvtss_sh(f, 0);
#else
    uint32_t u, sign, mag;
    memcpy(&u, &f, 4);
    sign = (u >> 16) & 0x8000u;
    mag = u & 0x7fffffffu;
    if (mag > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (mag >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (mag < 0x38800000u) { /* subnormal in f16: add a power of two so that the low bits are the rounded value */
        float a;
        memcpy(&a, &mag, 4);
        a += 0.5f;
        memcpy(&mag, &a, 4);
        return (uint16_t)(sign | (mag - 0x3f000000u));
    }
    return (uint16_t)(sign | ((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13));
#endif
}

/* sixteen at a time */
INLINE v16f load_bf16(const uint16_t *p) {
#ifdef __AVX512F__
    return (v16f)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#else
    v16h h;
    memcpy(&h, p, 32);
    return (v16f)(__builtin_convertvector(h, v16u) << 16);
#endif
}
INLINE void store_bf16(uint16_t *p, v16f v) {
#ifdef __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, 32);
#else
    for (int i = 0; i < 16; i++) p[i] = float_to_bf16(v[i]);
#endif
}
INLINE v16f load_f16(const uint16_t *p) {
#ifdef __AVX512F__
    return (v16f)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#else
    v16f v;
    for (int i = 0; i < 16; i++) v[i] = f16_to_float(p[i]);
    return v;
#endif
}
INLINE void store_f16(uint16_t *p, v16f v) {
#ifdef __AVX512F__
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, 0));
#else
    for (int i = 0; i < 16; i++) p[i] = float_to_f16(v[i]);
#endif
}

/* e^x, relative error about 1.2e-7; 0 below -87.3 and +inf above 88.7; NaN stays NaN.
 * n = round(x / ln 2); e^(x - n ln 2) by its Taylor polynomial of degree 7 on |r| <= 0.347. */
INLINE v16f exp16(v16f x) {
    const v16f shifter = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer held in the low bits */
    v16f clamped = min16(max16(x, splat(-87.4f)), splat(88.8f));
    v16f t = FMA16(clamped, splat(1.44269504088896341f), shifter);
    v16f n = t - shifter;
    v16f r = FMA16(n, splat(-0.693359375f), clamped);
    r = FMA16(n, splat(2.12194440e-4f), r);
    v16f p = splat(1.98412698e-4f);
    p = FMA16(p, r, splat(1.38888889e-3f));
    p = FMA16(p, r, splat(8.33333333e-3f));
    p = FMA16(p, r, splat(4.16666667e-2f));
    p = FMA16(p, r, splat(1.66666667e-1f));
    p = FMA16(p, r, splat(0.5f));
    p = FMA16(p, r, splat(1.0f));
    p = FMA16(p, r, splat(1.0f));
    v16i k = (v16i)t - (v16i)shifter; /* -126 .. 128; scaled in two steps so that 128 does not wrap */
    v16i half = k >> 1;
    p = p * (v16f)((half + 127) << 23) * (v16f)((k - half + 127) << 23);
    p = choose(x < splat(-87.33f), splat(0.0f), p);
    p = choose(x > splat(88.72283f), splat(__builtin_inff()), p);
    return choose(x == x, p, x);
}

/* tanh through exp: absolute error below 2e-7 */
INLINE v16f tanh16(v16f x) { return splat(1.0f) - splat(2.0f) / (splat(1.0f) + exp16(x + x)); }

#endif
