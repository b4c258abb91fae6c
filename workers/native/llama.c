/* One step of a Llama-family decoder, by all threads of a context together.

       x = embedding                                          section ENTER    tiles of rows
       per layer
         normed = norm(x)                                     NORM             rows
         qkv    = normed * W                                  QKV              panels
         qkv    = rotate(qkv); cache <- keys, values          PLACE            rows
         mixed  = attend(qkv, cache)                          ATTEND           key heads x runs of rows
         x     += mixed * W                                   OUTPUT           panels
         normed = norm(x)                                     FFN_NORM         rows
         inner  = silu(normed * gate) * (normed * up)         GATE_UP          groups of panels
         x     += inner * W                                   DOWN             panels
       normed = norm(x) of the rows that sample               LAST             rows
       logits = normed * W                                    HEAD             panels
       best   = argmax(logits)                                BEST             rows

   With OCTAVO_INT8 whoever makes `normed`, `mixed` and `inner` rounds them, too. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "pool.h"

enum { NORM, QKV, PLACE, ATTEND, OUTPUT, FFN_NORM, GATE_UP, DOWN, PER_LAYER };

/* Query rows of one attention task: few enough to share out, enough to use a key more than once. */
#define ATTEND_ROWS 16

/* A run of panels is claimed at once so that a tile takes a few microseconds, this many multiply-adds at least, and so
   that no thread has more than TILES of them: kernels prepare the rows anew for each tile. */
#define TILE_WORK (1 << 17)
#define TILES 5

typedef struct {
    int32_t chunk, first_row, num_rows, kv_head;
} attend_task;

typedef struct {
    float *exact;
    octavo_rounded rounded;
} buffer;

struct octavo_context {
    const octavo_model *model;
    const octavo_cache *cache;
    const octavo_kernels *kernels;
    octavo_pool *pool;
    int32_t threads;
    char *scratch; /* [threads][scratch_bytes] */
    size_t scratch_bytes;
    float *gates; /* [threads][row_capacity][GATE_COLUMNS]; with few rows, fewer and wider ones */
    pool_section *sections;

    int32_t row_capacity, task_capacity;
    float *x, *qkv, *cos, *sin;
    buffer normed, mixed, inner;
    int32_t *blocks, *offsets, *positions; /* [rows] */
    attend_task *tasks;

    octavo_step step; /* the caller's own may be gone while a late thread walks through finished sections */
    int32_t num_tasks;
};

/* Gate and up panels of one tile: two of each make one whole group of `inner` to round. Up to FEW_ROWS rows have tiles of
   FEW_GATES times as many panels, in the memory that ROW_UNIT rows have. */
#define GATE_PANELS 4
#define GATE_COLUMNS (GATE_PANELS * OCTAVO_PANEL)
#define FEW_ROWS 16
#define FEW_GATES 4
#define ROW_UNIT (FEW_ROWS * FEW_GATES)

static void release_rows(octavo_context *c)
{
    void *all[] = {c->x, c->qkv, c->cos, c->sin, c->gates, c->blocks, c->offsets, c->positions};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    buffer *buffers[] = {&c->normed, &c->mixed, &c->inner};
    for (int i = 0; i < 3; i++) {
        free(buffers[i]->exact);
        free(buffers[i]->rounded.values);
        free(buffers[i]->rounded.scales);
        free(buffers[i]->rounded.sums);
        *buffers[i] = (buffer){0};
    }
    c->x = c->qkv = c->cos = c->sin = c->gates = NULL;
    c->blocks = c->offsets = c->positions = NULL;
    c->row_capacity = 0;
}

static void *allocate(size_t count, size_t size)
{
    return aligned_alloc(64, (count * size + 127) / 64 * 64);
}

static int allocate_buffer(buffer *b, size_t rows, size_t columns, int is_rounded)
{
    b->exact = allocate(rows * columns, sizeof(float));
    if (!is_rounded)
        return b->exact != NULL;
    b->rounded.values = allocate(rows * columns, 1);
    b->rounded.scales = allocate(rows * columns / OCTAVO_GROUP, sizeof(float));
    b->rounded.sums = allocate(rows * columns / OCTAVO_GROUP, sizeof(float));
    return b->exact && b->rounded.values && b->rounded.scales && b->rounded.sums;
}

