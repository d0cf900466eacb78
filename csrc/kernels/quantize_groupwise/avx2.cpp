// quantize_groupwise, avx2 tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/avx2.h"

#include "kernel.h"

extern "C" void qk_enter_quantize_groupwise_avx2(qk::KernelTable* table) { table->quantize_groupwise = &quantize; }
