/* Linear layers over packed weights: packing, the product for any number of rows, and the gather of embeddings.
 *
 * Packed layout: panels of 64 output features, the last one as narrow as a multiple of 16 allows, each as tile.h says,
 * one after the other. The weights are read once from memory whatever the number of rows: a panel stays in the second
 * level cache while all rows pass over it, and the next panel is fetched meanwhile. */
#include "linear.h"

enum { DEPTH_BLOCK = 4096, PACK_DEPTH = 64 };

int64_t brim_linear_scratch(void) { return ROW_BLOCK * PANEL * 4; }

static char *panel_at(const brim_op *op, int64_t in_features, int64_t panel, int dtype) {
    return at(op->p[1], dtype, panel * PANEL * packed_depth(dtype, in_features));
}

/* One panel for up to ROW_BLOCK rows. The rows are dealt to tiles of nearly equal height. */
static void product(const brim_op *op, const brim_span *s, void *scratch) {
    int64_t depth = op->n[2], tiles = ceil_div(s->rows, TILE_ROWS), dtype = op->dtype;
    int64_t width = s->groups * 16, step = op->dtype == BRIM_BF16 ? 2 : 1;
    int64_t step_bytes = width * step * dtype_size(op->dtype);
    const char *panel = panel_at(op, depth, s->index, op->dtype);
    const char *next = s->has_next ? panel_at(op, depth, s->index + 1, op->dtype) : NULL;
    for (int64_t k = 0; k < depth; k += DEPTH_BLOCK) {
        int64_t deep = depth - k < DEPTH_BLOCK ? depth - k : DEPTH_BLOCK;
        for (int64_t t = 0; t < tiles; t++) {
            int64_t first = s->rows * t / tiles, count = s->rows * (t + 1) / tiles - first;
            int64_t slice = ceil_div(deep, step) * step_bytes / tiles;
            brim_tile tile = {
                .x = at(op->p[0], op->dtype, (s->row + first) * op->n[3] + k),
                .ldx = op->n[3],
                .w = panel + panel_offset(op->dtype, width, k),
                .depth = deep,
                .acc = (float *)scratch + first * PANEL,
                .lda = PANEL,
                .prefetch = next ? next + panel_offset(op->dtype, width, k) + t * slice : NULL,
                .stride = step_bytes / tiles,
                .fresh = k == 0,
            };
            brim_tile_for((int)dtype, count, s->groups)(&tile);
            if (k + deep == depth) finish(op, tile.acc, s->row + first, count, s->index * PANEL, s->groups);
        }
    }
}

/* p: x, packed weight, out, bias or NULL; n: rows, out_features, in_features, row stride of x, row stride of out. */
void brim_linear(const brim_op *op, brim_thread *self) {
    if (op->n[0] > 0) each_span(op, self, 0, op->n[0], TILE_ROWS, product, self->scratch);
}

/* Panels [.., ..) that hold rows first .. first + count are packed one a ticket: no two threads share a line.
 * p: source rows, packed weight; dtype: of the source, out_dtype: of the weight;
 * n: first row, count, in_features, row stride of the source, out_features. */
static void pack_block(const brim_op *op, uint16_t *tmp, int64_t panel, int64_t lane0, int64_t lane1, int64_t k0, int64_t deep) {
    int64_t depth = packed_depth(op->out_dtype, op->n[2]), width = groups_of(op->n[4], panel) * 16;
    char *base = at(op->p[1], op->out_dtype, panel * PANEL * depth);
    float *wide = (float *)tmp;
    for (int64_t lane = lane0; lane < lane1; lane++) {
        int64_t row = panel * PANEL + lane - op->n[0];
        for (int64_t i = 0; i < PACK_DEPTH; i += 16) {
            v16f v = i < deep ? load_upto(op->dtype, op->p[0], row * op->n[3] + k0 + i, deep - i) : splat(0.0f);
            store16(op->out_dtype, tmp, lane * PACK_DEPTH + i, v);
        }
    }
    if (op->out_dtype == BRIM_BF16) {
        uint32_t *out = (uint32_t *)base + k0 / 2 * width;
        for (int64_t pair = 0; pair < (deep + 1) / 2; pair++)
            for (int64_t lane = lane0; lane < lane1; lane++) memcpy(out + pair * width + lane, tmp + lane * PACK_DEPTH + pair * 2, 4);
    } else if (op->out_dtype == BRIM_F16) {
        uint16_t *out = (uint16_t *)base + k0 * width;
        for (int64_t k = 0; k < deep; k++)
            for (int64_t lane = lane0; lane < lane1; lane++) out[k * width + lane] = tmp[lane * PACK_DEPTH + k];
    } else {
        float *out = (float *)base + k0 * width;
        for (int64_t k = 0; k < deep; k++)
            for (int64_t lane = lane0; lane < lane1; lane++) out[k * width + lane] = wide[lane * PACK_DEPTH + k];
    }
}

void brim_pack(const brim_op *op, brim_thread *self) {
    int64_t first = op->n[0], last = first + op->n[1];
    if (op->n[1] <= 0) return;
    for (;;) {
        int64_t panel = first / PANEL + brim_ticket(self);
        if (panel * PANEL >= last) return;
        int64_t lane0 = first > panel * PANEL ? first - panel * PANEL : 0;
        int64_t lane1 = last < (panel + 1) * PANEL ? last - panel * PANEL : PANEL;
        for (int64_t k = 0; k < op->n[2]; k += PACK_DEPTH) {
            int64_t deep = op->n[2] - k < PACK_DEPTH ? op->n[2] - k : PACK_DEPTH;
            pack_block(op, (uint16_t *)self->scratch, panel, lane0, lane1, k, deep);
        }
    }
}

/* p: ids int64, packed weight, out; dtype: of the weight; n: rows, out_features, in_features, row stride of out;
 * flags: nonzero to multiply by f[0]. */
void brim_embed(const brim_op *op, brim_thread *self) {
    const int64_t *ids = op->p[0];
    int64_t depth = op->n[2], step = op->dtype == BRIM_BF16 ? 2 : 1, first, last;
    brim_share(self, op->n[0] * depth / 16, &first, &last); /* shares of 16 elements, so that one row is split too */
    if (self->id == self->count - 1) last = ceil_div(op->n[0] * depth, 16);
    for (int64_t i = first * 16; i < last * 16 && i < op->n[0] * depth;) {
        int64_t row = i / depth, k = i % depth, id = ids[row], panel = id / PANEL;
        int64_t end = last * 16 - row * depth < depth ? last * 16 - row * depth : depth;
        int64_t width = groups_of(op->n[1], panel) * 16;
        const char *base = panel_at(op, depth, panel, op->dtype);
        i += end - k;
        for (; k < end; k++) {
            float x = load1(op->dtype, base, k / step * step * width + (id - panel * PANEL) * step + k % step);
            store1(op->out_dtype, op->p[2], row * op->n[3] + k, op->flags ? x * op->f[0] : x);
        }
    }
}