static int reserve_rows(octavo_context *c, int32_t num_rows)
{
    if (num_rows <= c->row_capacity)
        return 1;
    const octavo_model *m = c->model;
    size_t rows = ((size_t)num_rows + ROW_UNIT - 1) / ROW_UNIT * ROW_UNIT, half = (size_t)m->head_dim / 2;
    size_t heads = (size_t)m->num_heads * m->head_dim, qkv = heads + 2 * (size_t)m->num_kv_heads * m->head_dim;
    int is_rounded = m->arithmetic == OCTAVO_INT8;
    release_rows(c);
    c->x = allocate(rows * m->hidden, sizeof(float));
    c->qkv = allocate(rows * qkv, sizeof(float));
    c->cos = allocate(rows * half, sizeof(float));
    c->sin = allocate(rows * half, sizeof(float));
    c->gates = allocate(rows * c->threads * GATE_COLUMNS, sizeof(float));
    c->blocks = allocate(rows, sizeof(int32_t));
    c->offsets = allocate(rows, sizeof(int32_t));
    c->positions = allocate(rows, sizeof(int32_t));
    int has_all = c->x && c->qkv && c->cos && c->sin && c->gates && c->blocks && c->offsets && c->positions;
    has_all = allocate_buffer(&c->normed, rows, (size_t)m->hidden, is_rounded) && has_all;
    has_all = allocate_buffer(&c->mixed, rows, heads, is_rounded) && has_all;
    has_all = allocate_buffer(&c->inner, rows, (size_t)m->ffn, is_rounded) && has_all;
    if (!has_all) {
        release_rows(c);
        return 0;
    }
    c->row_capacity = (int32_t)rows;
    return 1;
}

/* Whether the model has the step's tokens, and the cache its blocks: what it has not would be read or written anywhere. */
static int is_within_bounds(const octavo_context *c)
{
    const octavo_step *step = &c->step;
    for (int32_t row = 0; row < step->num_rows; row++)
        if ((uint32_t)step->tokens[row] >= (uint32_t)c->model->vocab)
            return 0;
    for (int32_t i = 0; i < step->num_chunks; i++) {
        const octavo_chunk *chunk = &step->chunks[i];
        const int32_t *table = step->tables + chunk->table;
        for (int32_t b = 0; b <= (chunk->start + chunk->count - 1) / c->cache->block_size; b++)
            if ((uint32_t)table[b] >= (uint32_t)c->cache->num_blocks)
                return 0;
    }
    return 1;
}

/* Where each row's key and value go, and which tasks attention has. Key heads are outermost: what sequences share, or a
   chunk's rows, is then read from the core's own cache. */
static int plan_step(octavo_context *c)
{
    const octavo_step *step = &c->step;
    int32_t block_size = c->cache->block_size, num_runs = 0;
    for (int32_t i = 0; i < step->num_chunks; i++) {
        const octavo_chunk *chunk = &step->chunks[i];
        for (int32_t r = 0; r < chunk->count; r++) {
            int32_t position = chunk->start + r, row = chunk->first + r;
            c->positions[row] = position;
            c->blocks[row] = step->tables[chunk->table + position / block_size];
            c->offsets[row] = position % block_size;
        }
        num_runs += (chunk->count + ATTEND_ROWS - 1) / ATTEND_ROWS;
    }
    int32_t num_tasks = num_runs * c->model->num_kv_heads;
    if (num_tasks > c->task_capacity) {
        attend_task *tasks = realloc(c->tasks, (size_t)num_tasks * sizeof *tasks);
        if (!tasks)
            return 0;
        c->tasks = tasks;
        c->task_capacity = num_tasks;
    }
    attend_task *task = c->tasks;
    for (int32_t head = 0; head < c->model->num_kv_heads; head++)
        for (int32_t i = 0; i < step->num_chunks; i++)
            for (int32_t r = 0, count = step->chunks[i].count; r < count; r += ATTEND_ROWS)
                *task++ = (attend_task){i, r, count - r < ATTEND_ROWS ? count - r : ATTEND_ROWS, head};
    c->num_tasks = num_tasks;
    return 1;
}

