/* Storing GGUF blocks in panels, and reading them back as bytes and scales. */
#include "blocks.h"

static const brim_form forms[] = {
    {.ggml_type = 2, .bytes = 18, .header = 2, .subs = 1, .bits = 4, .extra = 0, .offset = 8, .scales = SCALE_F16},
    {.ggml_type = 3, .bytes = 20, .header = 4, .subs = 1, .bits = 4, .extra = 0, .offset = 0, .scales = SCALE_LEAST},
    {.ggml_type = 6, .bytes = 22, .header = 2, .subs = 1, .bits = 4, .extra = 1, .offset = 16, .scales = SCALE_F16},
    {.ggml_type = 7, .bytes = 24, .header = 4, .subs = 1, .bits = 4, .extra = 1, .offset = 0, .scales = SCALE_LEAST},
    {.ggml_type = 8, .bytes = 34, .header = 2, .subs = 1, .bits = 8, .extra = 0, .offset = 128, .scales = SCALE_F16},
    {.ggml_type = 12, .bytes = 144, .header = 16, .subs = 8, .bits = 4, .extra = 0, .offset = 0, .scales = SCALE_NESTED},
    {.ggml_type = 13, .bytes = 176, .header = 16, .subs = 8, .bits = 4, .extra = 1, .offset = 0, .scales = SCALE_NESTED},
    {.ggml_type = 14, .bytes = 210, .header = 18, .subs = 8, .bits = 4, .extra = 2, .offset = 32, .scales = SCALE_HALVES},
};

const brim_form *brim_form_of(int ggml_type) {
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        if (forms[i].ggml_type == ggml_type) return &forms[i];
    return NULL;
}

enum { LOW = 0x0f0f0f0f, ONES = 0x01010101, TWOS = 0x03030303 };

static uint32_t word_at(const uint8_t *p) {
    uint32_t w;
    memcpy(&w, p, 4);
    return w;
}

/* The quads of one sub-block of a block as GGUF stores it: four bits (or eight) in low, the bits above in high. */
static void split(const brim_form *form, const uint8_t *b, int sub, uint32_t low[8], uint32_t high[8]) {
    const uint8_t *q = b + form->header;
    if (form->scales == SCALE_HALVES) { /* lower halves, upper bits, scales, d; a part of 128 elements shares its bytes */
        int shift = sub % 4;
        for (int i = 0; i < 8; i++) {
            low[i] = word_at(b + sub / 4 * 64 + sub % 2 * 32 + i * 4) >> (shift / 2 * 4) & LOW;
            high[i] = word_at(b + 128 + sub / 4 * 32 + i * 4) >> (shift * 2) & TWOS;
        }
    } else if (form->scales == SCALE_NESTED) { /* 32 bytes are two sub-blocks; the fifth bits come first */
        for (int i = 0; i < 8; i++) {
            low[i] = word_at(q + form->extra * 32 + sub / 2 * 32 + i * 4) >> (sub % 2 * 4) & LOW;
            high[i] = form->extra ? word_at(q + i * 4) >> sub & ONES : 0;
        }
    } else if (form->bits == 8) {
        for (int i = 0; i < 8; i++) low[i] = word_at(q + i * 4) ^ 0x80808080u;
    } else {
        uint32_t fifth = form->extra ? word_at(q) : 0;
        for (int i = 0; i < 4; i++) {
            uint32_t both = word_at(q + form->extra * 4 + i * 4);
            low[i] = both & LOW;
            low[i + 4] = both >> 4 & LOW;
        }
        for (int i = 0; i < 8; i++) high[i] = (fifth >> (4 * i) & 15) * 0x00204081u & ONES;
    }
}

/* One block of one row into its lane. */
static void store_block(const brim_form *form, const uint8_t *b, char *out, int64_t width, int64_t lane) {
    const uint8_t *d = b, *scales = b + 4;
    int64_t fields = form->header - 2, to = 2 * width;
    if (form->scales == SCALE_HALVES) d = b + 208, scales = b + 192;
    memcpy(out + 2 * lane, d, 2);
    if (form->scales == SCALE_LEAST || form->scales == SCALE_NESTED) {
        memcpy(out + to + 2 * lane, b + 2, 2);
        to += 2 * width, fields -= 2;
    }
    for (int64_t i = 0; i < fields; i++) out[to + i * width + lane] = (char)scales[i];
    uint32_t *word = (uint32_t *)(out + form->header * width) + lane, low[8], high[8];
    for (int sub = 0; sub < form->subs; sub++) {
        split(form, b, sub, low, high);
        if (form->extra) {
            int quads = form->extra == 1 ? 8 : 4; /* to a word */
            for (int first = 0; first < 8; first += quads, word += width) {
                uint32_t bits = 0;
                for (int i = 0; i < quads; i++) bits |= high[first + i] << (i * form->extra);
                *word = bits;
            }
        }
        if (form->bits == 8)
            for (int i = 0; i < 8; i++, word += width) *word = low[i];
        else
            for (int i = 0; i < 4; i++, word += width) *word = low[i] | low[i + 4] << 4;
    }
}

/* Panels are stored one a ticket: no two threads share a line.
 * p: rows of blocks, packed weight; flags: ggml type; n: first row, count, in_features, bytes from row to row, out_features. */
