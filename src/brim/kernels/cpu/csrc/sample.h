/* Kernels over rows of logits; the fields of each operation are said in sample.c and select.c. */
#ifndef BRIM_SAMPLE_H
#define BRIM_SAMPLE_H
#include "rows.h"
brim_kernel brim_argmax, brim_sample, brim_top_logprobs, brim_penalize;
int64_t brim_sample_scratch(void);
int64_t brim_sample_shared(void);

/* Counts and sums of values by key, for finding a threshold in three rounds of 11, 11 and 10 bits. */
enum { RADIX = 2048 };
typedef struct {
    uint32_t count[RADIX];
    double sum[RADIX];
} brim_histogram;

/* A row of unnormalised probabilities in [0, 1] with the largest of each block: blocks with nothing above a threshold, which
 * are most, are passed by in every later pass. */
typedef struct {
    float *p;
    int64_t n, block; /* block is a multiple of 16 */
    float *largest;   /* [ceil(n / block)] */
} brim_weights;

static inline int64_t brim_block_end(const brim_weights *w, int64_t first) {
    return first + w->block < w->n ? first + w->block : w->n;
}

/* The k-th largest. */
float brim_kth_largest(const brim_weights *w, int64_t k, brim_histogram *h);
/* The largest t such that the values >= t sum to at least `needed`; values below `floor` do not count. */
float brim_nucleus(const brim_weights *w, float floor, double needed, brim_histogram *h);
#endif
