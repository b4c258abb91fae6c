/* The kernels for x86 CPUs with AVX2, FMA and F16C. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define OCTAVO_AVX2 1
#define OCTAVO_TABLE octavo_kernels_avx2
#define OCTAVO_TABLE_NAME "avx2"
#include "kernels.inc"
#endif
