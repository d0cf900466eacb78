// gptq_update, avx2 tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/avx2.h"

#include "kernel.h"

extern "C" void qk_enter_gptq_update_avx2(qk::KernelTable* table) { table->gptq_update = &update; }
