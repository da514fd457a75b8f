/* Kernels over rows of logits: argmax, sampling, log-probabilities and penalties. */
#include "sample.h"

#include <math.h>

enum { SLICE = 8192, MOST_PARTS = 4096, SUM_BLOCK = 256, MOST_BLOCKS = 16384, BITMAP_IDS = 1 << 20 };

int64_t brim_sample_scratch(void) { return (int64_t)sizeof(brim_histogram) + MOST_BLOCKS * 4 + BITMAP_IDS / 8; }
int64_t brim_sample_shared(void) { return MOST_PARTS * 16; }

typedef struct {
    float value;
    int64_t id;
} best;

/* The largest of row[first .. last) and the lowest id that has it. NaN never wins. */
static best largest(const float *row, int64_t first, int64_t last) {
    v16f top[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
    int64_t i = first;
    best b = {-INFINITY, first};
    for (; i + 64 <= last; i += 64)
        for (int j = 0; j < 4; j++) top[j] = max16(loadf(row + i + j * 16), top[j]);
    b.value = hmax(max16(max16(top[0], top[1]), max16(top[2], top[3])));
    for (; i < last; i++) b.value = row[i] > b.value ? row[i] : b.value;
    for (i = first; i < last; i += 64) { /* find it: whole blocks are passed by with one test */
        int64_t n = last - i < 64 ? last - i : 64;
        int found = 0;
        for (int64_t j = 0; j < n; j++) found |= row[i + j] == b.value;
        if (!found) continue;
        while (row[i] != b.value) i++;
        b.id = i;
        break;
    }
    return b;
}

/* p: logits, -, out ids int64; n: rows, vocabulary, row stride. */
void brim_argmax(const brim_op *op, brim_thread *self) {
    int64_t rows = op->n[0], vocab = op->n[1], *out = op->p[2];
    int64_t parts = rows < 2 * self->count ? (vocab + SLICE - 1) / SLICE : 1;
    if (rows * parts > MOST_PARTS) parts = 1;
    best *found = (best *)self->shared;
    for (int64_t t = brim_ticket(self); t < rows * parts; t = brim_ticket(self)) {
        int64_t part = t % parts;
        best b = largest((const float *)op->p[0] + t / parts * op->n[2], vocab * part / parts, vocab * (part + 1) / parts);
        if (parts > 1)
            found[t] = b;
        else
            out[t] = b.id;
    }
    if (parts == 1) return;
    brim_barrier(self);
    if (self->id) return;
    for (int64_t row = 0; row < rows; row++) {
        best b = found[row * parts];
        for (int64_t part = 1; part < parts; part++)
            if (found[row * parts + part].value > b.value) b = found[row * parts + part];
        out[row] = b.id;
    }
}

static uint64_t splitmix64(uint64_t state) {
    uint64_t z = state + 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

/* p = exp((p - max) / temperature), with the largest of each block; returns the sum. */
static double to_weights(brim_weights *w, float max, float temperature) {
    double total = 0.0;
    v16f inverse = splat(1.0f / temperature), top = splat(max);
    for (int64_t first = 0, b = 0; first < w->n; first += w->block, b++) {
        v16f sum = splat(0.0f), most = splat(0.0f);
        int64_t i = first, end = brim_block_end(w, first);
        for (; i + 16 <= end; i += 16) {
            v16f x = exp16((loadf(w->p + i) - top) * inverse);
            storef(w->p + i, x);
            sum = sum + x;
            most = max16(most, x);
        }
        if (i < end) {
            v16f x = exp16((load_part(BRIM_F32, w->p, i, end - i) - top) * inverse);
            x = choose(lanes() < splati((int32_t)(end - i)), x, splat(0.0f));
            store_part(BRIM_F32, w->p, i, end - i, x);
            sum = sum + x;
            most = max16(most, x);
        }
        w->largest[b] = hmax(most);
        total += (double)hsum(sum);
    }
    return total;
}

/* Sum of the weights >= threshold in the block at `first`. */
static double block_sum(const brim_weights *w, int64_t first, float threshold) {
    v16f sum = splat(0.0f), limit = splat(threshold);
    int64_t end = brim_block_end(w, first);
    if (w->largest[first / w->block] < threshold) return 0.0;
    for (int64_t i = first; i < end; i += 16) {
        v16f x = load_upto(BRIM_F32, w->p, i, end - i);
        sum = sum + choose(x >= limit, x, splat(0.0f));
    }
    return (double)hsum(sum);
}
static double sum_from(const brim_weights *w, float threshold) {
    double total = 0.0;
    for (int64_t i = 0; i < w->n; i += w->block) total += block_sum(w, i, threshold);
    return total;
}

/* The first id in the block at `first` at which the running sum passes target, else the last kept id there. */
static int64_t invert_block(const brim_weights *w, int64_t first, float threshold, double running, double target) {
    int64_t last = first;
    for (int64_t i = first, end = brim_block_end(w, first); i < end; i++) {
        if (w->p[i] < threshold || w->p[i] <= 0.0f) continue;
        running += (double)w->p[i];
        last = i;
        if (running > target) break;
    }
    return last;
}

static int64_t invert(const brim_weights *w, float threshold, double target) {
    double total = 0.0;
    int64_t last = 0;
    for (int64_t i = 0; i < w->n; i += w->block) {
        double here = block_sum(w, i, threshold);
        if (here <= 0.0) continue;
        last = i;
        if (total + here > target) break;
        total += here;
    }
    return invert_block(w, last, threshold, total, target);
}

static int64_t draw(const brim_op *op, float *row, int64_t r, char *scratch) {
    float temperature = ((const float *)op->p[1])[r], top_p = ((const float *)op->p[4])[r], min_p = ((const float *)op->p[5])[r];
    int64_t vocab = op->n[1], top_k = ((const int32_t *)op->p[3])[r];
    best b = largest(row, 0, vocab);
    if (!(temperature > 0.0f)) return b.id;
    brim_histogram *h = (brim_histogram *)scratch;
    int64_t block = (vocab + MOST_BLOCKS - 1) / MOST_BLOCKS;
    brim_weights w = {row, vocab, block < SUM_BLOCK ? SUM_BLOCK : (block + 15) / 16 * 16, (float *)(h + 1)};
    double mass = to_weights(&w, b.value, temperature);
    float threshold = 0.0f;
    if (top_k > 0 && top_k < vocab) {
        threshold = brim_kth_largest(&w, top_k, h);
        mass = sum_from(&w, threshold);
    }
    if (top_p < 1.0f) {
        float nucleus = brim_nucleus(&w, threshold, (double)top_p * mass, h);
        threshold = nucleus > threshold ? nucleus : threshold;
    }
    threshold = min_p > threshold ? min_p : threshold;
    if (threshold > 0.0f) mass = sum_from(&w, threshold);
    uint64_t seed = (uint64_t)((const int64_t *)op->p[6])[r], position = (uint64_t)((const int64_t *)op->p[7])[r];
    float uniform = (float)(splitmix64(splitmix64(seed) + position) >> 40) * 0x1p-24f;
    return invert(&w, threshold, (double)uniform * mass);
}

/* p: logits, temperature f32, out ids int64, top_k int32, top_p f32, min_p f32, seed int64, position int64;
 * n: rows, vocabulary, row stride. */
void brim_sample(const brim_op *op, brim_thread *self) {
    int64_t *out = op->p[2];
    for (int64_t r = brim_ticket(self); r < op->n[0]; r = brim_ticket(self))
        out[r] = draw(op, (float *)op->p[0] + r * op->n[2], r, self->scratch);
}

/* Keep the `width` best of the row in ids and values, best first, equal values by id. */
static void keep_best(const float *row, int64_t vocab, int64_t *ids, float *values, int64_t width) {
    int64_t held = 0;
    for (int64_t i = 0; i < vocab; i += 16) {
        int64_t n = vocab - i < 16 ? vocab - i : 16;
        if (held == width && n == 16 && !mask_bits(loadf(row + i) > splat(values[width - 1]))) continue;
        for (int64_t j = i; j < i + n; j++) {
            if (held == width && !(row[j] > values[width - 1])) continue;
            int64_t to = held < width ? held++ : width - 1;
            for (; to > 0 && values[to - 1] < row[j]; to--) values[to] = values[to - 1], ids[to] = ids[to - 1];
            values[to] = row[j], ids[to] = j;
        }
    }
}

/* p: logits, chosen int64, out chosen f32, out rank int64, out ids int64, out values f32;
 * n: rows, vocabulary, row stride, width, row strides of out ids and out values. */
void brim_top_logprobs(const brim_op *op, brim_thread *self) {
    int64_t vocab = op->n[1], width = op->n[3] < vocab ? op->n[3] : vocab;
    for (int64_t r = brim_ticket(self); r < op->n[0]; r = brim_ticket(self)) {
        const float *row = (const float *)op->p[0] + r * op->n[2];
        float max = largest(row, 0, vocab).value, chosen = row[((const int64_t *)op->p[1])[r]];
        double total = 0.0;
        int64_t rank = 1;
        for (int64_t i = 0; i < vocab; i += SUM_BLOCK) {
            int64_t n = vocab - i < SUM_BLOCK ? vocab - i : SUM_BLOCK;
            v16f sum = splat(0.0f);
            v16i above = splati(0);
            for (int64_t j = 0; j < n; j += 16) {
                v16f x = load_upto(BRIM_F32, row + i, j, n - j), w = exp16(x - splat(max));
                v16i valid = lanes() < splati((int32_t)(n - j < 16 ? n - j : 16));
                sum = sum + choose(valid, w, splat(0.0f));
                above = above - ((x > splat(chosen)) & valid);
            }
            total += (double)hsum(sum);
            for (int j = 0; j < 16; j++) rank += above[j];
        }
        float norm = max + (float)log(total), *values = (float *)op->p[5] + r * op->n[5];
        ((float *)op->p[2])[r] = chosen - norm;
        ((int64_t *)op->p[3])[r] = rank;
        if (width > 0) keep_best(row, vocab, (int64_t *)op->p[4] + r * op->n[4], values, width);
        for (int64_t i = 0; i < width; i++) values[i] -= norm;
    }
}

/* Applies to ids of one range: each id not yet marked gets `first` once. */
static void mark_ids(const int64_t *ids, int64_t count, int64_t low, uint8_t *seen, float *row, int presence, float value) {
    for (int64_t i = 0; i < count; i++) {
        int64_t id = ids[i] - low;
        if (id < 0 || id >= BITMAP_IDS || seen[id >> 3] >> (id & 7) & 1) continue;
        seen[id >> 3] |= (uint8_t)(1u << (id & 7));
        float x = row[ids[i]];
        row[ids[i]] = presence ? x - value : x > 0.0f ? x / value : x * value;
    }
}
static void unmark_ids(const int64_t *ids, int64_t count, int64_t low, uint8_t *seen) {
    for (int64_t i = 0; i < count; i++)
        if (ids[i] >= low && ids[i] < low + BITMAP_IDS) seen[(ids[i] - low) >> 3] = 0;
}

/* p: logits row, prompt ids int64, output ids int64; n: vocabulary, prompt count, output count;
 * f: repetition, presence, frequency. One thread: a row's penalties take microseconds. */
void brim_penalize(const brim_op *op, brim_thread *self) {
    float *row = op->p[0];
    const int64_t *prompt = op->p[1], *output = op->p[2];
    uint8_t *seen = (uint8_t *)self->scratch;
    if (self->id) return;
    for (int64_t low = 0; low < op->n[0]; low += BITMAP_IDS) {
        int64_t range = op->n[0] - low < BITMAP_IDS ? op->n[0] - low : BITMAP_IDS;
        memset(seen, 0, (size_t)(range + 7) / 8);
        if (op->f[0] != 1.0f) {
            mark_ids(prompt, op->n[1], low, seen, row, 0, op->f[0]);
            mark_ids(output, op->n[2], low, seen, row, 0, op->f[0]);
            unmark_ids(prompt, op->n[1], low, seen);
            unmark_ids(output, op->n[2], low, seen);
        }
        mark_ids(output, op->n[2], low, seen, row, 1, op->f[1]);
    }
    if (op->f[2] != 0.0f)
        for (int64_t i = 0; i < op->n[2]; i++) row[output[i]] -= op->f[2];
}
