#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

/* How often a waiting thread looks before it lets others run, and an idle one before it sleeps: about 20 microseconds.
   Longer would take the cores from the event loops beside the engine. */
#define SPINS 1000

struct octavo_pool {
    int32_t num_workers;
    pthread_t *workers;
    pthread_mutex_t mutex;
    pthread_cond_t woken;
    _Alignas(64) atomic_uint epoch; /* counts runs */
    atomic_int num_sleeping, num_busy, is_closing, next_thread;
    pool_body body;
    void *state;
};

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void await_epoch(octavo_pool *pool, unsigned seen)
{
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&pool->epoch) != seen)
            return;
        relax();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->num_sleeping, 1); /* before the epoch is read again: pool_run writes and reads in that order */
    while (atomic_load(&pool->epoch) == seen)
        pthread_cond_wait(&pool->woken, &pool->mutex);
    atomic_fetch_sub(&pool->num_sleeping, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *work(void *argument)
{
    octavo_pool *pool = argument;
    int32_t thread = atomic_fetch_add(&pool->next_thread, 1);
    for (unsigned seen = 0;; seen++) {
        await_epoch(pool, seen);
        if (atomic_load(&pool->is_closing))
            return NULL;
        pool->body(pool->state, thread);
        atomic_fetch_sub(&pool->num_busy, 1);
    }
}

static void begin_epoch(octavo_pool *pool)
{
    atomic_fetch_add(&pool->epoch, 1);
    if (atomic_load(&pool->num_sleeping)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->woken);
        pthread_mutex_unlock(&pool->mutex);
    }
}

octavo_pool *pool_open(int32_t threads)
{
    octavo_pool *pool = aligned_alloc(64, (sizeof *pool + 63) / 64 * 64);
    if (!pool)
        return NULL;
    *pool = (octavo_pool){.next_thread = 1};
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->woken, NULL);
    pool->workers = calloc((size_t)threads, sizeof *pool->workers);
    while (pool->workers && pool->num_workers < threads - 1) {
        if (pthread_create(&pool->workers[pool->num_workers], NULL, work, pool))
            break;
        pool->num_workers++;
    }
    if (!pool->workers || pool->num_workers < threads - 1) {
        pool_close(pool);
        return NULL;
    }
    return pool;
}

void pool_settle(octavo_pool *pool)
{
    while (atomic_load(&pool->num_busy))
        sched_yield();
}

void pool_run(octavo_pool *pool, pool_body body, void *state)
{
    pool_settle(pool);
    pool->body = body;
    pool->state = state;
    atomic_store(&pool->num_busy, pool->num_workers);
    begin_epoch(pool);
    body(state, 0);
}

void pool_close(octavo_pool *pool)
{
    pool_settle(pool);
    atomic_store(&pool->is_closing, 1);
    begin_epoch(pool);
    for (int32_t i = 0; i < pool->num_workers; i++)
        pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->woken);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool);
}

void section_wait(pool_section *section, int32_t num_tiles)
{
    for (int i = 0; atomic_load_explicit(&section->done, memory_order_acquire) < num_tiles; i++) {
        if (i < SPINS)
            relax();
        else
            sched_yield();
    }
}
