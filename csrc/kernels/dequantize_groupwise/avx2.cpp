// dequantize_groupwise, avx2 tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/avx2.h"

#include "kernel.h"

extern "C" void qk_enter_dequantize_groupwise_avx2(qk::KernelTable* table) { table->dequantize_groupwise = &dequantize; }
