// The product of int8 activations and an 8-bit weight, for the bindings of the two ops that end in it.
#pragma once
#include "qkern/kernels.h"
#include "qkern/packed_weight.h"

namespace qk {

struct Int8Call {
    int64_t M;
    bool quantize;          // x to int8, a scale a token; else codes, scales and zeros are given
    const void* x;          // [M, row_stride] of x_dtype
    DType x_dtype;
    const int8_t* codes;    // [M, row_stride]
    int64_t row_stride;
    const float* scales;    // [M]
    const int32_t* zeros;   // [M] or null
    const void* bias;       // [N] or null
    DType bias_dtype;
    void* out;              // [M, N] of out_dtype
    DType out_dtype;
    bool int_out;           // out is int32 and gets the sums; K is at most exact_columns
};

// Columns whose int32 sum cannot overflow: |q - z| <= 128 or 255, |a - x_zero| <= 128 or 255.
int64_t exact_columns(const PackedView& view, bool x_zero);

// The caller has checked is_int8_weight and holds no lock of Python.
void run_int8(const PackedView& view, const Int8Call& call, int threads);

}  // namespace qk
