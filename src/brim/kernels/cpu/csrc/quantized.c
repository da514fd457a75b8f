/* Linear layers over quantised weights: rows are quantised to bytes, multiplied with the stored bytes, and the look-up of rows.
 *
 * A row is cut into sub-blocks of 32, each with a scale of its own (its largest magnitude is 127), as weights are. Its result
 * is summed by sub-blocks in order, whatever the other rows, the threads and the panels. */
#include "quantized.h"

#include "quad_tile.h"

enum { OWN_SUBS = 512, SHARED_SUBS = 27648 }; /* rows of so many sub-blocks in all are quantised by each thread, or together */

typedef struct {
    _Alignas(64) float acc[ROW_BLOCK * PANEL];
    _Alignas(64) brim_slice_room room;
    _Alignas(64) brim_row_sub own[OWN_SUBS];
} scratch;

int64_t brim_quantized_scratch(void) { return sizeof(scratch); }
int64_t brim_quantized_shared(void) { return SHARED_SUBS * (int64_t)sizeof(brim_row_sub); }

/* A NaN or an infinity among the elements makes the scale one, and so the result. */
INLINE void quantize_sub(int dtype, const void *x, int64_t at, int offset, brim_row_sub *out) {
    const v16f shifter = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer held in the low bits */
    v16f v[2] = {load16(dtype, x, at), load16(dtype, x, at + 16)};
    v16i a = (v16i)v[0] & 0x7fffffff, b = (v16i)v[1] & 0x7fffffff, most = (v16i)choose(a > b, (v16f)a, (v16f)b);
    int32_t bits = hmaxi(most);
    float largest, inverse;
    if (bits < 0x03800000) bits = 0; /* below 2^-120: its inverse would be infinite */
    memcpy(&largest, &bits, 4);
    inverse = bits ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < 2; i++) {
        v16i q = (v16i)(v[i] * splat(inverse) + shifter) - (v16i)shifter;
        narrow16(out->q + i * 16, q);
        int32_t half = hsumi(q);
        out->start[i] = -offset * half;
        sum += half;
    }
    out->scale = largest * (1.0f / 127.0f);
    out->weight = out->scale * (float)sum;
}

typedef struct {
    const brim_form *form;
    const brim_row_sub *x;
    int64_t row; /* the first one at x */
    scratch *own;
} context;

/* Sub-blocks first .. last of the rows from c->row on. */
static void quantize_rows(const brim_op *op, const context *c, int64_t first, int64_t last, brim_row_sub *out) {
    int64_t subs = op->n[2] / 32;
    for (int64_t i = first; i < last;) {
        int64_t row = i / subs, end = (row + 1) * subs < last ? (row + 1) * subs : last;
        for (; i < end; i++) {
            int64_t at = (c->row + row) * op->n[3] + (i - row * subs) * 32;
            if (op->dtype == BRIM_BF16)
                quantize_sub(BRIM_BF16, op->p[0], at, c->form->offset, out + i);
            else
                quantize_sub(op->dtype, op->p[0], at, c->form->offset, out + i);
        }
    }
}

