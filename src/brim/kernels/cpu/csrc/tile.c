/* The micro-kernels, one for each type, number of rows and number of column groups. */
#include "tile.h"

INLINE void load_acc(const brim_tile *t, int rows, int groups, v16f acc[TILE_ROWS][4]) {
    for (int r = 0; r < rows; r++)
        for (int g = 0; g < groups; g++) acc[r][g] = t->fresh ? splat(0.0f) : loadf(t->acc + r * t->lda + g * 16);
}
INLINE void store_acc(const brim_tile *t, int rows, int groups, v16f acc[TILE_ROWS][4]) {
    for (int r = 0; r < rows; r++)
        for (int g = 0; g < groups; g++) storef(t->acc + r * t->lda + g * 16, acc[r][g]);
}

INLINE uint32_t load_pair(const uint16_t *p) {
    uint32_t u;
    memcpy(&u, p, 4);
    return u;
}

/* acc += the products of a pair of k: lane n of w holds columns' two values, x the row's two. */
INLINE v16f dot_pair(v16f acc, v16i w, uint32_t x) {
#ifdef __AVX512BF16__
    return (v16f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)splati((int32_t)x));
#else
    v16f low = (v16f)(w << 16), high = (v16f)(w & splati((int32_t)0xffff0000u));
    acc = FMA16(low, splat(bf16_to_float((uint16_t)x)), acc);
    return FMA16(high, splat(bf16_to_float((uint16_t)(x >> 16))), acc);
#endif
}

/* `rows` and `groups` are constants at every call: the loops vanish and the accumulators live in registers. */
INLINE void step_bf16(const brim_tile *t, int rows, int groups, v16f acc[TILE_ROWS][4], const uint16_t *w, int64_t pair, int odd) {
    v16i columns[4];
    for (int g = 0; g < groups; g++) memcpy(&columns[g], w + g * 32, 64);
    for (int r = 0; r < rows; r++) {
        const uint16_t *x = (const uint16_t *)t->x + r * t->ldx + pair * 2;
        uint32_t both = odd ? x[0] : load_pair(x);
        for (int g = 0; g < groups; g++) acc[r][g] = dot_pair(acc[r][g], columns[g], both);
    }
}

/* `lines` cache lines of what comes next are asked for at each step: a constant 0, 1, 2 or 4. */
INLINE void fetch(const char *ahead, int lines) {
    for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + i * 64, 0, 2);
}
INLINE int lines_of(const brim_tile *t) { return !t->prefetch ? 0 : t->stride <= 64 ? 1 : t->stride <= 128 ? 2 : 4; }

INLINE void sweep_bf16(const brim_tile *t, int rows, int groups, int lines, v16f acc[TILE_ROWS][4]) {
    const uint16_t *w = t->w;
    const char *ahead = t->prefetch;
    int64_t pairs = t->depth / 2;
    for (int64_t pair = 0; pair < pairs; pair++) {
        fetch(ahead, lines);
        if (lines) ahead += t->stride;
        step_bf16(t, rows, groups, acc, w + pair * groups * 32, pair, 0);
    }
    if (t->depth & 1) step_bf16(t, rows, groups, acc, w + pairs * groups * 32, pairs, 1);
}

INLINE void sweep_plain(const brim_tile *t, int dtype, int rows, int groups, int lines, v16f acc[TILE_ROWS][4]) {
    const char *ahead = t->prefetch;
    for (int64_t k = 0; k < t->depth; k++) {
        v16f columns[4];
        fetch(ahead, lines);
        if (lines) ahead += t->stride;
        for (int g = 0; g < groups; g++) columns[g] = load16(dtype, t->w, (k * groups + g) * 16);
        for (int r = 0; r < rows; r++) {
            v16f x = splat(load1(dtype, t->x, r * t->ldx + k));
            for (int g = 0; g < groups; g++) acc[r][g] = FMA16(columns[g], x, acc[r][g]);
        }
    }
}

INLINE void sweep(const brim_tile *t, int dtype, int rows, int groups, int lines, v16f acc[TILE_ROWS][4]) {
    if (dtype == BRIM_BF16)
        sweep_bf16(t, rows, groups, lines, acc);
    else
        sweep_plain(t, dtype, rows, groups, lines, acc);
}

INLINE void run_tile(const brim_tile *t, int dtype, int rows, int groups) {
    v16f acc[TILE_ROWS][4];
    int lines = lines_of(t);
    load_acc(t, rows, groups, acc);
    if (lines == 0)
        sweep(t, dtype, rows, groups, 0, acc);
    else if (lines == 1)
        sweep(t, dtype, rows, groups, 1, acc);
    else if (lines == 2 || groups < 4)
        sweep(t, dtype, rows, groups, 2, acc);
    else
        sweep(t, dtype, rows, groups, 4, acc);
    store_acc(t, rows, groups, acc);
}

#define DEFINE(r, g)                                                                \
    static void bf16_##r##_##g(const brim_tile *t) { run_tile(t, BRIM_BF16, r, g); } \
    static void f16_##r##_##g(const brim_tile *t) { run_tile(t, BRIM_F16, r, g); }   \
    static void f32_##r##_##g(const brim_tile *t) { run_tile(t, BRIM_F32, r, g); }
#define DEFINE_ROW(r) DEFINE(r, 1) DEFINE(r, 2) DEFINE(r, 3) DEFINE(r, 4)
#define NAMES(type, r) {type##_##r##_1, type##_##r##_2, type##_##r##_3, type##_##r##_4}

DEFINE_ROW(1)
DEFINE_ROW(2)
#ifdef __AVX512F__
DEFINE_ROW(3)
DEFINE_ROW(4)
DEFINE_ROW(5)
DEFINE_ROW(6)
#define TABLE(type) {NAMES(type, 1), NAMES(type, 2), NAMES(type, 3), NAMES(type, 4), NAMES(type, 5), NAMES(type, 6)}
#else
#define TABLE(type) {NAMES(type, 1), NAMES(type, 2)}
#endif

static brim_tile_fn *const table[3][TILE_ROWS][4] = {
    [BRIM_F32] = TABLE(f32),
    [BRIM_F16] = TABLE(f16),
    [BRIM_BF16] = TABLE(bf16),
};

brim_tile_fn *brim_tile_for(int dtype, int64_t rows, int64_t groups) { return table[dtype][rows - 1][groups - 1]; }
