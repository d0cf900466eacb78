// quantize_groupwise, neon tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/neon.h"

#include "kernel.h"

extern "C" void qk_enter_quantize_groupwise_neon(qk::KernelTable* table) { table->quantize_groupwise = &quantize; }
