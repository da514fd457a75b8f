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

/* The k-th largest of n floats in [0, 1]. */
float brim_kth_largest(const float *p, int64_t n, int64_t k, brim_histogram *h);
/* The largest t such that the values >= t sum to at least `needed`; values below `floor` do not count. */
float brim_nucleus(const float *p, int64_t n, float floor, double needed, brim_histogram *h);
#endif
