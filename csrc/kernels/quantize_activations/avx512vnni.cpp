// quantize_activations, avx512vnni tier. Formula and numerics: README.md.
#include "qkern/lanes/avx512.h"

#include "rows.h"

extern "C" void qk_enter_quantize_activations_avx512vnni(qk::KernelTable* table) {
    table->quantize_activations = &quantize_activations;
}
