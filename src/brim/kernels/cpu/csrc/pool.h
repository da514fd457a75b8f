/* The worker threads and the operation descriptor. Owns how work is handed out, not what is computed. */
#ifndef BRIM_POOL_H
#define BRIM_POOL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum { BRIM_POINTERS = 10, BRIM_SIZES = 16, BRIM_REALS = 4 };
enum brim_dtype { BRIM_F32 = 0, BRIM_F16 = 1, BRIM_BF16 = 2 };

/* One call of one kernel: what each field means is said at the kernel. The Python side packs the same bytes. */
typedef struct brim_op {
    int32_t code;
    int32_t dtype;     /* of the main input */
    int32_t out_dtype; /* of the output, where it may differ */
    int32_t flags;
    void *p[BRIM_POINTERS];
    int64_t n[BRIM_SIZES];
    float f[BRIM_REALS];
} brim_op;

typedef struct brim_pool brim_pool;

/* What a kernel knows of the thread it runs on. Every thread of the pool runs every kernel that
 * is not small; what a kernel computes does not depend on how many do. */
typedef struct brim_thread {
    brim_pool *pool;
    int id;
    int count;
    char *scratch; /* this thread's own, 64-byte aligned */
    char *shared;  /* the pool's, the same for all threads */
} brim_thread;

typedef void brim_kernel(const brim_op *op, brim_thread *self);

/* Returns when every thread of the pool has called it. Resets the tickets. */
void brim_barrier(brim_thread *self);
/* The next piece of work of this phase, 0, 1, 2 ..; each number is given once, to whichever thread asks first. */
int64_t brim_ticket(brim_thread *self);

/* An even split of `total` things: this thread's are [first, last). */
static inline void brim_share(const brim_thread *self, int64_t total, int64_t *first, int64_t *last) {
    *first = total * self->id / self->count;
    *last = total * (self->id + 1) / self->count;
}

/* the entry points that Python binds: all else in the library is hidden */
#pragma GCC visibility push(default)
brim_pool *brim_open(int threads, int64_t scratch_bytes, int64_t shared_bytes);
void brim_close(brim_pool *pool);
int brim_run(brim_pool *pool, const brim_op *ops, int64_t count);
/* bytes of scratch memory for each thread, and for the pool, that the kernels need */
int64_t brim_scratch_bytes(int64_t max_head_dim);
int64_t brim_shared_bytes(int64_t max_head_dim);
int64_t brim_op_bytes(void);
/* what multiplies bytes in this library, for reports */
const char *brim_byte_products(void);
#pragma GCC visibility pop

/* the kernels, by code; NULL where there is none */
brim_kernel *brim_kernel_for(int32_t code);
/* True where waking and meeting other threads would cost more than the work: thread 0 does it alone. */
int brim_is_small(const brim_op *op);

#endif
