#include "rows.h"

extern "C" void qk_enter_quantize_activations_scalar(qk::KernelTable* table) {
    table->quantize_activations = &quantize_activation_rows;
}
