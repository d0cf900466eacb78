// quantize_activations, neon tier. Formula and numerics: README.md.
#include "qkern/lanes/neon.h"

#include "rows.h"

extern "C" void qk_enter_quantize_activations_neon(qk::KernelTable* table) {
    table->quantize_activations = &quantize_activations;
}
