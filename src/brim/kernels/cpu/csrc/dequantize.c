/* GGUF blocks to floats. Each block type is one function from a block to its floats; products are rounded as in the reference
 * (scale times sub-scale first), so results are the same bits. Layouts: ggml's documented block structures. */
#include "dequantize.h"

enum {
    GGML_F32 = 0, GGML_F16 = 1, GGML_Q4_0 = 2, GGML_Q4_1 = 3, GGML_Q5_0 = 6, GGML_Q5_1 = 7, GGML_Q8_0 = 8,
    GGML_Q4_K = 12, GGML_Q5_K = 13, GGML_Q6_K = 14, GGML_BF16 = 30
};

typedef void block_fn(const uint8_t *block, float *out);

static float half_at(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return f16_to_float(h);
}

/* f16 d; 32 x int8 */
static void block_q8_0(const uint8_t *b, float *out) {
    float d = half_at(b);
    const int8_t *q = (const int8_t *)b + 2;
    for (int i = 0; i < 32; i++) out[i] = (float)q[i] * d;
}

/* f16 d; 16 bytes of two 4-bit values: low halves are elements 0..15, high ones 16..31 */
static void block_q4_0(const uint8_t *b, float *out) {
    float d = half_at(b);
    for (int i = 0; i < 16; i++) {
        out[i] = (float)((b[2 + i] & 15) - 8) * d;
        out[16 + i] = (float)((b[2 + i] >> 4) - 8) * d;
    }
}
static void block_q4_1(const uint8_t *b, float *out) {
    float d = half_at(b), m = half_at(b + 2);
    for (int i = 0; i < 16; i++) {
        out[i] = (float)(b[4 + i] & 15) * d + m;
        out[16 + i] = (float)(b[4 + i] >> 4) * d + m;
    }
}

/* The fifth bits of the 32 elements, as 0 or 16. */
INLINE void fifth_bits(const uint8_t *p, int *high) {
    uint32_t bits;
    memcpy(&bits, p, 4);
    for (int i = 0; i < 32; i++) high[i] = (int)(bits >> i & 1u) << 4;
}
/* f16 d; 32 fifth bits; 16 bytes of two 4-bit values */
static void block_q5_0(const uint8_t *b, float *out) {
    float d = half_at(b);
    int high[32];
    fifth_bits(b + 2, high);
    for (int i = 0; i < 16; i++) {
        out[i] = (float)(((b[6 + i] & 15) | high[i]) - 16) * d;
        out[16 + i] = (float)((b[6 + i] >> 4 | high[16 + i]) - 16) * d;
    }
}
static void block_q5_1(const uint8_t *b, float *out) {
    float d = half_at(b), m = half_at(b + 2);
    int high[32];
    fifth_bits(b + 4, high);
    for (int i = 0; i < 16; i++) {
        out[i] = (float)((b[8 + i] & 15) | high[i]) * d + m;
        out[16 + i] = (float)(b[8 + i] >> 4 | high[16 + i]) * d + m;
    }
}

