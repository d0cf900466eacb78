// gptq_update, neon tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/neon.h"

namespace {
constexpr int kSide = 1, kApply = 4;
constexpr int kTall = 6, kWide = 1;  // 24 of 32 registers
}  // namespace
#include "product.h"
#include "search.h"

extern "C" void qk_enter_gptq_update_neon(qk::KernelTable* table) {
    table->gptq_update = &update;
    table->gptq_search = &search;
    table->gptq_improve = &improve;
    table->pack_product = &pack_product;
    table->product = &product;
    table->product_width = static_cast<int>(kWidth);
    table->product_height = kTall;
}
