/* What each instruction set implements, and the only thing that llama.c calls: a table of functions.

   kernels_<set>.c defines one table by including linear.inc, attention.inc and elementwise.inc below a
   `#pragma GCC target`; dispatch.c chooses. All functions are called by several threads at once on disjoint outputs, and
   allocate nothing: `scratch` has octavo_scratch_bytes(of the widest input) bytes, 64-byte aligned, the caller's own. */

#ifndef OCTAVO_KERNELS_H
#define OCTAVO_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "octavo.h"

/* Activations rounded to int8: element = scale * value. Groups of OCTAVO_GROUP inputs. */
typedef struct {
    int8_t *values; /* [rows][inputs] */
    float *scales;  /* [rows][inputs / 32] */
    float *sums;    /* [rows][inputs / 32] scale * sum of the group's values */
} octavo_rounded;

/* Rows of one side of a product. `rounded.values` is NULL unless the product is in int8. */
typedef struct {
    const float *exact; /* [rows][inputs] */
    octavo_rounded rounded;
    int32_t rows, inputs;
} octavo_rows;

/* What a task of attention computes: every query head of one key head, for some rows of one chunk. */
typedef struct {
    const octavo_model *model;
    const octavo_cache *cache;
    const int32_t *table;     /* of the chunk */
    const float *qkv;         /* of the chunk's first row; rotated */
    float *out;               /* of the chunk's first row: [rows][num_heads * head_dim] */
    int32_t start;            /* position of the chunk's first row */
    int32_t first_row, num_rows; /* those of the chunk that the task computes; keys and values of all are stored */
    int32_t layer, kv_head;
} octavo_attend;

typedef struct {
    const char *name;

    /* y[r][o] = sum of x[r][i] * w[o][i] + bias[o] for the outputs of `num_panels` panels from `first_panel`. `y` points
       at column first_panel * 16 of row 0 and has `stride` columns; `add` adds to what is there. Never writes columns
       beyond the matrix's outputs. */
    void (*linear)(const octavo_matrix *weight, int32_t first_panel, int32_t num_panels, const octavo_rows *x, float *y,
                   size_t stride, int32_t add, void *scratch);

    /* Row `token` of an embedding: out [inputs]. */
    void (*embed)(const octavo_matrix *weight, int32_t token, float *out);

    /* out = x * weight / sqrt(mean(x^2) + eps), all [size]. May be done in place. */
    void (*rms_norm)(const float *x, const float *weight, float eps, int32_t size, float *out);

    /* Round one row to int8; `size` is a multiple of OCTAVO_GROUP. */
    void (*round_row)(const float *x, int32_t size, int8_t *values, float *scales, float *sums);

    /* out = silu(gate) * up, all [size]. */
    void (*silu_product)(const float *gate, const float *up, int32_t size, float *out);

    /* Normalise (where the layer has norms) and rotate the query and key heads of one row of qkv in place, and store its
       key and value. `cos`, `sin` are [head_dim / 2] of the row's position, `block` and `offset` its place. */
    void (*place_row)(const octavo_model *model, const octavo_cache *cache, int32_t layer, float *qkv, const float *cos,
                      const float *sin, int32_t block, int32_t offset);

    void (*attend)(const octavo_attend *task, void *scratch);

    /* First index of the largest of x [size]; -1 if one is not finite. */
    int32_t (*argmax)(const float *x, int32_t size);
} octavo_kernels;

extern const octavo_kernels octavo_kernels_portable;
extern const octavo_kernels octavo_kernels_avx2;

/* The best table for this CPU, or the one for any. */
const octavo_kernels *octavo_choose_kernels(int32_t portable);

/* Bytes of scratch that any kernel may use for products with up to `inputs` inputs: four panels in fp32, and as much
   again as attention needs, which does not grow with the context. */
static inline size_t octavo_scratch_bytes(int32_t inputs)
{
    return (size_t)inputs * OCTAVO_PANEL * 4 * 4 + ((size_t)256 << 10);
}

static inline int32_t octavo_num_panels(const octavo_matrix *weight)
{
    return (weight->outputs + OCTAVO_PANEL - 1) / OCTAVO_PANEL;
}

/* Bytes of one packed panel. */
static inline size_t octavo_panel_bytes(const octavo_matrix *weight)
{
    size_t inputs = (size_t)weight->inputs, groups = inputs / OCTAVO_GROUP;
    switch (weight->format) {
    case OCTAVO_F32: return inputs * OCTAVO_PANEL * 4;
    case OCTAVO_BF16: return inputs * OCTAVO_PANEL * 2;
    case OCTAVO_Q8: return groups * 544;
    default: return groups * 320;
    }
}

#endif
