// gptq_update, avx2 tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/avx2.h"

namespace {
constexpr int kSide = 1, kApply = 4;
constexpr int kTall = 6, kWide = 1;  // 12 of 16 registers
}  // namespace
#include "product.h"
#include "search.h"

extern "C" void qk_enter_gptq_update_avx2(qk::KernelTable* table) {
    enter_search(table);
    enter_product(table);
}
