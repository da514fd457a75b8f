/* Row-wise kernels: norms, gated activations, gathers, and rotary embedding with the write to the cache. */
#include "dense.h"

#include <math.h>

/* Four sums in fixed places, so that a row's result depends on the row only. */
INLINE float sum_of_squares(int dtype, const void *row, int64_t n) {
    v16f sum[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        for (int j = 0; j < 4; j++) {
            v16f v = load16(dtype, row, i + j * 16);
            sum[j] = FMA16(v, v, sum[j]);
        }
    for (; i < n; i += 16) {
        v16f v = load_upto(dtype, row, i, n - i);
        sum[0] = FMA16(v, v, sum[0]);
    }
    return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
INLINE float inverse_rms(int dtype, const void *row, int64_t n, float eps) {
    return 1.0f / sqrtf(sum_of_squares(dtype, row, n) / (float)n + eps);
}

INLINE void norm_row(int dtype, int out_dtype, const void *x, const float *weight, float eps, void *out, int64_t n) {
    v16f scale = splat(inverse_rms(dtype, x, n, eps));
    for (int64_t i = 0; i < n; i += 16) {
        v16f v = load_upto(dtype, x, i, n - i) * scale * load_upto(BRIM_F32, weight, i, n - i);
        store_upto(out_dtype, out, i, n - i, v);
    }
}

/* p: x, weight f32, out; n: rows, width, row stride of x, row stride of out; f: eps. */
void brim_rms_norm(const brim_op *op, brim_thread *self) {
    int64_t first, last, n = op->n[1];
    brim_share(self, op->n[0], &first, &last);
    for (int64_t row = first; row < last; row++) {
        const void *x = at(op->p[0], op->dtype, row * op->n[2]);
        void *out = at(op->p[2], op->out_dtype, row * op->n[3]);
        if (op->dtype == BRIM_BF16 && op->out_dtype == BRIM_BF16)
            norm_row(BRIM_BF16, BRIM_BF16, x, op->p[1], op->f[0], out, n);
        else if (op->dtype == BRIM_F32 && op->out_dtype == BRIM_F32)
            norm_row(BRIM_F32, BRIM_F32, x, op->p[1], op->f[0], out, n);
        else
            norm_row(op->dtype, op->out_dtype, x, op->p[1], op->f[0], out, n);
    }
}

INLINE void add_norm_row(const brim_op *op, int dtype, int residual_dtype, const void *x, void *residual, void *out) {
    int64_t n = op->n[1];
    const float *post = op->p[4];
    v16f scale = splat(post ? inverse_rms(dtype, x, n, op->f[0]) : 1.0f);
    for (int64_t i = 0; i < n; i += 16) {
        v16f v = load_upto(dtype, x, i, n - i);
        if (post) v = v * scale * load_upto(BRIM_F32, post, i, n - i);
        store_upto(residual_dtype, residual, i, n - i, load_upto(residual_dtype, residual, i, n - i) + v);
    }
    norm_row(residual_dtype, op->out_dtype, residual, op->p[2], op->f[0], out, n);
}

/* p: x, residual, weight f32, out, post weight f32 or NULL; flags: dtype of residual;
 * n: rows, width, row strides of x, residual, out; f: eps. */
void brim_add_rms_norm(const brim_op *op, brim_thread *self) {
    int64_t first, last;
    brim_share(self, op->n[0], &first, &last);
    for (int64_t row = first; row < last; row++) {
        const void *x = at(op->p[0], op->dtype, row * op->n[2]);
        void *residual = at(op->p[1], op->flags, row * op->n[3]);
        void *out = at(op->p[3], op->out_dtype, row * op->n[4]);
        if (op->dtype == BRIM_BF16 && op->flags == BRIM_BF16)
            add_norm_row(op, BRIM_BF16, BRIM_BF16, x, residual, out);
        else
            add_norm_row(op, op->dtype, op->flags, x, residual, out);
    }
}

enum { ACTIVATION_SILU = 0, ACTIVATION_GELU_TANH = 1 };

/* silu(g) = g / (1 + e^-g); gelu_tanh(g) = g / (1 + e^-2u), u = sqrt(2 / pi) (g + 0.044715 g^3). */
INLINE v16f activate(int activation, v16f g) {
    v16f z = -g;
    if (activation == ACTIVATION_GELU_TANH) {
        v16f cubic = FMA16(g * g * splat(0.044715f), g, g);
        z = cubic * splat(-1.5957691216057308f);
    }
    return g / (splat(1.0f) + exp16(z));
}

INLINE void gate_row(int dtype, int activation, const void *gate_up, void *out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        v16f gate = load_upto(dtype, gate_up, i, n - i), up = load_upto(dtype, gate_up, n + i, n - i);
        store_upto(dtype, out, i, n - i, activate(activation, gate) * up);
    }
}

/* p: gate_up, out; flags: the activation; n: rows, width of out, row strides of gate_up, out. Rows are split in two-cache-line
 * pieces where there are fewer rows than threads. */
void brim_gated_activation(const brim_op *op, brim_thread *self) {
    int64_t first, last;
    brim_share(self, op->n[0], &first, &last);
    for (int64_t row = first; row < last; row++) {
        const void *x = at(op->p[0], op->dtype, row * op->n[2]);
        void *out = at(op->p[1], op->dtype, row * op->n[3]);
        if (op->dtype == BRIM_BF16 && op->flags == ACTIVATION_GELU_TANH)
            gate_row(BRIM_BF16, ACTIVATION_GELU_TANH, x, out, op->n[1]);
        else if (op->dtype == BRIM_BF16)
            gate_row(BRIM_BF16, ACTIVATION_SILU, x, out, op->n[1]);
        else
            gate_row(op->dtype, op->flags, x, out, op->n[1]);
    }
}

/* p: x, rows int64, out; n: count, width, row strides of x, out. */
void brim_gather_rows(const brim_op *op, brim_thread *self) {
    const int64_t *rows = op->p[1];
    int64_t first, last;
    brim_share(self, op->n[0], &first, &last);
    for (int64_t i = first; i < last; i++)
        memcpy(at(op->p[2], op->dtype, i * op->n[3]), at(op->p[0], op->dtype, rows[i] * op->n[2]),
               (size_t)(op->n[1] * dtype_size(op->dtype)));
}

/* One head: norm where a weight is given, rotate, store. head_dim is a multiple of 16, at most 1024. */
static void rope_head(int dtype, int out_dtype, const void *x, void *out, int64_t d, const float *cos_sin, const float *norm, float eps) {
    _Alignas(64) float v[1024];
    int64_t half = d / 2;
    for (int64_t i = 0; i < d; i += 16) storef(v + i, load16(dtype, x, i));
    if (norm) {
        v16f scale = splat(inverse_rms(BRIM_F32, v, d, eps));
        for (int64_t i = 0; i < d; i += 16) storef(v + i, loadf(v + i) * scale * loadf(norm + i));
    }
    for (int64_t i = 0; i < half; i++) {
        float low = v[i], high = v[half + i], c = cos_sin[i], s = cos_sin[half + i];
        v[i] = low * c - high * s;
        v[half + i] = high * c + low * s;
    }
    for (int64_t i = 0; i < d; i += 16) store16(out_dtype, out, i, loadf(v + i));
}

/* p: qkv, positions int64, cos_sin f32, cache, slot_mapping int64, q_norm or NULL, k_norm or NULL; out_dtype: of the cache;
 * n: tokens, heads, kv heads, head_dim, block size, row stride of qkv, row stride of cos_sin,
 *    strides of the cache: block, K/V, position, head; f: eps. */
void brim_rope_and_cache(const brim_op *op, brim_thread *self) {
    const int64_t *positions = op->p[1], *slots = op->p[4];
    int64_t heads = op->n[1], kv_heads = op->n[2], d = op->n[3], block_size = op->n[4], first, last;
    brim_share(self, op->n[0] * (heads + 2 * kv_heads), &first, &last);
    for (int64_t i = first; i < last; i++) {
        int64_t token = i / (heads + 2 * kv_heads), head = i % (heads + 2 * kv_heads);
        char *x = at(op->p[0], op->dtype, token * op->n[5] + head * d);
        const float *cos_sin = (const float *)op->p[2] + positions[token] * op->n[6];
        if (head < heads) {
            rope_head(op->dtype, op->dtype, x, x, d, cos_sin, op->p[5], op->f[0]);
            continue;
        }
        int64_t slot = slots[token], value = head >= heads + kv_heads;
        if (slot < 0) continue;
        int64_t where = slot / block_size * op->n[7] + value * op->n[8] + slot % block_size * op->n[9];
        char *out = at(op->p[3], op->out_dtype, where + (head - heads - value * kv_heads) * op->n[10]);
        if (!value)
            rope_head(op->dtype, op->out_dtype, x, out, d, cos_sin, op->p[6], op->f[0]);
        else if (op->dtype == op->out_dtype)
            memcpy(out, x, (size_t)(d * dtype_size(op->dtype)));
        else
            for (int64_t j = 0; j < d; j += 16) store16(op->out_dtype, out, j, load16(op->dtype, x, j));
    }
}
