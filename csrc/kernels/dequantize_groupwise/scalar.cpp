// dequantize_groupwise, scalar tier. Formula and numerics: README.md.
#include "qkern/lanes/scalar.h"

#include "kernel.h"

extern "C" void qk_enter_dequantize_groupwise_scalar(qk::KernelTable* table) {
    table->dequantize_groupwise = &dequantize;
}
