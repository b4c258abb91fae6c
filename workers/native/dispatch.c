/* Chooses the kernels for the CPU that this process runs on. */
#include "kernels.h"

int32_t octavo_abi(void) { return OCTAVO_ABI; }

const char *octavo_instructions(void) { return octavo_choose_kernels(0)->name; }

const octavo_kernels *octavo_choose_kernels(int32_t portable)
{
    if (portable)
        return &octavo_kernels_portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return &octavo_kernels_avx2;
#endif
    return &octavo_kernels_portable;
}
