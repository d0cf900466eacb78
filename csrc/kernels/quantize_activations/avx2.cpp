// quantize_activations, avx2 tier. Formula and numerics: README.md.
#include "qkern/lanes/avx2.h"

#include "rows.h"

extern "C" void qk_enter_quantize_activations_avx2(qk::KernelTable* table) {
    table->quantize_activations = &quantize_activations;
}
