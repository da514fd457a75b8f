/* A small thread pool: the caller is thread 0, the others wait briefly in a spin and then sleep. */
#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() ((void)0)
#endif

enum { SPIN_NANOSECONDS = 40000, MAX_THREADS = 256 };

typedef struct {
    pthread_t handle;
    brim_thread self;
} worker;

struct brim_pool {
    _Alignas(128) _Atomic uint64_t generation; /* one per brim_run */
    _Alignas(128) _Atomic uint64_t arrived;    /* barrier arrivals ever */
    _Alignas(128) _Atomic uint64_t released;   /* barriers ever completed */
    _Alignas(128) _Atomic int64_t ticket;
    _Alignas(128) _Atomic int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    pthread_mutex_t entry; /* one run at a time */
    const brim_op *ops;
    int64_t num_ops;
    int closing;
    int count;
    int64_t scratch_bytes, shared_bytes;
    char *memory;
    worker workers[MAX_THREADS];
};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Wait until *word >= value: a bounded spin, then sleep. */
static void wait_for(brim_pool *pool, _Atomic uint64_t *word, uint64_t value) {
    int64_t deadline = 0;
    for (int i = 1;; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) >= value) return;
        RELAX();
        if (i % 64 == 0) {
            int64_t now = now_ns();
            if (!deadline) deadline = now + SPIN_NANOSECONDS;
            if (now > deadline) break;
        }
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(word) < value) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

/* Publish a new value of a word others wait for. Sequentially consistent with the sleeper count: no wake-up is lost. */
static void publish(brim_pool *pool, _Atomic uint64_t *word, uint64_t value) {
    atomic_store(word, value);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

void brim_barrier(brim_thread *self) {
    brim_pool *pool = self->pool;
    if (self->count == 1) { /* alone, whatever the pool's size */
        atomic_store_explicit(&pool->ticket, 0, memory_order_relaxed);
        return;
    }
    uint64_t mine = atomic_fetch_add(&pool->arrived, 1) + 1;
    uint64_t round = (mine + (uint64_t)pool->count - 1) / (uint64_t)pool->count;
    if (mine == round * (uint64_t)pool->count) {
        atomic_store_explicit(&pool->ticket, 0, memory_order_relaxed);
        publish(pool, &pool->released, round);
    } else {
        wait_for(pool, &pool->released, round);
    }
}

int64_t brim_ticket(brim_thread *self) {
    return atomic_fetch_add_explicit(&self->pool->ticket, 1, memory_order_relaxed);
}

static void run_alone(const brim_op *op, const brim_thread *self) {
    brim_thread alone = *self;
    alone.count = 1;
    brim_kernel_for(op->code)(op, &alone);
    atomic_store_explicit(&self->pool->ticket, 0, memory_order_relaxed);
}

/* Small operations run on thread 0 while the others wait at the barrier that ends the run of them. */
static void run_ops(brim_thread *self) {
    const brim_op *ops = self->pool->ops;
    int64_t count = self->pool->num_ops;
    for (int64_t i = 0; i < count; i++) {
        int small = brim_is_small(&ops[i]);
        if (!small)
            brim_kernel_for(ops[i].code)(&ops[i], self);
        else if (self->id == 0)
            run_alone(&ops[i], self);
        if (!small || i + 1 == count || !brim_is_small(&ops[i + 1])) brim_barrier(self);
    }
}

static void *work(void *argument) {
    worker *me = argument;
    brim_pool *pool = me->self.pool;
    for (uint64_t seen = 1;; seen++) {
        wait_for(pool, &pool->generation, seen);
        if (pool->closing) return NULL;
        run_ops(&me->self);
    }
}

int brim_run(brim_pool *pool, const brim_op *ops, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        if (!brim_kernel_for(ops[i].code)) return -1;
    if (count <= 0) return 0;
    pthread_mutex_lock(&pool->entry);
    if (count == 1 && brim_is_small(ops)) { /* nobody needs to be woken */
        run_alone(ops, &pool->workers[0].self);
    } else {
        pool->ops = ops;
        pool->num_ops = count;
        if (pool->count > 1) publish(pool, &pool->generation, atomic_load(&pool->generation) + 1);
        run_ops(&pool->workers[0].self);
    }
    pthread_mutex_unlock(&pool->entry);
    return 0;
}

static int start_workers(brim_pool *pool) {
    for (int i = 0; i < pool->count; i++) {
        char *scratch = pool->memory + pool->shared_bytes + i * pool->scratch_bytes;
        pool->workers[i].self = (brim_thread){pool, i, pool->count, scratch, pool->memory};
    }
    for (int i = 1; i < pool->count; i++)
        if (pthread_create(&pool->workers[i].handle, NULL, work, &pool->workers[i])) return i;
    return pool->count;
}

static void stop_workers(brim_pool *pool, int started) {
    pool->closing = 1;
    publish(pool, &pool->generation, atomic_load(&pool->generation) + 1);
    for (int i = 1; i < started; i++) pthread_join(pool->workers[i].handle, NULL);
}

static void release(brim_pool *pool) {
    munmap(pool->memory, (size_t)(pool->shared_bytes + pool->count * pool->scratch_bytes));
    pthread_mutex_destroy(&pool->mutex);
    pthread_mutex_destroy(&pool->entry);
    pthread_cond_destroy(&pool->wake);
    free(pool);
}

brim_pool *brim_open(int threads, int64_t scratch_bytes, int64_t shared_bytes) {
    brim_pool *pool = NULL;
    if (threads < 1 || threads > MAX_THREADS) return NULL;
    if (posix_memalign((void **)&pool, 128, sizeof *pool)) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->count = threads;
    pool->scratch_bytes = scratch_bytes;
    pool->shared_bytes = shared_bytes;
    size_t total = (size_t)(shared_bytes + threads * scratch_bytes);
    pool->memory = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pool->memory == MAP_FAILED) {
        free(pool);
        return NULL;
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_mutex_init(&pool->entry, NULL);
    pthread_cond_init(&pool->wake, NULL);
    int started = start_workers(pool);
    if (started < threads) {
        stop_workers(pool, started);
        release(pool);
        return NULL;
    }
    return pool;
}

void brim_close(brim_pool *pool) {
    pthread_mutex_lock(&pool->entry);
    stop_workers(pool, pool->count);
    pthread_mutex_unlock(&pool->entry);
    release(pool);
}
