// dequantize_groupwise, avx512 tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/avx512.h"

#include "kernel.h"

extern "C" void qk_enter_dequantize_groupwise_avx512(qk::KernelTable* table) { table->dequantize_groupwise = &dequantize; }
