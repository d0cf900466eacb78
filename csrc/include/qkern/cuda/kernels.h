// What the module `_cuda` launches. Pointers are to device memory; every function returns 0 or a CUDA error code,
// and only enqueues work on the stream.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "qkern/kernels.h"
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
constexpr int64_t kFewTokens = 16;     // rows of x that a block takes with 64 rows of the weight
constexpr int64_t kMatmulTokens = 64;  // most rows of x; with offsets kFewTokens
int dequant_matmul(const MatmulArgs& args, void* stream);
int dequant_matmul_batch(const MatmulArgs& args, void* stream);  // what the former calls beyond kFewTokens

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

// quantize_activations --------------------------------------------------------------------------------------

struct QuantizeActivationsArgs {
    const void* x;  // [M, x_stride] of dtype
    DType dtype;
    int64_t M;
    int64_t K;
    int64_t x_stride;
    int64_t group_size;  // 1 .. K
    int64_t groups;
    const float* scale;  // [1], given: with it there is one group; or null
    int zero;            // goes with scale
    int8_t* codes;       // [M, K]
    float* scales;       // [M, groups]
};
int quantize_activations(const QuantizeActivationsArgs& args, void* stream);

// int8_matmul -----------------------------------------------------------------------------------------------

// What becomes of the sums of a row of x and a row of the weight.
struct Int8Output {
    const float* x_scales;  // [M]; null: nothing, they are the output
    const float* x_sums;    // [M], of x less its zero points; with offsets
    const void* bias;       // [N] of bias_dtype, or null
    DType bias_dtype;
    void* out;  // [M, N] of dtype, or int32
    DType dtype;
};

struct Int8MatmulArgs {
    Weight weight;    // of 8 bits and one group
    const int8_t* x;  // [M, x_stride], 8-byte aligned rows
    int64_t M;
    int64_t K;
    int64_t x_stride;
    const int8_t* x_zeros;  // [M], or null
    Int8Output output;
    int32_t* partials;      // [segments * splits, M, N] where blocks cannot share memory or segments are several; else null
    int64_t segment_tiles;  // tiles of the layout whose sums fit int32
    int segments;
    int splits;  // blocks along a segment
};
int int8_matmul(const Int8MatmulArgs& args, void* stream);

struct ScaleSumsArgs {
    const int32_t* sums;  // [segments * splits, M, sums_stride], of rows of the weight from first_row on
    int64_t sums_stride;
    int segments;
    int splits;
    Weight weight;
    int64_t M;
    int64_t first_row;
    int64_t rows;
    // What zero points still take, of each segment; null where there are none, and where int8_matmul took it.
    const int8_t* x_zeros;       // [M]
    const int32_t* activations;  // [segments, M]: sums of x less its zero points
    const int32_t* codes;        // [segments, sums_stride]: sums of q - 128
    Int8Output output;
};
int scale_sums(const ScaleSumsArgs& args, void* stream);

struct DecodeCodesArgs {
    Weight weight;
    int64_t first_row;  // a multiple of 64
    int64_t rows;       // too
    int8_t* out;        // [rows, whole tiles of the layout]: q - 128
};
int decode_codes(const DecodeCodesArgs& args, void* stream);

// dequantize_groupwise --------------------------------------------------------------------------------------

struct DequantizeArgs {
    const uint32_t* codes;  // [rows, code_words]
    int64_t code_words;
    int64_t rows;
    int64_t K;
    int64_t group_size;          // at least 1
    int64_t groups;              // columns of scales
    int bits;
    const float* table;          // [16] on the device, with a codebook
    DType scale_dtype;
    const void* scales;          // [scale rows, groups]
    const uint8_t* zeros;        // the same, or null
    const void* offsets;         // of scale_dtype, or null; excludes zeros
    const int32_t* group_index;  // [K] in 0..groups-1, or null
    int64_t rows_per_scale;      // rows that share a row of scales
    void* out;                   // [rows, out_stride] of out_dtype
    DType out_dtype;
    int64_t out_stride;
};
int dequantize_groupwise(const DequantizeArgs& args, void* stream);

// quantize_groupwise ----------------------------------------------------------------------------------------

// How the nearest entry of a codebook is found: its position is the number of thresholds that lie below.
struct Codebook {
    float ordered[16];  // the values, ascending
    float thresholds[15];
    uint8_t codes[16];  // of the positions
    int entries;        // of ordered; 0: a uniform grid
};

struct QuantizeArgs {
    const void* weight;  // [rows, row_stride] of dtype
    DType dtype;
    int64_t rows;
    int64_t row_stride;
    int64_t K;
    int64_t group_size;  // at least 1
    int64_t groups;
    int bits;
    bool asymmetric;
    Codebook codebook;
    bool search_mse;
    const float* importance;    // [rows, importance_stride], or null
    int64_t importance_stride;  // 0: one row serves all
    DType scale_dtype;
    void* scales;           // [grid rows, groups]
    uint8_t* zeros;         // the same, or null
    bool grid_given;        // scales and zeros are read, not chosen
    int64_t rows_per_grid;  // with grid_given: rows that share a row of scales
    uint32_t* codes;        // [rows, code_words], or null: the grid only
    int64_t code_words;
    int* flags;  // [2], zero before: set where a weight is not finite, where a scale overflows its dtype
};
int quantize_groupwise(const QuantizeArgs& args, void* stream);

// gptq_update -----------------------------------------------------------------------------------------------

struct GptqUpdateArgs {
    const float* weight;  // [N, weight_stride]
    int64_t weight_stride;
    int64_t N;
    int64_t B;
    const float* hinv;           // [B, B], its upper triangle
    const float* scales;         // [N, groups]
    const uint8_t* zeros;        // [N, groups]; null with a codebook
    int64_t groups;
    const int32_t* group_index;  // [B]
    int bits;
    int codebook;    // 0 none, 1 nf4, 2 fp4
    uint8_t* codes;  // [N, codes_stride]
    int64_t codes_stride;
    float* errors;  // [N, B]
    float* losses;  // [N], or null: the squared errors of a row, added in ascending order
    bool narrow;    // as on a device with little shared memory
};
int gptq_update(const GptqUpdateArgs& args, void* stream);

// pack_bits, unpack_bits ------------------------------------------------------------------------------------

struct PackBitsArgs {
    uint8_t* codes;        // [N, codes_stride]: read by pack, written by unpack
    int64_t codes_stride;  // elements between rows
    int64_t N;
    int64_t K;
    int bits;
    BitLayout layout;
    uint32_t* packed;  // contiguous, shape by layout: see csrc/kernels/pack_bits/README.md
    int* flag;         // of pack, zero before: 1 after if a code has bits beyond `bits`; null: nobody asks
};
int pack_bits(const PackBitsArgs& args, void* stream);
int unpack_bits(const PackBitsArgs& args, void* stream);

}  // namespace qk::cuda
