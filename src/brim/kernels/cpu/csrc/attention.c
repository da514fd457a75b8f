/* How attention is dealt to threads: whole tasks where there are enough, else chunks of the few tasks there are. */
#include "attention.h"

static int64_t rows_of(const brim_op *op, int64_t seq) {
    const int32_t *start = op->p[3];
    return (int64_t)(start[seq + 1] - start[seq]) * op->n[2];
}

static void carve(const brim_op *op, brim_thread *self, brim_rows_task *task, brim_partial *part, brim_partial *total) {
    int64_t d = op->n[3];
    char *at = self->scratch;
    *task = (brim_rows_task){.op = op};
    task->keys = at, at += CHUNK * d * 4;
    task->values = at, at += CHUNK * d * 4;
    task->scores = (float *)at, at += MOST_ROWS * CHUNK * 4;
    task->queries = at, at += MOST_ROWS * d * 4;
    part->acc = (float *)at, at += MOST_ROWS * d * 4;
    total->acc = (float *)at, at += MOST_ROWS * d * 4;
    part->max = (float *)at, at += MOST_ROWS * 4;
    part->sum = (float *)at, at += MOST_ROWS * 4;
    total->max = (float *)at, at += MOST_ROWS * 4;
    total->sum = (float *)at;
}

int64_t brim_attention_scratch(int64_t d) { return 2 * CHUNK * d * 4 + MOST_ROWS * (CHUNK + 3 * d + 4) * 4; }

static int64_t slot_floats(int64_t d) { return SPLIT_ROWS * (d + 4); }
int64_t brim_attention_shared(int64_t d) { return (SPLIT_SLOTS + 2) * slot_floats(d) * 4; }

static brim_partial slot(const brim_op *op, brim_thread *self, int64_t index) {
    float *base = (float *)self->shared + index * slot_floats(op->n[3]);
    return (brim_partial){base, base + SPLIT_ROWS, base + 2 * SPLIT_ROWS};
}

/* Point a task at rows [first, first + rows) of a sequence and kv head. False where the sequence is padding. */
static int aim(brim_rows_task *task, int64_t seq, int64_t kv_head, int64_t first, int64_t rows) {
    const brim_op *op = task->op;
    const int32_t *start = op->p[3], *lens = op->p[4];
    task->seq = seq, task->kv_head = kv_head, task->first = first, task->rows = rows;
    task->token0 = start[seq];
    task->position = lens[seq] - (start[seq + 1] - start[seq]);
    int64_t oldest = task->position + first / op->n[2], newest = task->position + (first + rows - 1) / op->n[2];
    task->low = op->n[7] && oldest - op->n[7] + 1 > 0 ? oldest - op->n[7] + 1 : 0;
    task->high = newest + 1;
    return lens[seq] > 0;
}

static void run_whole(brim_rows_task *task, brim_partial *part, brim_partial *total) {
    brim_gather_queries(task);
    brim_clear(task, total);
    for (int64_t chunk = task->low / CHUNK; chunk * CHUNK < task->high; chunk++) {
        brim_chunk(task, chunk, part);
        brim_fold(task, total, part);
    }
    brim_write_rows(task, total);
}

/* Tasks are numbered from the last sequence and its last rows backwards: the longest come first. */
static void whole_tasks(const brim_op *op, brim_thread *self, int64_t most) {
    brim_rows_task task;
    brim_partial part, total;
    carve(op, self, &task, &part, &total);
    int64_t seq = op->n[0], base = 0, tiles = 0, kv_heads = op->n[1];
    for (;;) {
        int64_t ticket = brim_ticket(self);
        while (ticket >= base + tiles * kv_heads) {
            base += tiles * kv_heads;
            if (--seq < 0) return;
            tiles = (rows_of(op, seq) + most - 1) / most;
        }
        int64_t rows = rows_of(op, seq), tile = tiles - 1 - (ticket - base) / kv_heads;
        int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
        if (aim(&task, seq, (ticket - base) % kv_heads, first, last - first)) {
            run_whole(&task, &part, &total);
        } else {
            brim_clear(&task, &total);
            brim_write_rows(&task, &total);
        }
    }
}

