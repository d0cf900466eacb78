// The signature of every kernel, and the table that dispatch fills. Kernels work on a range of rows that
// the caller chose; they do not allocate, throw, print or read the environment, and never start threads.
//
// csrc/kernels/<op>/<tier>.cpp defines  extern "C" void qk_enter_<op>_<tier>(qk::KernelTable*)  which
// writes its functions into the table.
#pragma once
#include "qkern/types.h"

namespace qk {

// quantize_groupwise ------------------------------------------------------------------------------------

struct QuantizeArgs {
    const void* weight;       // [rows, row_stride] of dtype
    DType dtype;
    int64_t row_stride;       // elements between rows
    int64_t K;
    int64_t group_size;       // 1..K
    int bits;                 // 2, 3, 4, 8
    bool asymmetric;
    DType scale_dtype;
    uint32_t* codes;          // [rows, code_words]
    int64_t code_words;       // ceil(K * bits / 32)
    void* scales;             // [rows, groups] of scale_dtype
    uint8_t* zeros;           // [rows, groups] or null
};
// Rows [begin, end). non_finite if a weight is NaN or Inf (outputs of that row are then unspecified).
using QuantizeGroupwiseFn = Status (*)(const QuantizeArgs& args, int64_t begin, int64_t end);

struct KernelTable {
    QuantizeGroupwiseFn quantize_groupwise = nullptr;
};

}  // namespace qk
