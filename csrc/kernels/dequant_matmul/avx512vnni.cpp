#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about uninitialized values inside its own AVX512 header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
// Coalescing makes it carry every sum of a tile through the stack: half the speed with 24 sums.
#pragma GCC optimize("no-tree-coalesce-vars")
#endif
#include "avx512_isa.h"
#include "digits.h"
#include "prepare.h"
#include "run.h"

extern "C" void qk_enter_dequant_matmul_avx512vnni(qk::KernelTable* table) {
    table->matmul_prepare = &prepare_rows;
    table->matmul_run = &run_tiles;
    table->matmul_prepare_digits = &prepare_digits;
    table->matmul_run_digits = &run_digits;
    table->matmul_decode = &decode_panels;
}
