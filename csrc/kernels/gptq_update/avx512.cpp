// gptq_update, avx512 tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/avx512.h"

namespace {
constexpr int kSide = 2, kApply = 8;
constexpr int kTall = 14, kWide = 2;  // 28 of 32 registers
}  // namespace
#include "product.h"
#include "search.h"

extern "C" void qk_enter_gptq_update_avx512(qk::KernelTable* table) {
    enter_search(table);
    enter_product(table);
}
