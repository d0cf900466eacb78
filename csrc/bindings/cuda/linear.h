// A packed weight as the bindings of `_cuda` hold it: where its parts lie and what they are. It has no memory of its own.
#pragma once
#include <stdint.h>

#include <array>

#include "qkern/cuda/kernels.h"

namespace qk::cuda {

struct Linear {
    Weight weight;
    uintptr_t table;  // fp32, of a codebook
    std::array<std::array<uint32_t, 8>, 2> tables;  // its bytes in f16 and bf16
};

}  // namespace qk::cuda
