/* One chunk of keys and values against some rows of queries: pack, multiply, softmax, multiply, fold. */
#include "attention.h"

#include <math.h>

/* What the products are computed in: bf16 stays, f16 is widened. */
static int product_dtype(int dtype) { return dtype == BRIM_BF16 ? BRIM_BF16 : BRIM_F32; }

static int64_t row_token(const brim_rows_task *t, int64_t row) { return (t->first + row) / t->op->n[2]; }
static int64_t row_head(const brim_rows_task *t, int64_t row) {
    return t->kv_head * t->op->n[2] + (t->first + row) % t->op->n[2];
}

void brim_gather_queries(brim_rows_task *t) {
    const brim_op *op = t->op;
    int64_t d = op->n[3];
    int wide = product_dtype(op->out_dtype);
    for (int64_t r = 0; r < t->rows; r++) {
        const char *q = at(op->p[0], op->dtype, (t->token0 + row_token(t, r)) * op->n[5] + row_head(t, r) * d);
        char *out = at(t->queries, wide, r * d);
        if (op->dtype == wide)
            memcpy(out, q, (size_t)(d * dtype_size(wide)));
        else
            for (int64_t i = 0; i < d; i += 16) store16(wide, out, i, load16(op->dtype, q, i));
    }
}

/* Where the keys of positions from + 0 .. count-1 lie; NULL where nothing may be read. */
static void locate(const brim_rows_task *t, int64_t from, int64_t count, const char **where) {
    const brim_op *op = t->op;
    const int32_t *table = (const int32_t *)op->p[2] + t->seq * op->n[12];
    int64_t block_size = op->n[4];
    for (int64_t i = 0; i < count;) {
        int64_t p = from + i, block = p / block_size, offset = p % block_size;
        if (p < t->low || p >= t->high) {
            where[i++] = NULL;
            continue;
        }
        const char *base = at(op->p[1], op->out_dtype, table[block] * op->n[8] + t->kv_head * op->n[11]);
        for (; offset < block_size && i < count && from + i < t->high; offset++, i++)
            where[i] = base + offset * op->n[10] * dtype_size(op->out_dtype);
    }
}

