// gptq_update, scalar tier. Formula and blocking: README.md.
#include "qkern/lanes/scalar.h"

#include "kernel.h"

extern "C" void qk_enter_gptq_update_scalar(qk::KernelTable* table) { table->gptq_update = &update; }
