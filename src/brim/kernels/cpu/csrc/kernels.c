/* The table of operations and how much scratch memory they need. The numbers are those of the Python side's Opcode. */
#include "attention.h"
#include "dense.h"
#include "dequantize.h"
#include "linear.h"
#include "quantized.h"
#include "sample.h"

/* The work of an operation is the product of its first `sizes` sizes; below `small` one thread does it. */
static const struct {
    brim_kernel *run;
    int64_t small;
    int sizes;
} kernels[] = {
    [1] = {brim_linear, 1 << 16, 3},           [2] = {brim_pack, 0, 0},
    [3] = {brim_embed, 2, 1},            [4] = {brim_rms_norm, 1 << 13, 2},
    [5] = {brim_add_rms_norm, 1 << 13, 2},     [6] = {brim_gated_activation, 1 << 11, 2},
    [7] = {brim_gather_rows, 1 << 14, 2},      [8] = {brim_rope_and_cache, 1 << 5, 2},
    [9] = {brim_attention, 0, 0},              [10] = {brim_argmax, 1 << 13, 2},
    [11] = {brim_sample, 1 << 12, 2},          [12] = {brim_top_logprobs, 1 << 12, 2},
    [13] = {brim_penalize, INT64_MAX, 0},      [14] = {brim_dequantize, 0, 0},
    [15] = {brim_quantized_linear, 1 << 16, 3}, [16] = {brim_pack_blocks, 0, 0},
    [17] = {brim_quantized_embed, 2, 1},
};

static int known(int32_t code) { return code >= 1 && (size_t)code < sizeof kernels / sizeof *kernels; }
brim_kernel *brim_kernel_for(int32_t code) { return known(code) ? kernels[code].run : NULL; }

int brim_is_small(const brim_op *op) {
    int64_t work = 1;
    for (int i = 0; i < kernels[op->code].sizes; i++) work *= op->n[i];
    return work < kernels[op->code].small;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t pages(int64_t bytes) { return (bytes + 4095) & ~(int64_t)4095; }

int64_t brim_scratch_bytes(int64_t max_head_dim) {
    int64_t linear = larger(brim_linear_scratch(), brim_quantized_scratch());
    return pages(larger(larger(brim_attention_scratch(max_head_dim), brim_sample_scratch()), linear));
}
int64_t brim_shared_bytes(int64_t max_head_dim) {
    return pages(larger(larger(brim_attention_shared(max_head_dim), brim_sample_shared()), brim_quantized_shared()));
}
int64_t brim_op_bytes(void) { return (int64_t)sizeof(brim_op); }