#ifdef __AVX512F__
INLINE void transpose(v16i v[16]) {
    __m512i a[16], b[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32((__m512i)v[2 * i], (__m512i)v[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)v[2 * i], (__m512i)v[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
            b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
        }
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            a[8 * i + j] = _mm512_shuffle_i32x4(b[8 * i + j], b[8 * i + 4 + j], 0x88);
            a[8 * i + 4 + j] = _mm512_shuffle_i32x4(b[8 * i + j], b[8 * i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        v[j] = (v16i)_mm512_shuffle_i32x4(a[j], a[8 + j], 0x88);
        v[8 + j] = (v16i)_mm512_shuffle_i32x4(a[j], a[8 + j], 0xdd);
    }
}
#else
INLINE void transpose(v16i v[16]) {
    v16i out[16];
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) out[j][i] = v[i][j];
    memcpy(v, out, sizeof out);
}
#endif

/* Ask for rows first .. first + 15, `offset` bytes behind where the keys lie. Rows of one head are short and far apart in the
 * cache: the processor's own prefetcher does not follow them. */
INLINE void fetch_rows(const char **where, int64_t first, int64_t count, int64_t offset, int64_t bytes) {
    for (int64_t i = first; i < first + 16 && i < count; i++) {
        if (!where[i]) continue;
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(where[i] + offset + b, 0, 2);
    }
}

/* Keys [count][head_dim] to panels of 64 positions: [words][width] of 32-bit words (a pair of bf16 or one float). */
INLINE void pack_keys(const char **where, int64_t value_bytes, int64_t count, int64_t d, int dtype, char *out) {
    int64_t words = dtype == BRIM_BF16 ? d / 2 : d;
    fetch_rows(where, 0, count, 0, d * dtype_size(dtype));
    fetch_rows(where, 16, count, 0, d * dtype_size(dtype));
    for (int64_t i = 0; i < count; i += 16) {
        fetch_rows(where, i + 32, count, 0, d * dtype_size(dtype));
        fetch_rows(where, i, count, value_bytes, d * dtype_size(dtype));
        int64_t panel = i / PANEL * PANEL, left = (count - panel + 15) / 16 * 16, width = left < PANEL ? left : PANEL;
        int32_t *base = (int32_t *)out + panel * words + (i - panel);
        for (int64_t w = 0; w < words; w += 16) {
            int64_t n = words - w < 16 ? words - w : 16;
            v16i v[16];
            for (int64_t j = 0; j < 16; j++) {
                const char *k = i + j < count ? where[i + j] : NULL;
                v[j] = splati(0);
                if (!k) continue;
                if (dtype == BRIM_F16)
                    v[j] = (v16i)load_f16((const uint16_t *)k + w);
                else if (n == 16)
                    memcpy(&v[j], k + w * 4, 64);
                else
                    memcpy(&v[j], k + w * 4, 32); /* head_dim is a multiple of 16: half a vector is all there can be */
            }
            transpose(v);
            for (int64_t j = 0; j < n; j++) memcpy(base + (w + j) * width, &v[j], 64);
        }
    }
}

INLINE v16u widen(const uint16_t *p) {
    v16h h = {0};
    if (p) memcpy(&h, p, 32);
    return __builtin_convertvector(h, v16u);
}

/* Values [count][head_dim] to panels of 64 dimensions: pairs of positions for bf16, else [count][width] floats. */
INLINE void pack_values(const char **where, int64_t value_bytes, int64_t count, int64_t d, int dtype, char *out) {
    int64_t step = dtype == BRIM_BF16 ? 2 : 1, depth = (count + step - 1) / step;
    for (int64_t i = 0; i < depth; i++) {
        const char *v0 = where[i * step] ? where[i * step] + value_bytes : NULL;
        const char *v1 = step == 2 && i * 2 + 1 < count && where[i * 2 + 1] ? where[i * 2 + 1] + value_bytes : NULL;
        for (int64_t x = 0; x < d; x += 16) {
            int64_t panel = x / PANEL * PANEL, width = d - panel < PANEL ? d - panel : PANEL;
            char *to = out + (panel * depth + i * width + (x - panel)) * 4;
            if (dtype == BRIM_BF16) {
                v16u pair = widen(v0 ? (const uint16_t *)v0 + x : NULL) | widen(v1 ? (const uint16_t *)v1 + x : NULL) << 16;
                memcpy(to, &pair, 64);
            } else {
                storef((float *)to, v0 ? load16(dtype, v0, x) : splat(0.0f));
            }
        }
    }
}

/* out [rows][ldo] = x [rows][ldx] times panels of packed columns. */
static void multiply(int dtype, const void *x, int64_t ldx, int64_t rows, const char *panels, int64_t columns, int64_t depth,
                     float *out, int64_t ldo) {
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t c = 0; c < columns; c += PANEL) {
        int64_t groups = (columns - c + 15) / 16 < 4 ? (columns - c + 15) / 16 : 4;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
            brim_tile tile = {.x = at((void *)x, dtype, first * ldx),
                              .ldx = ldx,
                              .w = panels + c * packed_depth(dtype, depth) * dtype_size(dtype),
                              .depth = depth,
                              .acc = out + first * ldo + c,
                              .lda = ldo,
                              .fresh = 1};
            brim_tile_for(dtype, count, groups)(&tile);
        }
    }
}

/* Scores of one row to probabilities relative to the row's maximum; scores[i] is position from + i, visible in [low, high). */
static void soften(const brim_op *op, float *scores, int64_t count, int64_t low, int64_t high, int wide, float *max, float *sum) {
    v16f best = splat(-INFINITY), total = splat(0.0f), scale = splat(op->f[0]);
    float cap = op->f[1];
    for (int64_t i = 0; i < count; i += 16) {
        v16f s = loadf(scores + i) * scale;
        if (cap > 0.0f) s = splat(cap) * tanh16(s * splat(1.0f / cap));
        if (i < low || i + 16 > high) {
            v16i lane = lanes() + splati((int32_t)i);
            s = choose((lane >= splati((int32_t)low)) & (lane < splati((int32_t)high)), s, splat(-INFINITY));
        }
        best = max16(best, s);
        storef(scores + i, s);
    }
    *max = hmax(best);
    v16f reference = splat(low < high ? *max : 0.0f);
    for (int64_t i = 0; i < count; i += 16) {
        v16f p = exp16(loadf(scores + i) - reference);
        total = total + p;
        if (wide == BRIM_BF16)
            store_bf16((uint16_t *)scores + i, p);
        else
            storef(scores + i, p);
    }
    *sum = hsum(total);
}

