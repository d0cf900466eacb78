// gptq_update, avx512vnni tier: the products in fixed point. Arithmetic: README.md.
#if defined(__GNUC__) && !defined(__clang__)
// Coalescing makes GCC 12 carry every sum of a tile through the stack.
#pragma GCC optimize("no-tree-coalesce-vars")
#endif
#include <immintrin.h>

#include <cstring>

#include "fixed.h"

extern "C" void qk_enter_gptq_update_avx512vnni(qk::KernelTable* table) {
    table->fixed_product = {&fixed::pack, &fixed::product, fixed::kWidth, fixed::kTall, sizeof(fixed::Panel)};
}
