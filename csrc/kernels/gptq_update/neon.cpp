// gptq_update, neon tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/neon.h"

namespace {
constexpr int kSide = 1, kApply = 4;
constexpr int kTall = 6, kWide = 1;  // 24 of 32 registers
}  // namespace
#include "product.h"
#include "search.h"

extern "C" void qk_enter_gptq_update_neon(qk::KernelTable* table) {
    enter_search(table);
    enter_product(table);
}
