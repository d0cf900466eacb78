// gptq_update, neon tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/neon.h"

#include "kernel.h"

extern "C" void qk_enter_gptq_update_neon(qk::KernelTable* table) { table->gptq_update = &update; }
