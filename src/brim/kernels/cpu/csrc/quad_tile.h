/* The product of a few quantised rows with a chunk of quantised weights: integers within a sub-block, float32 between them. */
#ifndef BRIM_QUAD_TILE_H
#define BRIM_QUAD_TILE_H
#include "blocks.h"

#ifdef __AVX512F__
enum { QUAD_ROWS = 3 };
#else
enum { QUAD_ROWS = 2 };
#endif

/* 32 elements of a row: element i is scale * q[i]. start: by halves, minus the sum of q times the offset of the weights'
 * elements, so that products begin with it. weight: scale times the sum of q, which a least is multiplied with. */
typedef struct {
    int8_t q[32];
    float scale, weight;
    int32_t start[2];
} brim_row_sub;

typedef struct {
    const brim_row_sub *x; /* [rows][ldx], at the slice's first sub-block */
    int64_t ldx;
    brim_slice slice;
    int64_t lanes;         /* of the slice */
    int64_t subs;
    float *acc;           /* [rows][PANEL] */
    const char *prefetch; /* memory that will be wanted next, or NULL; touched where elements are read as they are stored */
    int64_t stride;       /* bytes of it to touch per quad */
    int fresh;            /* nonzero: start from zero; else continue from acc */
} brim_quad_tile;

/* scales: of the form; rows 1..QUAD_ROWS, groups 1 or 4 (with four, all lanes of the slice).
 * Each result is summed in one order whatever the rows beside it. */
typedef void brim_quad_fn(const brim_quad_tile *tile);
brim_quad_fn *brim_quad_tile_for(int scales, int64_t rows, int64_t groups);
#endif