static octavo_rows all_rows(const buffer *b, int32_t rows, int32_t inputs)
{
    return (octavo_rows){.exact = b->exact, .rounded = b->rounded, .rows = rows, .inputs = inputs};
}

/* Round the columns [first, first + size) of a row; both are multiples of the group. */
static void round_columns(octavo_context *c, buffer *b, int32_t row, int32_t columns, int32_t first, int32_t size)
{
    if (!b->rounded.values)
        return;
    size_t at = (size_t)row * columns + first, group = at / OCTAVO_GROUP;
    c->kernels->round_row(b->exact + at, size, b->rounded.values + at, b->rounded.scales + group, b->rounded.sums + group);
}

static int32_t min32(int32_t a, int32_t b) { return a < b ? a : b; }

/* Rows per tile: a quarter of a thread's share. */
static int32_t rows_per_tile(const octavo_context *c, int32_t rows)
{
    int32_t size = rows / (4 * c->threads);
    return size > 0 ? size : 1;
}

static int32_t panels_per_tile(const octavo_context *c, const octavo_matrix *w, int32_t rows)
{
    int64_t work = (int64_t)w->inputs * OCTAVO_PANEL * rows;
    int32_t most = TILES * c->threads, even = (octavo_num_panels(w) + most - 1) / most;
    int32_t enough = (int32_t)((TILE_WORK + work - 1) / work);
    return rows > FEW_ROWS || enough > even ? enough : even;
}

typedef void (*rows_body)(octavo_context *c, int32_t first, int32_t end, const void *argument);

static void over_rows(octavo_context *c, pool_section *s, int32_t rows, rows_body body, const void *argument)
{
    int32_t size = rows_per_tile(c, rows), num_tiles = (rows + size - 1) / size;
    for (int32_t tile; (tile = section_claim(s)) < num_tiles; section_done(s))
        body(c, tile * size, min32((tile + 1) * size, rows), argument);
    section_wait(s, num_tiles);
}

static void product(octavo_context *c, pool_section *s, int32_t thread, const octavo_matrix *w, const octavo_rows *x, float *y,
                    int32_t add)
{
    int32_t size = panels_per_tile(c, w, x->rows), panels = octavo_num_panels(w);
    int32_t num_tiles = (panels + size - 1) / size;
    for (int32_t tile; (tile = section_claim(s)) < num_tiles; section_done(s)) {
        int32_t first = tile * size;
        c->kernels->linear(w, first, min32(size, panels - first), x, y + (size_t)first * OCTAVO_PANEL, (size_t)w->outputs, add,
                           c->scratch + c->scratch_bytes * thread);
    }
    section_wait(s, num_tiles);
}

static void gated_product(octavo_context *c, pool_section *s, int32_t thread, const octavo_matrix *w, const octavo_rows *x)
{
    int32_t ffn = c->model->ffn, panels = octavo_num_panels(w);
    int32_t most = x->rows > FEW_ROWS ? GATE_PANELS : GATE_PANELS * FEW_GATES, columns = most * OCTAVO_PANEL;
    int32_t num_tiles = (panels + most - 1) / most;
    float *gates = c->gates + (size_t)thread * c->row_capacity * GATE_COLUMNS;
    for (int32_t tile; (tile = section_claim(s)) < num_tiles; section_done(s)) {
        int32_t first = tile * most, count = min32(most, panels - first);
        int32_t column = first / 2 * OCTAVO_PANEL, size = count / 2 * OCTAVO_PANEL;
        c->kernels->linear(w, first, count, x, gates, (size_t)columns, 0, c->scratch + c->scratch_bytes * thread);
        for (int32_t row = 0; row < x->rows; row++) {
            const float *gate = gates + (size_t)row * columns;
            float *inner = c->inner.exact + (size_t)row * ffn + column;
            for (int32_t p = 0; p < count / 2; p++)
                c->kernels->silu_product(gate + 2 * p * OCTAVO_PANEL, gate + (2 * p + 1) * OCTAVO_PANEL, OCTAVO_PANEL,
                                         inner + p * OCTAVO_PANEL);
            round_columns(c, &c->inner, row, ffn, column, size);
        }
    }
    section_wait(s, num_tiles);
}

