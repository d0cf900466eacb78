// quantize_groupwise, scalar tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/scalar.h"

#include "kernel.h"

extern "C" void qk_enter_quantize_groupwise_scalar(qk::KernelTable* table) { table->quantize_groupwise = &quantize; }
