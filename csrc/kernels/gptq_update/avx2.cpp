// gptq_update, avx2 tier. Formula, layout and numerics: README.md.
#include "qkern/lanes/avx2.h"

namespace {
constexpr int kSide = 1, kApply = 4;
constexpr int kTall = 6, kWide = 1;  // 12 of 16 registers
}  // namespace
#include "product.h"
#include "search.h"

extern "C" void qk_enter_gptq_update_avx2(qk::KernelTable* table) {
    table->gptq_update = &update;
    table->gptq_search = &search;
    table->gptq_improve = &improve;
    table->pack_product = &pack_product;
    table->product = &product;
    table->product_width = static_cast<int>(kWidth);
    table->product_height = kTall;
}
