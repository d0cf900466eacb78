// The 256-bit form of vpdpbusd that chips without AVX-512 have (Alder Lake and later, Zen 5).
#define QK_AVXVNNI
#include "avx2_isa.h"
#include "run.h"

extern "C" void qk_enter_dequant_matmul_avxvnni(qk::KernelTable* table) {
    table->matmul_prepare = &prepare_rows;
    table->matmul_run = &run_tiles;
    table->matmul_decode = &decode_panels;
}
