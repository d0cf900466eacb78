// quantize_groupwise, avx512 tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/avx512.h"

#define QK_TWO_BITS
#include "two_bits.h"
#include "kernel.h"

extern "C" void qk_enter_quantize_groupwise_avx512(qk::KernelTable* table) { table->quantize_groupwise = &quantize; }
