/* The micro-kernels over quads, one for each number of rows and of column groups. */
#include "quad_tile.h"

INLINE uint32_t quad_of(const brim_row_sub *x, int quad) {
    uint32_t u;
    memcpy(&u, x->q + 4 * quad, 4);
    return u;
}

#if defined(__AVX512VNNI__)
static const char products[] = "AVX-512 VNNI";
#elif defined(__AVX512BW__)
static const char products[] = "AVX-512";
#elif defined(__AVXVNNI__)
static const char products[] = "AVX VNNI";
#elif defined(__AVX2__)
static const char products[] = "AVX2";
#else
static const char products[] = "portable C";
#endif
const char *brim_byte_products(void) { return products; }

#ifdef __AVX2__
/* Even and odd bytes as 16-bit pairs: no product or sum of two is cut off, whatever the bytes. */
INLINE __m256i dot_half(__m256i acc, __m256i w, uint32_t x) {
    __m256i bytes = _mm256_set1_epi32((int)x);
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(acc, w, bytes);
#else
    __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), odd = _mm256_srai_epi16(bytes, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), odd));
#endif
}
#endif

/* acc += for each lane the products of its four unsigned bytes with the row's four signed ones. */
INLINE v16i dot_quad(v16i acc, v16u w, uint32_t x) {
#if defined(__AVX512VNNI__)
    return (v16i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32((int)x));
#elif defined(__AVX512BW__)
    __m512i bytes = _mm512_set1_epi32((int)x);
    __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), odd = _mm512_srai_epi16(bytes, 8);
    __m512i sum = _mm512_madd_epi16(_mm512_and_si512((__m512i)w, _mm512_set1_epi16(255)), even);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), odd));
    return (v16i)_mm512_add_epi32((__m512i)acc, sum);
#elif defined(__AVX2__)
    __m256i a[2], b[2];
    memcpy(a, &acc, 64);
    memcpy(b, &w, 64);
    for (int i = 0; i < 2; i++) a[i] = dot_half(a[i], b[i], x);
    memcpy(&acc, a, 64);
    return acc;
#else
    for (int i = 0; i < 4; i++) acc += (v16i)(w >> (8 * i) & 255u) * (int32_t)(int8_t)(x >> (8 * i));
    return acc;
#endif
}

/* One sub-block, or a half of one (quads 4), into the float sums. rows, groups, quads and lines (of `ahead` to touch per quad)
 * are constants at every call. */
INLINE void part(
    const brim_row_sub *x, int64_t ldx, const char *w, int64_t line, int rows, int groups, int quad, int quads,
    const float *scale, const char *ahead, int64_t stride, int lines, v16f sum[QUAD_ROWS][4]) {
    v16i acc[QUAD_ROWS][4];
    for (int r = 0; r < rows; r++) {
        const int32_t *start = x[r * ldx].start;
        v16i first = splati(quads == 8 ? start[0] + start[1] : start[quad / 4]);
        for (int g = 0; g < groups; g++) acc[r][g] = first;
    }
#ifdef __AVX2__
#pragma GCC unroll 8
#endif
    for (int q = quad; q < quad + quads; q++) {
        v16u words[4];
        for (int i = 0; i < lines; i++) __builtin_prefetch(ahead + q * stride + i * 64, 0, 2);
        for (int g = 0; g < groups; g++) memcpy(&words[g], w + q * line + g * 64, 64);
        for (int r = 0; r < rows; r++) {
            uint32_t four = quad_of(&x[r * ldx], q);
            for (int g = 0; g < groups; g++) acc[r][g] = dot_quad(acc[r][g], words[g], four);
        }
    }
    for (int g = 0; g < groups; g++) {
        v16f scales = loadf(scale + g * 16);
        for (int r = 0; r < rows; r++) {
            v16f both = scales * splat(x[r * ldx].scale);
            sum[r][g] = FMA16(__builtin_convertvector(acc[r][g], v16f), both, sum[r][g]);
        }
    }
}

INLINE void add_leasts(const brim_row_sub *x, int64_t ldx, int rows, int groups, const float *least, v16f sum[QUAD_ROWS][4]) {
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < rows; r++) sum[r][g] = FMA16(loadf(least + g * 16), splat(x[r * ldx].weight), sum[r][g]);
}

INLINE void sweep(const brim_quad_tile *t, int scales, int rows, int groups, int lines) {
    v16f sum[QUAD_ROWS][4];
    const brim_row_sub *x = t->x;
    const char *ahead = t->prefetch, *w = t->slice.w;
    const float *scale = t->slice.scale, *least = t->slice.least;
    int64_t ldx = t->ldx, stride = t->stride;
    int64_t lanes = groups == 4 ? 64 : t->lanes, line = groups == 4 ? 256 : t->slice.quad_stride;
    for (int r = 0; r < rows; r++)
        for (int g = 0; g < groups; g++) sum[r][g] = t->fresh ? splat(0.0f) : loadf(t->acc + r * PANEL + g * 16);
    for (int64_t s = 0; s < t->subs; s++, x++, w += t->slice.sub_stride) {
        if (scales == SCALE_HALVES) {
            part(x, ldx, w, line, rows, groups, 0, 4, scale, ahead, stride, lines, sum);
            part(x, ldx, w, line, rows, groups, 4, 4, scale + lanes, ahead, stride, lines, sum);
            scale += lanes;
        } else {
            part(x, ldx, w, line, rows, groups, 0, 8, scale, ahead, stride, lines, sum);
        }
        scale += lanes;
        ahead += lines ? 8 * stride : 0;
        if (scales == SCALE_LEAST) {
            add_leasts(x, ldx, rows, groups, least, sum);
            least += lanes;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int g = 0; g < groups; g++) storef(t->acc + r * PANEL + g * 16, sum[r][g]);
}

INLINE void run_quads(const brim_quad_tile *t, int scales, int rows) {
    if (t->prefetch && scales == SCALE_F16)
        sweep(t, scales, rows, 4, 5);
    else
        sweep(t, scales, rows, 4, 0);
}

#define DEFINE_KIND(kind, scales, r)                                                          \
    static void kind##_##r##_1(const brim_quad_tile *t) { sweep(t, scales, r, 1, 0); }        \
    static void kind##_##r##_4(const brim_quad_tile *t) { run_quads(t, scales, r); }
#define DEFINE(r) DEFINE_KIND(plain, SCALE_F16, r) DEFINE_KIND(least, SCALE_LEAST, r) DEFINE_KIND(halves, SCALE_HALVES, r)
#define NAMES(kind, r) {kind##_##r##_1, kind##_##r##_4}

DEFINE(1)
DEFINE(2)
#ifdef __AVX512F__
DEFINE(3)
#define TABLE(kind) {NAMES(kind, 1), NAMES(kind, 2), NAMES(kind, 3)}
#else
#define TABLE(kind) {NAMES(kind, 1), NAMES(kind, 2)}
#endif

static brim_quad_fn *const table[][QUAD_ROWS][2] = {
    [SCALE_F16] = TABLE(plain),
    [SCALE_LEAST] = TABLE(least),
    [SCALE_NESTED] = TABLE(least),
    [SCALE_HALVES] = TABLE(halves),
};

brim_quad_fn *brim_quad_tile_for(int scales, int64_t rows, int64_t groups) { return table[scales][rows - 1][groups == 4]; }