void brim_pack_blocks(const brim_op *op, brim_thread *self) {
    const brim_form *form = brim_form_of(op->flags);
    int64_t first = op->n[0], last = first + op->n[1], depth = op->n[2];
    if (!form || op->n[1] <= 0) return;
    for (;;) {
        int64_t panel = first / PANEL + brim_ticket(self);
        if (panel * PANEL >= last) return;
        int64_t lane0 = first > panel * PANEL ? first - panel * PANEL : 0;
        int64_t lane1 = last < (panel + 1) * PANEL ? last - panel * PANEL : PANEL;
        int64_t width = groups_of(op->n[4], panel) * 16;
        char *base = (char *)op->p[1] + panel * block_bytes_of(form, PANEL, depth);
        for (int64_t block = 0; block < depth / (32 * form->subs); block++)
            for (int64_t lane = lane0; lane < lane1; lane++) {
                const uint8_t *row = (const uint8_t *)op->p[0] + (panel * PANEL + lane - first) * op->n[3];
                store_block(form, row + block * form->bytes, base + block * form->bytes * width, width, lane);
            }
    }
}

INLINE v16u load_words(const char *p) {
    v16u v;
    memcpy(&v, p, 64);
    return v;
}

/* Elements of one sub-block of 16 lanes; bits and extra are constants at every call. */
INLINE void read_words(int extra, const char *p, int64_t line, uint32_t *out, int64_t step) {
    v16u high[2];
    for (int i = 0; i < extra; i++, p += line) high[i] = load_words(p);
    for (int q = 0; q < 8; q++) {
        v16u word = load_words(p + q % 4 * line);
        v16u v = (q < 4 ? word : word >> 4) & (uint32_t)LOW;
        if (extra == 1) v |= (q <= 4 ? high[0] << (4 - q) : high[0] >> (q - 4)) & 0x10101010u;
        if (extra == 2) v |= (q % 4 <= 2 ? high[q / 4] << (4 - 2 * (q % 4)) : high[q / 4] >> 2) & 0x30303030u;
        memcpy(out + q * step, &v, 64);
    }
}

static void read_elements(const brim_form *form, const char *p, int64_t line, int64_t groups, uint32_t *out) {
    for (int64_t g = 0; g < groups; g++, p += 64, out += 16) {
        if (form->extra == 0)
            read_words(0, p, line, out, groups * 16);
        else if (form->extra == 1)
            read_words(1, p, line, out, groups * 16);
        else
            read_words(2, p, line, out, groups * 16);
    }
}

INLINE v16i bytes_at(const char *p, int sign) {
#ifdef __AVX512F__
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return (v16i)(sign ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
    v16i v;
    for (int i = 0; i < 16; i++) v[i] = sign ? (int8_t)p[i] : (uint8_t)p[i];
    return v;
#endif
}

/* Scales and leasts of one sub-block of 16 lanes, rounded as dequantising rounds them. */
static void read_scales(
    const brim_form *form, const char *block, int64_t width, int64_t lane, int sub, float *scale, int64_t half, float *least) {
    v16f d = load_f16((const uint16_t *)(block + 2 * lane));
    const char *second = block + 2 * width + 2 * lane;
    if (form->scales == SCALE_F16) {
        storef(scale, d);
    } else if (form->scales == SCALE_LEAST) {
        storef(scale, d);
        storef(least, load_f16((const uint16_t *)second));
    } else if (form->scales == SCALE_HALVES) {
        const char *s = block + 2 * width + lane;
        storef(scale, d * __builtin_convertvector(bytes_at(s + 2 * sub * width, 1), v16f));
        storef(scale + half, d * __builtin_convertvector(bytes_at(s + (2 * sub + 1) * width, 1), v16f));
    } else {
        const char *s = block + 4 * width + lane;
        v16i low = bytes_at(s + sub % 4 * width, 0), high = bytes_at(s + (sub % 4 + 4) * width, 0), sc = low & 63, mn = high & 63;
        if (sub >= 4) {
            v16i rest = bytes_at(s + (sub + 4) * width, 0);
            sc = (rest & 15) | (low >> 6) << 4;
            mn = rest >> 4 | (high >> 6) << 4;
        }
        storef(scale, d * __builtin_convertvector(sc, v16f));
        storef(least, -(load_f16((const uint16_t *)second) * __builtin_convertvector(mn, v16f)));
    }
}

brim_slice brim_read_slice(
    const brim_form *form, const char *panel, int64_t width, int64_t group, int64_t groups, int64_t sub, int64_t subs,
    brim_slice_room *room) {
    int64_t lanes = groups * 16, sub_bytes = sub_bytes_of(form) * width, per_sub = form->scales == SCALE_HALVES ? 2 : 1;
    brim_slice chunk = {(const char *)room->words, 32 * lanes, 4 * lanes, room->scale, NULL};
    if (form->scales == SCALE_LEAST || form->scales == SCALE_NESTED) chunk.least = room->least;
    for (int64_t i = 0; i < subs; i++) {
        const char *block = panel + (sub + i) / form->subs * form->bytes * width;
        int in_block = (int)((sub + i) % form->subs);
        for (int64_t g = 0; g < groups; g++)
            read_scales(
                form, block, width, (group + g) * 16, in_block, room->scale + i * per_sub * lanes + g * 16, lanes,
                room->least + i * lanes + g * 16);
        const char *elements = block + form->header * width + in_block * sub_bytes + group * 64;
        if (form->bits == 4) {
            read_elements(form, elements, width * 4, groups, room->words + i * 8 * lanes);
        } else if (i == 0) { /* bytes as they are, where they are */
            chunk.w = elements;
            chunk.sub_stride = form->bytes * width;
            chunk.quad_stride = 4 * width;
        }
    }
    return chunk;
}