void brim_chunk(const brim_rows_task *t, int64_t chunk, brim_partial *part) {
    const brim_op *op = t->op;
    const char *where[CHUNK];
    int64_t d = op->n[3], from = chunk * CHUNK, to = from + CHUNK < t->high ? from + CHUNK : t->high;
    int wide = product_dtype(op->out_dtype);
    if (t->low > from) from += (t->low - from) / PANEL * PANEL;
    int64_t count = to - from, padded = (count + 15) / 16 * 16;
    int64_t value_bytes = op->n[9] * dtype_size(op->out_dtype);
    locate(t, from, count, where);
    if (op->out_dtype == BRIM_BF16)
        pack_keys(where, value_bytes, count, d, BRIM_BF16, t->keys);
    else
        pack_keys(where, value_bytes, count, d, op->out_dtype == BRIM_F16 ? BRIM_F16 : BRIM_F32, t->keys);
    multiply(wide, t->queries, d, t->rows, t->keys, padded, d, t->scores, CHUNK);
    for (int64_t r = 0; r < t->rows; r++) {
        int64_t position = t->position + row_token(t, r), low = op->n[7] ? position - op->n[7] + 1 : 0;
        int64_t high = position + 1 - from < count ? position + 1 - from : count;
        soften(op, t->scores + r * CHUNK, padded, low > from ? low - from : 0, high, wide, part->max + r, part->sum + r);
    }
    if (op->out_dtype == BRIM_BF16)
        pack_values(where, value_bytes, count, d, BRIM_BF16, t->values);
    else
        pack_values(where, value_bytes, count, d, op->out_dtype == BRIM_F16 ? BRIM_F16 : BRIM_F32, t->values);
    multiply(wide, t->scores, wide == BRIM_BF16 ? 2 * CHUNK : CHUNK, t->rows, t->values, d, packed_depth(wide, count), part->acc, d);
}

void brim_clear(const brim_rows_task *t, brim_partial *total) {
    for (int64_t r = 0; r < t->rows; r++) total->max[r] = -INFINITY, total->sum[r] = 0.0f;
    memset(total->acc, 0, (size_t)(t->rows * t->op->n[3] * 4));
}

void brim_fold(const brim_rows_task *t, brim_partial *total, const brim_partial *part) {
    int64_t d = t->op->n[3];
    for (int64_t r = 0; r < t->rows; r++) {
        if (part->max[r] == -INFINITY) continue; /* nothing of this chunk is visible to the row */
        float max = total->max[r] > part->max[r] ? total->max[r] : part->max[r];
        v16f old = exp16(splat(total->max[r] - max)), new = exp16(splat(part->max[r] - max));
        total->max[r] = max;
        total->sum[r] = total->sum[r] * old[0] + part->sum[r] * new[0];
        float *acc = total->acc + r * d;
        const float *add = part->acc + r * d;
        for (int64_t i = 0; i < d; i += 16) storef(acc + i, FMA16(loadf(acc + i), old, loadf(add + i) * new));
    }
}

void brim_write_rows(const brim_rows_task *t, const brim_partial *total) {
    const brim_op *op = t->op;
    int64_t d = op->n[3];
    for (int64_t r = 0; r < t->rows; r++) {
        char *out = at(op->p[5], op->dtype, (t->token0 + row_token(t, r)) * op->n[6] + row_head(t, r) * d);
        v16f inverse = splat(total->sum[r] > 0.0f ? 1.0f / total->sum[r] : 0.0f);
        for (int64_t i = 0; i < d; i += 16) store16(op->dtype, out, i, loadf(total->acc + r * d + i) * inverse);
    }
}