static void enter(octavo_context *c, int32_t first, int32_t end, const void *argument)
{
    (void)argument;
    const octavo_model *m = c->model;
    int32_t half = m->head_dim / 2;
    for (int32_t row = first; row < end; row++) {
        c->kernels->embed(&m->embedding, c->step.tokens[row], c->x + (size_t)row * m->hidden);
        for (int32_t i = 0; i < half; i++) {
            float angle = (float)c->positions[row] * m->frequencies[i];
            c->cos[(size_t)row * half + i] = cosf(angle);
            c->sin[(size_t)row * half + i] = sinf(angle);
        }
    }
}

static void norm_rows(octavo_context *c, int32_t first, int32_t end, const void *weight)
{
    const octavo_model *m = c->model;
    for (int32_t row = first; row < end; row++) {
        size_t at = (size_t)row * m->hidden;
        c->kernels->rms_norm(c->x + at, weight, m->norm_eps, m->hidden, c->normed.exact + at);
        round_columns(c, &c->normed, row, m->hidden, 0, m->hidden);
    }
}

static void norm_last(octavo_context *c, int32_t first, int32_t end, const void *argument)
{
    (void)argument;
    const octavo_model *m = c->model;
    for (int32_t i = first; i < end; i++) {
        const float *x = c->x + (size_t)c->step.sampling[i] * m->hidden;
        c->kernels->rms_norm(x, m->norm, m->norm_eps, m->hidden, c->normed.exact + (size_t)i * m->hidden);
        round_columns(c, &c->normed, i, m->hidden, 0, m->hidden);
    }
}

static void find_best(octavo_context *c, int32_t first, int32_t end, const void *argument)
{
    (void)argument;
    for (int32_t i = first; i < end; i++)
        c->step.best[i] = c->kernels->argmax(c->step.logits + (size_t)i * c->model->vocab, c->model->vocab);
}

static size_t qkv_columns(const octavo_model *m) { return ((size_t)m->num_heads + 2 * (size_t)m->num_kv_heads) * m->head_dim; }

static void place_rows(octavo_context *c, int32_t first, int32_t end, const void *argument)
{
    const octavo_model *m = c->model;
    size_t columns = qkv_columns(m), half = (size_t)m->head_dim / 2;
    for (int32_t row = first; row < end; row++)
        c->kernels->place_row(m, c->cache, *(const int32_t *)argument, c->qkv + row * columns, c->cos + row * half,
                              c->sin + row * half, c->blocks[row], c->offsets[row]);
}

static void attend_all(octavo_context *c, pool_section *s, int32_t thread, int32_t layer)
{
    const octavo_model *m = c->model;
    int32_t heads = m->num_heads * m->head_dim, share = heads / m->num_kv_heads;
    for (int32_t tile; (tile = section_claim(s)) < c->num_tasks; section_done(s)) {
        const attend_task *task = &c->tasks[tile];
        const octavo_chunk *chunk = &c->step.chunks[task->chunk];
        octavo_attend attend = {
            .model = m,
            .cache = c->cache,
            .table = c->step.tables + chunk->table,
            .qkv = c->qkv + (size_t)chunk->first * qkv_columns(m),
            .out = c->mixed.exact + (size_t)chunk->first * heads,
            .start = chunk->start,
            .first_row = task->first_row,
            .num_rows = task->num_rows,
            .layer = layer,
            .kv_head = task->kv_head,
        };
        c->kernels->attend(&attend, c->scratch + c->scratch_bytes * thread);
        for (int32_t r = 0; r < task->num_rows; r++)
            round_columns(c, &c->mixed, chunk->first + task->first_row + r, heads, task->kv_head * share, share);
    }
    section_wait(s, c->num_tasks);
}

