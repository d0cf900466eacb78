#include "avx2_isa.h"
#include "run.h"

extern "C" void qk_enter_dequant_matmul_avx2(qk::KernelTable* table) {
    table->matmul_prepare = &prepare_rows;
    table->matmul_run = &run_tiles;
    table->matmul_decode = &decode_panels;
}