static void product(const brim_op *op, const brim_span *s, void *given) {
    const context *c = given;
    const brim_form *form = c->form;
    int64_t subs = op->n[2] / 32, width = s->groups * 16, tiles = ceil_div(s->rows, QUAD_ROWS);
    int64_t panel_bytes = block_bytes_of(form, PANEL, op->n[2]);
    const char *panel = (const char *)op->p[1] + s->index * panel_bytes;
    const char *next = s->has_next ? panel + panel_bytes : NULL;
    int64_t stride = form->bytes * width / (8 * form->subs);
    for (int64_t sub = 0; sub < subs; sub += CHUNK_SUBS) {
        int64_t count = subs - sub < CHUNK_SUBS ? subs - sub : CHUNK_SUBS;
        const char *ahead = next ? next + sub / form->subs * form->bytes * width : NULL;
        brim_slice slice = brim_read_slice(form, panel, width, 0, s->groups, sub, count, ahead, &c->own->room);
        for (int64_t t = 0; t < tiles; t++) {
            int64_t first = s->rows * t / tiles, rows = s->rows * (t + 1) / tiles - first;
            brim_quad_tile tile = {
                .x = c->x + (s->row - c->row + first) * subs + sub,
                .ldx = subs,
                .slice = slice,
                .lanes = width,
                .subs = count,
                .acc = c->own->acc + first * PANEL,
                .prefetch = t == 0 && form->bits == 8 ? ahead : NULL,
                .stride = stride,
                .fresh = sub == 0,
            };
            int64_t groups = s->groups == 4 ? 4 : 1;
            for (int64_t g = 0; g < s->groups; g += groups) {
                brim_quad_tile_for(form->scales, rows, groups)(&tile);
                tile.slice.w += 64, tile.slice.scale += 16, tile.acc += 16;
                if (slice.least) tile.slice.least += 16;
            }
        }
    }
    finish(op, c->own->acc, s->row, s->rows, s->index * PANEL, s->groups);
}

/* p: x, packed blocks, out, bias or NULL; flags: ggml type;
 * n: rows, out_features, in_features (whole blocks), row stride of x, row stride of out. */
void brim_quantized_linear(const brim_op *op, brim_thread *self) {
    int64_t rows = op->n[0], subs = op->n[2] / 32;
    context c = {.form = brim_form_of(op->flags), .own = (scratch *)self->scratch};
    if (!c.form || rows <= 0) return;
    if (rows * subs <= OWN_SUBS) { /* cheaper than meeting the other threads */
        quantize_rows(op, &c, 0, rows * subs, c.own->own);
        c.x = c.own->own;
        each_span(op, self, 0, rows, QUAD_ROWS, product, &c);
        return;
    }
    int64_t passes = ceil_div(rows, SHARED_SUBS / subs), first, last;
    c.x = (brim_row_sub *)self->shared;
    for (int64_t pass = 0; pass < passes; pass++) {
        c.row = rows * pass / passes;
        int64_t count = rows * (pass + 1) / passes - c.row;
        if (pass) brim_barrier(self); /* all have done with the rows before */
        brim_share(self, count * subs, &first, &last);
        quantize_rows(op, &c, first, last, (brim_row_sub *)self->shared);
        brim_barrier(self);
        each_span(op, self, c.row, count, QUAD_ROWS, product, &c);
    }
}

/* p: ids int64, packed blocks, out; dtype: ggml type; n: rows, out_features, in_features, row stride of out;
 * flags: nonzero to multiply by f[0]. */
void brim_quantized_embed(const brim_op *op, brim_thread *self) {
    const brim_form *form = brim_form_of(op->dtype);
    const int64_t *ids = op->p[0];
    brim_slice_room *room = &((scratch *)self->scratch)->room;
    int64_t subs = op->n[2] / 32, first, last;
    if (!form) return;
    brim_share(self, op->n[0] * subs, &first, &last);
    for (int64_t i = first; i < last; i++) {
        int64_t row = i / subs, sub = i % subs, id = ids[row], panel = id / PANEL, lane = id % PANEL;
        int64_t width = groups_of(op->n[1], panel) * 16;
        const char *base = (const char *)op->p[1] + panel * block_bytes_of(form, PANEL, op->n[2]);
        brim_slice slice = brim_read_slice(form, base, width, lane / 16, 1, sub, 1, NULL, room);
        for (int k = 0; k < 32; k++) {
            uint8_t element = (uint8_t)slice.w[k / 4 * slice.quad_stride + lane % 16 * 4 + k % 4];
            int64_t half = form->scales == SCALE_HALVES && k >= 16 ? 16 : 0;
            float x = slice.scale[half + lane % 16] * (float)(element - form->offset);
            if (slice.least) x = x + slice.least[lane % 16];
            store1(op->out_dtype, op->p[2], row * op->n[3] + sub * 32 + k, op->flags ? x * op->f[0] : x);
        }
    }
}
