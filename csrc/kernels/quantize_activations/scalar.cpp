// quantize_activations, scalar tier. Formula and numerics: README.md.
#include "qkern/lanes/scalar.h"

#include "rows.h"

extern "C" void qk_enter_quantize_activations_scalar(qk::KernelTable* table) {
    table->quantize_activations = &quantize_activations;
}
