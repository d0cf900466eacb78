// gptq_update, scalar tier. Formula and blocking: README.md.
#include "qkern/lanes/scalar.h"

namespace {
constexpr int kSide = 1, kApply = 2;
}  // namespace
#include "search.h"

extern "C" void qk_enter_gptq_update_scalar(qk::KernelTable* table) {
    enter_search(table);
}
