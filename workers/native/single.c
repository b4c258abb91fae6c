/* Single operations for tests and ablations: see octavo.h. */

#include <math.h>
#include <stdlib.h>

#include "kernels.h"

static int round_all(const octavo_kernels *kernels, octavo_rows *x)
{
    size_t rows = (size_t)x->rows, inputs = (size_t)x->inputs, groups = inputs / OCTAVO_GROUP;
    octavo_rounded *rounded = &x->rounded;
    *rounded = (octavo_rounded){malloc(rows * inputs), malloc(rows * groups * 4), malloc(rows * groups * 4)};
    if (!rounded->values || !rounded->scales || !rounded->sums)
        return 0;
    for (size_t r = 0; r < rows; r++)
        kernels->round_row(x->exact + r * inputs, x->inputs, rounded->values + r * inputs, rounded->scales + r * groups,
                           rounded->sums + r * groups);
    return 1;
}

int32_t octavo_linear(int32_t portable, const octavo_matrix *weight, int32_t arithmetic, const float *x, int32_t rows,
                      int32_t add, float *y)
{
    const octavo_kernels *kernels = octavo_choose_kernels(portable);
    octavo_rows all = {.exact = x, .rows = rows, .inputs = weight->inputs};
    void *scratch = aligned_alloc(64, (octavo_scratch_bytes(weight->inputs) + 63) / 64 * 64);
    int32_t result = scratch && (arithmetic == OCTAVO_EXACT || round_all(kernels, &all)) ? 0 : -1;
    if (!result)
        kernels->linear(weight, 0, octavo_num_panels(weight), &all, y, (size_t)weight->outputs, add, scratch);
    free(all.rounded.values);
    free(all.rounded.scales);
    free(all.rounded.sums);
    free(scratch);
    return result;
}

static void place_chunk(const octavo_kernels *kernels, const octavo_model *m, const octavo_cache *cache, const int32_t *table,
                        const octavo_chunk *chunk, int32_t layer, float *qkv, float *angles)
{
    int32_t half = m->head_dim / 2;
    size_t columns = ((size_t)m->num_heads + 2 * (size_t)m->num_kv_heads) * m->head_dim;
    for (int32_t r = 0; r < chunk->count; r++) {
        int32_t position = chunk->start + r;
        for (int32_t i = 0; i < half; i++) {
            angles[i] = cosf((float)position * m->frequencies[i]);
            angles[half + i] = sinf((float)position * m->frequencies[i]);
        }
        kernels->place_row(m, cache, layer, qkv + r * columns, angles, angles + half, table[position / cache->block_size],
                           position % cache->block_size);
    }
}

int32_t octavo_attention(int32_t portable, const octavo_model *model, const octavo_cache *cache, const octavo_step *step,
                         int32_t layer, float *qkv, float *out)
{
    const octavo_kernels *kernels = octavo_choose_kernels(portable);
    void *scratch = aligned_alloc(64, (octavo_scratch_bytes(model->head_dim) + 63) / 64 * 64);
    float *angles = malloc((size_t)model->head_dim * sizeof *angles);
    size_t heads = (size_t)model->num_heads * model->head_dim;
    size_t columns = heads + 2 * (size_t)model->num_kv_heads * model->head_dim;
    int32_t result = scratch && angles ? 0 : -1;
    for (int32_t i = 0; !result && i < step->num_chunks; i++) {
        const octavo_chunk *chunk = &step->chunks[i];
        const int32_t *table = step->tables + chunk->table;
        place_chunk(kernels, model, cache, table, chunk, layer, qkv + (size_t)chunk->first * columns, angles);
        for (int32_t head = 0; head < model->num_kv_heads; head++) {
            octavo_attend task = {model, cache, table, qkv + (size_t)chunk->first * columns, out + (size_t)chunk->first * heads,
                                  chunk->start, 0, chunk->count, layer, head};
            kernels->attend(&task, scratch);
        }
    }
    free(angles);
    free(scratch);
    return result;
}

void octavo_elementwise(int32_t portable, int32_t operation, const float *x, const float *weight, float eps, int32_t size,
                        float *out)
{
    const octavo_kernels *kernels = octavo_choose_kernels(portable);
    if (operation == 0)
        kernels->rms_norm(x, weight, eps, size, out);
    else
        kernels->silu_product(x, weight, size, out);
}

void octavo_round_row(int32_t portable, const float *x, int32_t size, int8_t *values, float *scales, float *sums)
{
    octavo_choose_kernels(portable)->round_row(x, size, values, scales, sums);
}

int32_t octavo_argmax(int32_t portable, const float *x, int32_t size) { return octavo_choose_kernels(portable)->argmax(x, size); }
