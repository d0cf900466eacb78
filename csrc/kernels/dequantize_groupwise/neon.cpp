// dequantize_groupwise, neon tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/neon.h"

#include "kernel.h"

extern "C" void qk_enter_dequantize_groupwise_neon(qk::KernelTable* table) { table->dequantize_groupwise = &dequantize; }
