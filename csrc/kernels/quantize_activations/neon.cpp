#include "rows.h"

extern "C" void qk_enter_quantize_activations_neon(qk::KernelTable* table) {
    table->quantize_activations = &quantize_activation_rows;
}
