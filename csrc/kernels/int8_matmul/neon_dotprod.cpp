#include "neon_isa.h"
#include "tiles.h"

extern "C" void qk_enter_int8_matmul_neon_dotprod(qk::KernelTable* table) {
    table->int8_prepare = &prepare_int8;
    table->int8_matmul = &multiply_int8;
    table->int8_bytes = sizeof(X);
}