static int64_t chunks_of(const brim_rows_task *task) { return (task->high + CHUNK - 1) / CHUNK - task->low / CHUNK; }

/* Chunks [wave * slots, ..) of all tasks are computed side by side, then folded task by task in order. A task cut by the end of
 * a wave is carried over in one of two slots of its own. */
static void fold_wave(const brim_op *op, brim_thread *self, brim_rows_task *task, brim_partial *total, int64_t wave) {
    int64_t tasks = op->n[0] * op->n[1], from = wave * SPLIT_SLOTS, to = from + SPLIT_SLOTS, base = 0;
    int64_t ticket = brim_ticket(self);
    for (int64_t t = 0; t < tasks; t++) {
        int64_t rows = rows_of(op, t / op->n[1]);
        if (!rows) continue;
        int real = aim(task, t / op->n[1], t % op->n[1], 0, rows);
        int64_t chunks = real ? chunks_of(task) : 0, end = base + chunks;
        int mine = t == ticket;
        if (mine) ticket = brim_ticket(self);
        if (mine && (real ? base < to && end > from : wave == 0)) {
            brim_clear(task, total);
            brim_partial carry = slot(op, self, SPLIT_SLOTS + (wave & 1));
            if (real && base < from) brim_fold(task, total, &carry);
            for (int64_t i = base > from ? base : from; i < end && i < to; i++) {
                brim_partial part = slot(op, self, i - from);
                brim_fold(task, total, &part);
            }
            carry = slot(op, self, SPLIT_SLOTS + (~wave & 1));
            if (end <= to) {
                brim_write_rows(task, total);
            } else {
                brim_clear(task, &carry);
                brim_fold(task, &carry, total);
            }
        }
        base = end;
    }
}

static void split_tasks(const brim_op *op, brim_thread *self) {
    brim_rows_task task;
    brim_partial part, total;
    carve(op, self, &task, &part, &total);
    for (int64_t wave = 0;; wave++) {
        int64_t tasks = op->n[0] * op->n[1], from = wave * SPLIT_SLOTS, base = 0, next = brim_ticket(self);
        for (int64_t t = 0; t < tasks; t++) {
            int64_t rows = rows_of(op, t / op->n[1]);
            if (!rows || !aim(&task, t / op->n[1], t % op->n[1], 0, rows)) continue;
            int64_t chunks = chunks_of(&task);
            int gathered = 0;
            for (; next < SPLIT_SLOTS && from + next < base + chunks; next = brim_ticket(self)) {
                if (!gathered) brim_gather_queries(&task);
                gathered = 1;
                brim_partial mine = slot(op, self, next);
                brim_chunk(&task, task.low / CHUNK + from + next - base, &mine);
            }
            base += chunks;
        }
        brim_barrier(self);
        fold_wave(op, self, &task, &total, wave);
        brim_barrier(self);
        if (base <= from + SPLIT_SLOTS) return;
    }
}

/* p: q, cache, block_tables int32, query_start int32, seq_lens int32, out; dtype: of q and out; out_dtype: of the cache;
 * n: sequences, kv heads, query heads per kv head, head_dim, block size, row strides of q and out, window,
 *    strides of the cache: block, K/V, position, head; row stride of block_tables; f: scale, softcap. */
void brim_attention(const brim_op *op, brim_thread *self) {
    int64_t tasks = 0, total = 0, most = 0;
    for (int64_t seq = 0; seq < op->n[0]; seq++) {
        int64_t rows = rows_of(op, seq);
        if (rows > most) most = rows;
        tasks += rows > 0 ? op->n[1] : 0;
        total += rows * op->n[1];
    }
    if (self->count > 1 && most <= SPLIT_ROWS && tasks < 3 * self->count) {
        split_tasks(op, self);
        return;
    }
    int64_t rows = total / (4 * self->count); /* several tasks a thread, yet not so small that packing dominates */
    rows = rows < 12 ? 12 : rows > MOST_ROWS ? MOST_ROWS : rows;
    whole_tasks(op, self, rows);
}
