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

/* Histogram of the values whose bits lie in [low, high], by the digit of this round. Most vectors hold none: a compare passes
 * them by. */
static void tally(const float *p, int64_t n, uint32_t low, uint32_t high, int round, brim_histogram *h) {
    memset(h, 0, sizeof *h);
    int64_t i = 0;
    v16i lo = splati((int32_t)low), hi = splati((int32_t)high);
    for (; i + 16 <= n; i += 16) {
        v16i key = (v16i)loadf(p + i);
        uint32_t bits = mask_bits((key >= lo) & (key <= hi));
        for (; bits; bits &= bits - 1) {
            float x = p[i + __builtin_ctz(bits)];
            uint32_t digit = key_of(x) >> shifts[round] & masks[round];
            h->count[digit]++;
            h->sum[digit] += (double)x;
        }
    }
    for (; i < n; i++) {
        uint32_t key = key_of(p[i]);
        if (key < low || key > high) continue;
        h->count[key >> shifts[round] & masks[round]]++;
        h->sum[key >> shifts[round] & masks[round]] += (double)p[i];
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

static float find(const float *p, int64_t n, uint32_t floor, int by_count, double wanted, brim_histogram *h) {
    const uint32_t most = 0x3f8fffffu; /* above 1 */
    const uint32_t likely = 0x37800000u; /* 2^-16: usually everything wanted lies above */
    double left = wanted;
    uint32_t prefix = 0, from = floor > likely ? floor : likely;
    tally(p, n, from, most, 0, h);
    if (!narrow(h, 0, by_count, &left, &prefix)) {
        if (from == floor) return value_of(floor);
        left = wanted;
        tally(p, n, floor, most, 0, h);
        if (!narrow(h, 0, by_count, &left, &prefix)) return value_of(floor);
    }
    for (int round = 1; round < 3; round++) {
        uint32_t low = prefix > floor ? prefix : floor;
        uint32_t digit = prefix;
        tally(p, n, low, top_bits(prefix, round - 1), round, h);
        if (!narrow(h, round, by_count, &left, &digit)) { /* rounding of sums only: the smallest value there is */
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

float brim_kth_largest(const float *p, int64_t n, int64_t k, brim_histogram *h) { return find(p, n, 0, 1, (double)k, h); }

float brim_nucleus(const float *p, int64_t n, float floor, double needed, brim_histogram *h) {
    return find(p, n, key_of(floor), 0, needed, h);
}
