/* Paged attention; the fields of the operation are said in attention.c, the arithmetic in attention_chunk.c.
 *
 * Positions are cut into chunks of 256 at multiples of 256. A chunk's contribution to a row of queries is computed from
 * nothing, and the contributions are folded in order of position. So a row's result is a function of its position and the
 * cache only: not of how its prompt was cut into steps, of the rows beside it, nor of the number of threads. */
#ifndef BRIM_ATTENTION_H
#define BRIM_ATTENTION_H
#include "tile.h"

enum { CHUNK = 256, MOST_ROWS = 96, SPLIT_ROWS = 16, SPLIT_SLOTS = 64 };

/* Rows of queries of one sequence that share one kv head: row r is token (first + r) / group, head (first + r) % group. */
typedef struct {
    const brim_op *op;
    int64_t seq, kv_head;
    int64_t first, rows;
    int64_t token0;   /* of the sequence in q and out */
    int64_t position; /* of the sequence's first query token */
    int64_t low, high; /* positions [low, high) are visible to some row */
    void *queries;    /* [rows][head_dim] packed, bf16 or f32 */
    float *scores;    /* [rows][CHUNK] */
    char *keys, *values;
} brim_rows_task;

/* A softmax under way: acc / sum is the result; max is the exponent's reference. */
typedef struct {
    float *max, *sum; /* [rows] */
    float *acc;       /* [rows][head_dim] */
} brim_partial;

void brim_gather_queries(brim_rows_task *task);
/* The contribution of positions chunk * CHUNK .. to every row. */
void brim_chunk(const brim_rows_task *task, int64_t chunk, brim_partial *part);
/* total = total + part, both [rows]. */
void brim_fold(const brim_rows_task *task, brim_partial *total, const brim_partial *part);
void brim_clear(const brim_rows_task *task, brim_partial *total);
void brim_write_rows(const brim_rows_task *task, const brim_partial *total);

brim_kernel brim_attention;
int64_t brim_attention_scratch(int64_t head_dim);
int64_t brim_attention_shared(int64_t head_dim);
#endif