/* Eight 6-bit scales and minima in 12 bytes, as the K types share. */
static void scales_k(const uint8_t *s, int index, float *scale, float *min) {
    if (index < 4) {
        *scale = (float)(s[index] & 63);
        *min = (float)(s[index + 4] & 63);
    } else {
        *scale = (float)((s[index + 4] & 15) | (s[index - 4] >> 6) << 4);
        *min = (float)(s[index + 4] >> 4 | (s[index] >> 6) << 4);
    }
}
/* f16 d, f16 dmin, scales[12], 128 bytes: 32-byte groups hold sub-block 2g in low halves and 2g + 1 in high ones */
static void block_q4_k(const uint8_t *b, float *out) {
    float d = half_at(b), dmin = half_at(b + 2), scale, min;
    for (int sub = 0; sub < 8; sub++) {
        const uint8_t *q = b + 16 + sub / 2 * 32;
        int shift = sub % 2 * 4;
        scales_k(b + 4, sub, &scale, &min);
        float ds = d * scale, dm = dmin * min;
        for (int i = 0; i < 32; i++) out[sub * 32 + i] = ds * (float)(q[i] >> shift & 15) - dm;
    }
}
/* the same with 32 bytes of fifth bits, bit `sub` of byte i, before the halves */
static void block_q5_k(const uint8_t *b, float *out) {
    float d = half_at(b), dmin = half_at(b + 2), scale, min;
    const uint8_t *fifth = b + 16;
    for (int sub = 0; sub < 8; sub++) {
        const uint8_t *q = b + 48 + sub / 2 * 32;
        int shift = sub % 2 * 4;
        scales_k(b + 4, sub, &scale, &min);
        float ds = d * scale, dm = dmin * min;
        for (int i = 0; i < 32; i++) out[sub * 32 + i] = ds * (float)((q[i] >> shift & 15) | (fifth[i] >> sub & 1) << 4) - dm;
    }
}
/* 128 bytes low halves, 64 bytes of upper two bits, 16 x int8 scales, f16 d */
static void block_q6_k(const uint8_t *b, float *out) {
    float d = half_at(b + 208);
    const int8_t *scale = (const int8_t *)b + 192;
    for (int part = 0; part < 8; part++) { /* 32 elements each */
        const uint8_t *low = b + part / 4 * 64 + part % 2 * 32, *high = b + 128 + part / 4 * 32;
        int low_shift = part % 4 / 2 * 4, high_shift = part % 4 * 2;
        float d0 = d * (float)scale[part * 2], d1 = d * (float)scale[part * 2 + 1];
        for (int i = 0; i < 32; i++) {
            int q = ((low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4) - 32;
            out[part * 32 + i] = (i < 16 ? d0 : d1) * (float)q;
        }
    }
}

static void block_f32(const uint8_t *b, float *out) { memcpy(out, b, 64); }
static void block_f16(const uint8_t *b, float *out) { storef(out, load_f16((const uint16_t *)b)); }
static void block_bf16(const uint8_t *b, float *out) { storef(out, load_bf16((const uint16_t *)b)); }

typedef struct {
    int type;
    int64_t bytes, elements;
    block_fn *decode;
} block_type;

static const block_type types[] = {
    {GGML_F32, 64, 16, block_f32},     {GGML_F16, 32, 16, block_f16},     {GGML_BF16, 32, 16, block_bf16},
    {GGML_Q4_0, 18, 32, block_q4_0},   {GGML_Q4_1, 20, 32, block_q4_1},   {GGML_Q5_0, 22, 32, block_q5_0},
    {GGML_Q5_1, 24, 32, block_q5_1},   {GGML_Q8_0, 34, 32, block_q8_0},   {GGML_Q4_K, 144, 256, block_q4_k},
    {GGML_Q5_K, 176, 256, block_q5_k}, {GGML_Q6_K, 210, 256, block_q6_k},
};

/* p: blocks, out; flags: ggml type (known to the caller); n: rows, columns (whole blocks), row stride of out. */
void brim_dequantize(const brim_op *op, brim_thread *self) {
    const block_type *type = NULL;
    _Alignas(64) float tmp[256];
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (types[i].type == op->flags) type = &types[i];
    if (!type) return;
    int64_t blocks = op->n[1] / type->elements, rows_at_once = 65536 / op->n[1] + 1;
    for (int64_t first = brim_ticket(self) * rows_at_once; first < op->n[0]; first = brim_ticket(self) * rows_at_once) {
        int64_t last = first + rows_at_once < op->n[0] ? first + rows_at_once : op->n[0];
        for (int64_t i = first * blocks; i < last * blocks; i++) {
            int64_t to = i / blocks * op->n[2] + i % blocks * type->elements;
            type->decode((const uint8_t *)op->p[0] + i * type->bytes, tmp);
            for (int64_t j = 0; j < type->elements; j += 16) store16(op->out_dtype, op->p[1], to + j, loadf(tmp + j));
        }
    }
}