static void run_layer(octavo_context *c, pool_section *s, int32_t thread, int32_t number)
{
    const octavo_model *m = c->model;
    const octavo_layer *layer = &m->layers[number];
    int32_t rows = c->step.num_rows;
    octavo_rows normed = all_rows(&c->normed, rows, m->hidden);
    octavo_rows mixed = all_rows(&c->mixed, rows, m->num_heads * m->head_dim);
    octavo_rows inner = all_rows(&c->inner, rows, m->ffn);
    over_rows(c, &s[NORM], rows, norm_rows, layer->attention_norm);
    product(c, &s[QKV], thread, &layer->qkv, &normed, c->qkv, 0);
    over_rows(c, &s[PLACE], rows, place_rows, &number);
    attend_all(c, &s[ATTEND], thread, number);
    product(c, &s[OUTPUT], thread, &layer->output, &mixed, c->x, 1);
    over_rows(c, &s[FFN_NORM], rows, norm_rows, layer->ffn_norm);
    gated_product(c, &s[GATE_UP], thread, &layer->gate_up, &normed);
    product(c, &s[DOWN], thread, &layer->down, &inner, c->x, 1);
}

static void run_step(void *state, int32_t thread)
{
    octavo_context *c = state;
    const octavo_model *m = c->model;
    pool_section *s = c->sections;
    over_rows(c, s++, c->step.num_rows, enter, NULL);
    for (int32_t layer = 0; layer < m->num_layers; layer++, s += PER_LAYER)
        run_layer(c, s, thread, layer);
    int32_t num_sampling = c->step.num_sampling;
    if (!num_sampling)
        return;
    octavo_rows last = all_rows(&c->normed, num_sampling, m->hidden);
    over_rows(c, s++, num_sampling, norm_last, NULL);
    product(c, s++, thread, &m->head, &last, c->step.logits, 0);
    over_rows(c, s++, num_sampling, find_best, NULL);
}

static int32_t num_sections(const octavo_model *m) { return 1 + m->num_layers * PER_LAYER + 3; }

static int32_t widest_input(const octavo_model *m)
{
    int32_t heads = m->num_heads * m->head_dim, widest = m->hidden > m->ffn ? m->hidden : m->ffn;
    return widest > heads ? widest : heads;
}

octavo_context *octavo_open(const octavo_model *model, const octavo_cache *cache, int32_t threads)
{
    octavo_context *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->model = model;
    c->cache = cache;
    c->kernels = octavo_choose_kernels(0);
    c->threads = threads;
    c->scratch_bytes = (octavo_scratch_bytes(widest_input(model)) + 63) / 64 * 64;
    c->scratch = allocate((size_t)threads, c->scratch_bytes);
    c->sections = allocate((size_t)num_sections(model), sizeof *c->sections);
    c->pool = c->scratch && c->sections ? pool_open(threads) : NULL;
    if (!c->pool || !reserve_rows(c, 1)) {
        octavo_close(c);
        return NULL;
    }
    return c;
}

int32_t octavo_run(octavo_context *c, const octavo_step *step)
{
    pool_settle(c->pool);
    c->step = *step;
    if (!is_within_bounds(c))
        return -2;
    if (!reserve_rows(c, step->num_rows > step->num_sampling ? step->num_rows : step->num_sampling) || !plan_step(c))
        return -1;
    for (int32_t i = 0; i < num_sections(c->model); i++)
        section_reset(&c->sections[i]);
    pool_run(c->pool, run_step, c);
    return 0;
}

void octavo_close(octavo_context *c)
{
    if (c->pool)
        pool_close(c->pool);
    release_rows(c);
    free(c->tasks);
    free(c->sections);
    free(c->scratch);
    free(c);
}
