/* Panels of 64 output features and who computes which: shared by all linear layers, whatever their weights are made of. */
#ifndef BRIM_PANELS_H
#define BRIM_PANELS_H
#include "rows.h"

enum { PANEL = 64, ROW_BLOCK = 192 };

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Column groups of 16 in a panel: 4, but for the last panel. */
INLINE int64_t groups_of(int64_t out_features, int64_t panel) {
    int64_t left = ceil_div(out_features, 16) - panel * 4;
    return left < 4 ? left : 4;
}

/* One panel for rows [row, row + rows), at most ROW_BLOCK. has_next: the panel after it is most likely this thread's too. */
typedef struct {
    int64_t index, groups;
    int64_t row, rows;
    int has_next;
} brim_span;

typedef void span_fn(const brim_op *op, const brim_span *span, void *context);

/* Deals the panels of rows [row, row + rows) to the threads. tile_rows: rows that are computed at once. */
INLINE void each_span(
    const brim_op *op, brim_thread *self, int64_t row, int64_t rows, int64_t tile_rows, span_fn *work, void *context) {
    int64_t panels = ceil_div(op->n[1], PANEL);
    int64_t blocks = ceil_div(rows, ROW_BLOCK), wanted = 4 * self->count;
    if (self->count > 1 && panels < wanted && rows > 2 * tile_rows) {
        int64_t finer = ceil_div(wanted, panels), most = ceil_div(rows, tile_rows * 4);
        if (finer > most) finer = most;
        if (finer > blocks) blocks = finer;
    }
    int64_t run = panels / (self->count * 12); /* panels taken at a time: long streams, yet even shares */
    if (run < 1) run = 1;
    brim_span s;
    for (int64_t ticket = brim_ticket(self);; ticket = brim_ticket(self)) {
        int64_t first = ticket * run, last = first + run < panels ? first + run : panels;
        if (blocks > 1) { /* the blocks of a panel are separate tickets */
            first = ticket / blocks, last = first + 1;
        }
        if (first >= panels) return;
        for (s.index = first; s.index < last; s.index++) {
            int64_t block = blocks > 1 ? ticket % blocks : 0;
            s.has_next = s.index + 1 < panels && blocks == 1;
            s.groups = groups_of(op->n[1], s.index);
            s.row = row + rows * block / blocks;
            s.rows = row + rows * (block + 1) / blocks - s.row;
            work(op, &s, context);
        }
    }
}

/* Rows [row, row + rows) of the result for one panel, from float32 sums at acc [rows][PANEL].
 * op: p[2] out, p[3] bias or NULL, n[1] out_features, n[4] row stride of out. */
INLINE void finish(const brim_op *op, const float *acc, int64_t row, int64_t rows, int64_t column, int64_t groups) {
    const float *bias = op->p[3];
    int64_t out_features = op->n[1];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t g = 0; g < groups; g++) {
            int64_t first = column + g * 16, n = out_features - first;
            v16f v = loadf(acc + r * PANEL + g * 16);
            if (bias) v = v + load_upto(BRIM_F32, bias, first, n);
            store_upto(op->out_dtype, op->p[2], (row + r) * op->n[4] + first, n, v);
        }
    }
}

#endif
