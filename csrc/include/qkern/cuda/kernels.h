// What the module `_cuda` launches. Pointers are to device memory; every function returns 0 or a CUDA error code,
// and only enqueues work on the stream.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "qkern/types.h"

namespace qk::cuda {

// dequant_matmul: the layout is in csrc/kernels/dequant_matmul/cuda_layout.h.

enum class Shift : int { none = 0, zeros = 1, offsets = 2 };

struct Weight {
    const uint8_t* codes;
    const void* scales;
    const void* shifts;  // uint8 zero points, or offsets of the scales' dtype
    int64_t N;
    int64_t groups;
    int64_t group_columns;  // of the layout: a multiple of 32
    int bits;
    Shift shift;
    DType scale_dtype;
    bool codebook;
    uint32_t table[8];  // codebook, in the dtype of the activations: the low bytes of its 16 values, then the high ones
};

struct MatmulArgs {
    Weight weight;
    const void* x;  // [M, x_stride] of dtype, columns in the layout's order, 16-byte aligned rows
    DType dtype;    // f16 or bf16
    int64_t M;
    int64_t K;  // columns of x, a multiple of 8; those of the layout beyond them count as zero
    int64_t x_stride;
    const void* bias;  // [N] of bias_dtype, or null
    DType bias_dtype;
    void* out;        // [M, N] of dtype
    float* partials;  // [splits, M, N] where blocks cannot share memory; else null
    int splits;       // blocks along K
};
constexpr int64_t kMatmulTokens = 16;  // most rows of x
int dequant_matmul(const MatmulArgs& args, void* stream);

struct GatherArgs {
    const void* x;  // [M, x_stride] of 2-byte items
    int64_t M;
    int64_t K;
    int64_t x_stride;
    const int32_t* columns;  // [padded]: the column of x, or -1 for a zero; null: their own, zeros beyond K
    int64_t padded;
    void* out;  // [M, padded]
};
int gather_columns(const GatherArgs& args, void* stream);

struct DecodeArgs {
    Weight weight;
    const float* table;  // [16] on the device, with a codebook
    int64_t first_row;   // a multiple of 64
    int64_t rows;
    void* out;  // [rows, padded columns of the layout] of dtype
    DType dtype;
};
int decode_weight(const DecodeArgs& args, void* stream);

}  // namespace qk::cuda
