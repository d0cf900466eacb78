// AVX512-BF16: adds compute float of bf16 activations to what the avx512vnni tier has.
#if defined(__GNUC__) && !defined(__clang__)
// See avx512vnni.cpp.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC optimize("no-tree-coalesce-vars")
#endif
#include "avx512_isa.h"
#include "bf16.h"

extern "C" void qk_enter_dequant_matmul_avx512bf16(qk::KernelTable* table) {
    table->matmul_prepare_pairs = &prepare_pairs;
    table->matmul_run_pairs = &run_pairs;
}
