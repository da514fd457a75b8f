/* The table of operations and how much scratch memory they need. The numbers are those of the Python side's Opcode. */
#include "attention.h"
#include "dense.h"
#include "dequantize.h"
#include "linear.h"
#include "sample.h"

static brim_kernel *const kernels[] = {
    [1] = brim_linear,         [2] = brim_pack,        [3] = brim_embed,         [4] = brim_rms_norm,
    [5] = brim_add_rms_norm,   [6] = brim_gated_activation, [7] = brim_gather_rows, [8] = brim_rope_and_cache,
    [9] = brim_attention,      [10] = brim_argmax,     [11] = brim_sample,       [12] = brim_top_logprobs,
    [13] = brim_penalize,      [14] = brim_dequantize,
};

brim_kernel *brim_kernel_for(int32_t code) {
    if (code < 1 || (size_t)code >= sizeof kernels / sizeof *kernels) return NULL;
    return kernels[code];
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t pages(int64_t bytes) { return (bytes + 4095) & ~(int64_t)4095; }

int64_t brim_scratch_bytes(int64_t max_head_dim) {
    return pages(larger(larger(brim_attention_scratch(max_head_dim), brim_sample_scratch()), brim_linear_scratch()));
}
int64_t brim_shared_bytes(int64_t max_head_dim) {
    return pages(larger(brim_attention_shared(max_head_dim), brim_sample_shared()));
}
int64_t brim_op_bytes(void) { return (int64_t)sizeof(brim_op); }
