// Plain types that cross the boundary between bindings, dispatch and kernels. No Python, no torch, no STL.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace qk {

// Order is shared with python/qkern/ops/_native.py.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

enum class Status : int {
    ok = 0,
    non_finite = 1,     // an input value is NaN or Inf where that is an error
    scale_overflow = 2, // a scale does not fit its dtype
    code_range = 3,     // a code does not fit its bits
};

}  // namespace qk
