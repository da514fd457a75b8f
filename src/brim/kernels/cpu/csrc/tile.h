/* The matrix product every other kernel is made of: a few rows times one panel of packed columns.
 *
 * A panel holds 16 * groups columns (groups 1..4) for all k: float32 and float16 as [K][width], bfloat16 as
 * [K / 2][width][2] (K rounded up to even, the missing element zero). One accumulator per element of the result runs over
 * k in order, so a row's result is the same bits whatever other rows are computed beside it. */
#ifndef BRIM_TILE_H
#define BRIM_TILE_H

#include "panels.h"

#ifdef __AVX512F__
enum { TILE_ROWS = 6 };
#else
enum { TILE_ROWS = 2 };
#endif

typedef struct brim_tile {
    const void *x;        /* [rows][ldx] of dtype */
    int64_t ldx;          /* elements */
    const void *w;        /* the panel at the first k */
    int64_t depth;        /* how many k */
    float *acc;           /* [rows][lda] float32 */
    int64_t lda;          /* elements, a multiple of 16 */
    const char *prefetch; /* memory that will be wanted next, or NULL */
    int64_t stride;       /* bytes of it to touch per step of k (a pair for bf16) */
    int fresh;            /* nonzero: start from zero; else continue from acc */
} brim_tile;

/* rows 1..TILE_ROWS, groups 1..4 */
typedef void brim_tile_fn(const brim_tile *tile);
brim_tile_fn *brim_tile_for(int dtype, int64_t rows, int64_t groups);

/* Bytes of one k of one column group set: offset of element k of a panel of `width` columns. */
INLINE int64_t panel_offset(int dtype, int64_t width, int64_t k) { return k * width * dtype_size(dtype); }
INLINE int64_t packed_depth(int dtype, int64_t depth) { return dtype == BRIM_BF16 ? (depth + 1) & ~(int64_t)1 : depth; }

#endif
