/* The kernels for any CPU. */
#define OCTAVO_TABLE octavo_kernels_portable
#define OCTAVO_TABLE_NAME "portable"
#include "kernels.inc"
