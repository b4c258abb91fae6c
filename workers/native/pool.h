/* Threads that run one function together, and how they share its work without a lock.

   pool_run(pool, body, state) runs body(state, thread) in every thread of the pool, the caller being thread 0. The body is
   a sequence of sections; each is cut into tiles, which threads claim one by one:

       for (int32_t tile; (tile = section_claim(&section)) < num_tiles; section_done(&section)) ...
       section_wait(&section, num_tiles);

   A thread that the system kept from running finds its sections done by the others and catches up: no section waits for
   a thread, only for tiles that were claimed. So pool_run may return while a thread is still on its way through finished
   sections; what the body reads outside of a claimed tile must stay until the next pool_run, which waits for it. */

#ifndef OCTAVO_POOL_H
#define OCTAVO_POOL_H

#include <stdatomic.h>
#include <stdint.h>

typedef struct octavo_pool octavo_pool;
typedef void (*pool_body)(void *state, int32_t thread);

/* On a cache line of its own. */
typedef struct {
    _Alignas(64) atomic_int next;
    atomic_int done;
} pool_section;

/* NULL without memory or threads. */
octavo_pool *pool_open(int32_t threads);
void pool_run(octavo_pool *pool, pool_body body, void *state);
/* Wait until no thread is in a body: what its state points to may go after that. */
void pool_settle(octavo_pool *pool);
void pool_close(octavo_pool *pool);

void section_wait(pool_section *section, int32_t num_tiles);

static inline void section_reset(pool_section *section)
{
    atomic_store_explicit(&section->next, 0, memory_order_relaxed);
    atomic_store_explicit(&section->done, 0, memory_order_relaxed);
}

static inline int32_t section_claim(pool_section *section)
{
    return atomic_fetch_add_explicit(&section->next, 1, memory_order_relaxed);
}

static inline void section_done(pool_section *section)
{
    atomic_fetch_add_explicit(&section->done, 1, memory_order_release);
}

#endif
