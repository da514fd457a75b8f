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

/* Elements of one sub-block: groups of 16 lanes whose words lie `line` bytes apart, into lines of groups * 16 words.
 * extra and groups are constants at every call. */
INLINE void read_words(int extra, int64_t groups, const char *p, int64_t line, uint32_t *restrict out) {
    const char *words = p + extra * line;
    for (int64_t g = 0; g < groups; g++) {
        v16u low[4], high[2];
        for (int i = 0; i < 4; i++) low[i] = load_words(words + i * line + g * 64);
        for (int i = 0; i < extra; i++) high[i] = load_words(p + i * line + g * 64);
#pragma GCC unroll 8
        for (int q = 0; q < 8; q++) {
            v16u v = (q < 4 ? low[q % 4] : low[q % 4] >> 4) & (uint32_t)LOW;
            if (extra == 1) v |= (q <= 4 ? high[0] << (4 - q) : high[0] >> (q - 4)) & 0x10101010u;
            if (extra == 2) v |= (q % 4 <= 2 ? high[q / 4] << (4 - 2 * (q % 4)) : high[q / 4] >> 2) & 0x30303030u;
            memcpy(out + (q * groups + g) * 16, &v, 64);
        }
    }
}

INLINE v16f bytes_at(const char *p, int sign) {
#ifdef __AVX512F__
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return (v16f)_mm512_cvtepi32_ps(sign ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#else
    v16f v;
    for (int i = 0; i < 16; i++) v[i] = sign ? (int8_t)p[i] : (uint8_t)p[i];
    return v;
#endif
}

/* Six bits of scale and of least of sub-block `sub` for 16 lanes. The first four lie in the low bits of bytes 0..3 and 4..7,
 * the others in the halves of bytes 8..11 and the top bits of those before. */
INLINE void read_nested(const char *p, int64_t line, int64_t sub, char out[2][16]) {
    v16b scale, least, rest;
    memcpy(&scale, p + (sub & 3) * line, 16);
    memcpy(&least, p + ((sub & 3) + 4) * line, 16);
    if (sub < 4) {
        scale &= 63;
        least &= 63;
    } else {
        memcpy(&rest, p + (sub + 4) * line, 16);
        scale = (rest & 15) | (scale >> 6) << 4;
        least = rest >> 4 | (least >> 6) << 4;
    }
    memcpy(out[0], &scale, 16);
    memcpy(out[1], &least, 16);
}

typedef struct {
    const char *block; /* the first block of the slice */
    const char *ahead; /* memory that will be wanted next, or NULL */
    int64_t width, group, first, subs; /* sub-blocks first .. first + subs, counted from that block */
} place;

/* Scales and leasts as floats, rounded as dequantising rounds them; `scales` and groups are constants at every call. */
INLINE void read_scales(const brim_form *form, const place *at, int scales, int64_t groups, brim_slice_room *room) {
    int64_t lanes = groups * 16, width = at->width, lane = at->group * 16;
    const char *block = at->block;
    float *scale = room->scale, *least = room->least;
    for (int64_t i = 0, sub = at->first; i < at->subs; i++, scale += lanes, least += lanes) {
        for (int64_t g = 0; g < groups; g++) {
            const char *bytes = block + lane + g * 16;
            v16f d = load_f16((const uint16_t *)(block + 2 * lane) + g * 16), second = d;
            if (scales == SCALE_LEAST || scales == SCALE_NESTED)
                second = load_f16((const uint16_t *)(block + 2 * (width + lane)) + g * 16);
            if (scales == SCALE_F16) {
                storef(scale + g * 16, d);
            } else if (scales == SCALE_LEAST) {
                storef(scale + g * 16, d);
                storef(least + g * 16, second);
            } else if (scales == SCALE_HALVES) {
                storef(scale + g * 16, d * bytes_at(bytes + (2 + 2 * sub) * width, 1));
                storef(scale + g * 16 + lanes, d * bytes_at(bytes + (3 + 2 * sub) * width, 1));
            } else {
                char nested[2][16];
                read_nested(bytes + 4 * width, width, sub, nested);
                storef(scale + g * 16, d * bytes_at(nested[0], 0));
                storef(least + g * 16, -(second * bytes_at(nested[1], 0)));
            }
        }
        if (scales == SCALE_HALVES) scale += lanes;
        if (++sub == form->subs) sub = 0, block += form->bytes * width;
    }
}

/* All but the elements of 8 bits, which stay where they are. groups is a constant at every call. */
INLINE void read_all(const brim_form *form, const place *at, int64_t groups, brim_slice_room *room) {
    int64_t line = at->width * 4, sub_bytes = sub_bytes_of(form) * at->width, header = form->header * at->width;
    if (form->scales == SCALE_F16)
        read_scales(form, at, SCALE_F16, groups, room);
    else if (form->scales == SCALE_LEAST)
        read_scales(form, at, SCALE_LEAST, groups, room);
    else if (form->scales == SCALE_NESTED)
        read_scales(form, at, SCALE_NESTED, groups, room);
    else
        read_scales(form, at, SCALE_HALVES, groups, room);
    if (form->bits == 8) return;
    const char *p = at->block + header + at->first * sub_bytes + at->group * 64;
    uint32_t *out = room->words;
    const char *ahead = at->ahead;
    int64_t step = form->bytes * at->width / form->subs;
    for (int64_t i = 0, sub = at->first; i < at->subs; i++, p += sub_bytes, out += 128 * groups) {
        if (ahead) {
            for (int64_t touched = 0; touched < step; touched += 64) __builtin_prefetch(ahead + touched, 0, 2);
            ahead += step;
        }
        if (form->extra == 0)
            read_words(0, groups, p, line, out);
        else if (form->extra == 1)
            read_words(1, groups, p, line, out);
        else
            read_words(2, groups, p, line, out);
        if (++sub == form->subs) sub = 0, p += header;
    }
}

brim_slice brim_read_slice(
    const brim_form *form, const char *panel, int64_t width, int64_t group, int64_t groups, int64_t sub, int64_t subs,
    const char *ahead, brim_slice_room *room) {
    int64_t block_bytes = form->bytes * width, lanes = groups * 16;
    place at = {panel + sub / form->subs * block_bytes, ahead, width, group, sub % form->subs, subs};
    brim_slice slice = {(const char *)room->words, 32 * lanes, 4 * lanes, room->scale, NULL};
    if (form->scales == SCALE_LEAST || form->scales == SCALE_NESTED) slice.least = room->least;
    if (form->bits == 8) {
        slice.w = at.block + form->header * width + group * 64;
        slice.sub_stride = block_bytes;
        slice.quad_stride = 4 * width;
    }
    if (groups == 4)
        read_all(form, &at, 4, room);
    else
        read_all(form, &at, groups, room);
    return slice;
}
