/* The C side of the engine `paged` on a CPU: one call computes one step of a Llama-family decoder.

   Owns no memory but its threads and their scratch: weights, cache and buffers belong to the caller, who keeps them alive
   and unmoved during a call. Knows rows, blocks and token ids; no sequences, no sampling, no files. Python sees this
   header through ctypes (library.py mirrors it field by field), so it names no type of torch, numpy or Python.

   Rows of a step: decodes (chunks of one row) and longer chunks in any order, each a run of consecutive rows.

   Packed matrices. A weight [outputs, inputs] is stored in panels of 16 outputs, the last one padded with zeros:

     F32    inputs x 16 float                                            element i of all 16 outputs, then i + 1
     BF16   inputs x 16 bf16
     Q8     per group of 32 inputs:  scale[16] fp16 | 8 quads x 16 outputs x 4 B                      544 bytes
            byte b of quad j of an output: input 4 j + b; weight = scale * (byte - 128)
     Q4     per group of 32 inputs:  scale[16] fp16 | minimum[16] fp16 | 4 octets x 16 outputs x 4 B       320 bytes
            byte b of octet j of an output: input 8 j + b in its low nibble, input 8 j + 4 + b in its high one
            weight = scale * nibble + minimum

   Arithmetic. OCTAVO_EXACT multiplies fp32 activations with the weights as they are; OCTAVO_INT8 rounds activations to int8
   per row and group of 32 inputs (largest absolute value = 127) where the weight is Q8 or Q4. The residual stream, norms,
   rotary embedding, softmax and all sums are fp32. */

#ifndef OCTAVO_H
#define OCTAVO_H

#include <stdint.h>

#define OCTAVO_ABI 1
#define OCTAVO_PANEL 16
#define OCTAVO_GROUP 32

enum octavo_format { OCTAVO_F32 = 0, OCTAVO_BF16 = 1, OCTAVO_Q8 = 2, OCTAVO_Q4 = 3 };
enum octavo_arithmetic { OCTAVO_EXACT = 0, OCTAVO_INT8 = 1 };
enum octavo_cache_type { OCTAVO_CACHE_F32 = 0, OCTAVO_CACHE_F16 = 1 };

typedef struct {
    const void *data;  /* packed, 64-byte aligned */
    const float *bias; /* [outputs], or NULL */
    int32_t format, outputs, inputs;
} octavo_matrix;

/* gate_up has its panels interleaved: 16 outputs of gate, the same 16 of up, the next 16 of gate, ... So ffn is a
   multiple of 16. */
typedef struct {
    const float *attention_norm, *ffn_norm;  /* [hidden] */
    const float *query_norm, *key_norm;      /* [head_dim], or NULL */
    octavo_matrix qkv, output, gate_up, down;
} octavo_layer;

typedef struct {
    int32_t hidden, num_layers, num_heads, num_kv_heads, head_dim, ffn, vocab;
    int32_t arithmetic;
    float norm_eps;
    const float *norm;        /* [hidden], of the last norm */
    const float *frequencies; /* [head_dim / 2] angle per position */
    octavo_matrix embedding;  /* [vocab, hidden]; the same data as head where they are tied */
    octavo_matrix head;       /* [vocab, hidden] */
    const octavo_layer *layers;
} octavo_model;

/* Keys and values: [layer, 2, block, kv_head, block_size, head_dim]. */
typedef struct {
    void *data;
    int32_t type, num_blocks, block_size;
} octavo_cache;

/* The rows [first, first + count) of one sequence, whose positions are start, start + 1, ... */
typedef struct {
    int32_t first, count, start;
    int32_t table; /* index into octavo_step.tables of its block table, which covers start + count tokens */
} octavo_chunk;

typedef struct {
    int32_t num_rows, num_chunks, num_sampling;
    const int32_t *tokens; /* [num_rows] */
    const octavo_chunk *chunks;
    const int32_t *tables;
    const int32_t *sampling; /* [num_sampling] rows whose logits are wanted */
    float *logits;           /* [num_sampling, vocab] */
    int32_t *best;           /* [num_sampling] the lowest token of the largest logit; -1 if the row has a NaN or infinity */
} octavo_step;

typedef struct octavo_context octavo_context;

/* Number of the ABI; a caller that was written for another one must not go on. */
int32_t octavo_abi(void);

/* Name of the instruction set that this process uses: "avx2" or "portable". */
const char *octavo_instructions(void);

/* Make threads for a model. The calling thread of octavo_run is one of `threads`. NULL: no memory or no threads. */
octavo_context *octavo_open(const octavo_model *model, const octavo_cache *cache, int32_t threads);

/* Compute `step`, which has a row. One call at a time per context, none after octavo_close. Returns 0; -1 if there is no
   memory for the step's rows; -2, having computed nothing, for a token that the model or a block that the cache has not. */
int32_t octavo_run(octavo_context *context, const octavo_step *step);

void octavo_close(octavo_context *context);

/* Single operations in the calling thread, as tests and ablations take them. `portable` takes the kernels for any CPU. */

/* y [rows, outputs] = x [rows, inputs] * weight + bias; added to y with `add`. Returns 0, or -1 without memory. */
int32_t octavo_linear(int32_t portable, const octavo_matrix *weight, int32_t arithmetic, const float *x, int32_t rows,
                      int32_t add, float *y);

/* Normalise where the layer has norms, rotate, store keys and values, attend: layer `layer` of a step.
   qkv [num_rows, (num_heads + 2 num_kv_heads) * head_dim] is overwritten; out is [num_rows, num_heads * head_dim].
   Returns 0, or -1 without memory. */
int32_t octavo_attention(int32_t portable, const octavo_model *model, const octavo_cache *cache, const octavo_step *step,
                         int32_t layer, float *qkv, float *out);

/* What is the same for every row or element: `operation` 0 rms_norm (x, weight, eps), 1 silu_product (x, weight as up). */
void octavo_elementwise(int32_t portable, int32_t operation, const float *x, const float *weight, float eps, int32_t size,
                        float *out);

/* See kernels.h. */
void octavo_round_row(int32_t portable, const float *x, int32_t size, int8_t *values, float *scales, float *sums);
int32_t octavo_argmax(int32_t portable, const float *x, int32_t size);

#endif
