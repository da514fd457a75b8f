/* Thresholds found by radix selection: no sort, no memory beyond one histogram. Positive floats order as their bits do. */
#include "sample.h"

static const int shifts[3] = {21, 10, 0};
static const uint32_t masks[3] = {2047, 2047, 1023};

INLINE uint32_t key_of(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}
INLINE float value_of(uint32_t key) {
    float x;
    memcpy(&x, &key, 4);
    return x;
}

static void count_one(brim_histogram *h, float x, int round) {
    uint32_t digit = key_of(x) >> shifts[round] & masks[round];
    h->count[digit]++;
    h->sum[digit] += (double)x;
}

/* Histogram of the values whose bits lie in [low, high], by the digit of this round. */
static void tally(const brim_weights *w, uint32_t low, uint32_t high, int round, brim_histogram *h) {
    v16i lo = splati((int32_t)low), hi = splati((int32_t)high);
    memset(h, 0, sizeof *h);
    for (int64_t first = 0, b = 0; first < w->n; first += w->block, b++) {
        if (key_of(w->largest[b]) < low) continue;
        int64_t i = first, end = brim_block_end(w, first);
        for (; i + 16 <= end; i += 16) {
            v16i key = (v16i)loadf(w->p + i);
            for (uint32_t bits = mask_bits((key >= lo) & (key <= hi)); bits; bits &= bits - 1)
                count_one(h, w->p[i + __builtin_ctz(bits)], round);
        }
        for (; i < end; i++)
            if (key_of(w->p[i]) >= low && key_of(w->p[i]) <= high) count_one(h, w->p[i], round);
    }
}

/* Walk digits from the largest until `wanted` (a count or a mass) is reached; narrows [*low, *high] to that digit. */
static int narrow(const brim_histogram *h, int round, int by_count, double *wanted, uint32_t *prefix) {
    for (int64_t digit = (int64_t)masks[round]; digit >= 0; digit--) {
        if (!h->count[digit]) continue;
        double here = by_count ? (double)h->count[digit] : h->sum[digit];
        if (here >= *wanted) {
            *prefix |= (uint32_t)digit << shifts[round];
            return 1;
        }
        *wanted -= here;
    }
    return 0;
}

static uint32_t top_bits(uint32_t prefix, int round) { return prefix | ((round == 2 ? 0u : (1u << shifts[round]) - 1u)); }

/* Powers of two that cut [0, 1] so that the cut holding the threshold has few values; keys of 2^-2, -4, -6, -8, -11, -16. */
enum { LEVELS = 6 };
static const uint32_t levels[LEVELS] = {0x3e800000u, 0x3d800000u, 0x3c800000u, 0x3b800000u, 0x3a000000u, 0x37800000u};

/* How many values, or which mass, lie at or above each level. */
static void measure(const brim_weights *w, int by_count, double above[LEVELS]) {
    for (int l = 0; l < LEVELS; l++) above[l] = 0.0;
    for (int64_t first = 0, b = 0; first < w->n; first += w->block, b++) {
        v16f sum[LEVELS];
        int reached = LEVELS; /* levels the block's largest reaches: the last ones, from `reached` on */
        while (reached > 0 && key_of(w->largest[b]) >= levels[reached - 1]) reached--;
        if (reached == LEVELS) continue;
        for (int l = 0; l < LEVELS; l++) sum[l] = splat(0.0f);
        for (int64_t i = first, end = brim_block_end(w, first); i < end; i += 16) {
            v16f x = load_upto(BRIM_F32, w->p, i, end - i), add = by_count ? splat(1.0f) : x;
            for (int l = 0; l < LEVELS; l++) sum[l] = sum[l] + choose(x >= splat(value_of(levels[l])), add, splat(0.0f));
        }
        for (int l = reached; l < LEVELS; l++) above[l] += (double)hsum(sum[l]);
    }
}

static float find(const brim_weights *w, uint32_t floor, int by_count, double wanted, brim_histogram *h) {
    const uint32_t most = 0x3f8fffffu; /* above 1 */
    double left = wanted, above[LEVELS];
    uint32_t prefix = 0, low = floor, high = most;
    measure(w, by_count, above);
    for (int l = 0; l < LEVELS; l++) {
        if (levels[l] < floor) break;
        if (above[l] >= wanted) {
            low = levels[l];
            break;
        }
        high = levels[l] - 1;
        left = wanted - above[l];
    }
    tally(w, low, high, 0, h);
    if (!narrow(h, 0, by_count, &left, &prefix)) {
        left = wanted; /* two ways to add up the same mass may differ by rounding */
        tally(w, floor, most, 0, h);
        if (!narrow(h, 0, by_count, &left, &prefix)) return value_of(floor);
    }
    for (int round = 1; round < 3; round++) {
        uint32_t from = prefix > floor ? prefix : floor, digit = prefix;
        tally(w, from, top_bits(prefix, round - 1), round, h);
        if (!narrow(h, round, by_count, &left, &digit)) { /* rounding again: the smallest value there is */
            for (uint32_t d = 0; d <= masks[round]; d++)
                if (h->count[d]) {
                    digit = prefix | d << shifts[round];
                    break;
                }
        }
        prefix = digit;
    }
    return value_of(prefix);
}

float brim_kth_largest(const brim_weights *w, int64_t k, brim_histogram *h) { return find(w, 0, 1, (double)k, h); }

float brim_nucleus(const brim_weights *w, float floor, double needed, brim_histogram *h) {
    return find(w, key_of(floor), 0, needed, h);
}
