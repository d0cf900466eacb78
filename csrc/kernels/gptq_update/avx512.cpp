// gptq_update, avx512 tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/avx512.h"

#include "kernel.h"

extern "C" void qk_enter_gptq_update_avx512(qk::KernelTable* table) { table->gptq_update = &update; }
