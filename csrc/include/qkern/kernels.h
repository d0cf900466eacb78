// The signature of every kernel, and the table that dispatch fills. Kernels work on a range of rows that
// the caller chose; they do not allocate, throw, print or read the environment, and never start threads.
//
// csrc/kernels/<op>/<tier>.cpp defines  extern "C" void qk_enter_<op>_<tier>(qk::KernelTable*)  which
// writes its functions into the table.
#pragma once
#include "qkern/gguf_blocks.h"
#include "qkern/types.h"

namespace qk {

// quantize_groupwise ------------------------------------------------------------------------------------

struct QuantizeArgs {
    const void* weight;         // [rows, row_stride] of dtype
    DType dtype;
    int64_t row_stride;         // elements between rows
    int64_t K;
    int64_t group_size;         // at least 1
    int64_t groups;             // ceil(K / group_size), at least 1 per channel
    int bits;                   // 2, 3, 4, 8
    bool asymmetric;
    int codebook;               // 0: none, 1: nf4, 2: fp4
    bool search_mse;            // else min-max
    const float* importance;    // [rows, importance_stride] or null; only with search_mse
    int64_t importance_stride;  // 0: one row serves all
    DType scale_dtype;
    void* scales;               // [grid rows, groups] of scale_dtype
    uint8_t* zeros;             // [grid rows, groups], or null
    bool grid_given;            // scales and zeros are read, not chosen
    int64_t rows_per_grid;      // with grid_given: rows that share a row of scales; else 1
    uint32_t* codes;            // [rows, code_words], or null: choose the grid only
    int64_t code_words;         // ceil(K * bits / 32)
    bool streamed;              // codes go past the caches: they do not fit in them
};
// Rows [begin, end). non_finite if a weight is NaN or Inf, scale_overflow if a scale does not fit
// scale_dtype; outputs of these rows are then unspecified.
using QuantizeGroupwiseFn = Status (*)(const QuantizeArgs& args, int64_t begin, int64_t end);

// dequantize_groupwise ----------------------------------------------------------------------------------

struct DequantizeArgs {
    const uint32_t* codes;        // [rows, code_words]
    int64_t code_words;
    int64_t K;
    int64_t group_size;           // at least 1
    int64_t groups;               // columns of scales
    int bits;
    int codebook;                 // as in QuantizeArgs
    DType scale_dtype;
    const void* scales;           // [scale rows, groups]
    const uint8_t* zeros;         // [scale rows, groups], or null
    const void* offsets;          // [scale rows, groups] of scale_dtype, or null; excludes zeros
    const int32_t* group_index;   // [K] in 0..groups-1, or null
    int64_t rows_per_scale;       // rows that share a row of scales: 1, or N per tensor
    DType out_dtype;
    void* out;                    // row `first_row` of the result
    int64_t out_stride;           // elements between rows
    int64_t first_row;
    bool streamed;                // past the caches: the result does not fit in them
};
// Writes rows [begin, end) to out + (row - first_row) * out_stride.
using DequantizeGroupwiseFn = void (*)(const DequantizeArgs& args, int64_t begin, int64_t end);

// pack_bits, unpack_bits --------------------------------------------------------------------------------

// Order is shared with python/qkern/ops/pack_bits/cpu.py.
enum class BitLayout : int { dense = 0, gptq = 1, awq = 2, words = 3 };

struct BitsArgs {
    uint8_t* codes;        // [N, codes_stride]: read by pack, written by unpack
    int64_t codes_stride;  // elements between rows
    int64_t N;
    int64_t K;
    int bits;
    BitLayout layout;
    uint32_t* packed;      // contiguous, shape by layout: see csrc/kernels/pack_bits/README.md
};
// Rows [begin, end) of the codes; begin is a multiple of 8 (awq packs eight rows to a word). pack_bits
// returns code_range if a code has bits beyond `bits`.
using PackBitsFn = Status (*)(const BitsArgs& args, int64_t begin, int64_t end);
using UnpackBitsFn = void (*)(const BitsArgs& args, int64_t begin, int64_t end);

// gptq_update -------------------------------------------------------------------------------------------

constexpr int64_t kGptqMaxColumns = 1024;

struct GptqArgs {
    const float* weight;         // [rows, weight_stride]
    int64_t weight_stride;
    int64_t B;                   // columns, at most kGptqMaxColumns
    const float* hinv;           // [B, B] upper triangular
    float* scales;               // [rows, groups]; search and improve write the group that they choose a scale for
    const uint8_t* zeros;        // [rows, groups]
    int64_t groups;
    const int32_t* group_index;  // [B]
    int bits;
    int codebook;                // as in QuantizeArgs; zeros are then not read
    uint8_t* codes;              // [rows, codes_stride]
    int64_t codes_stride;
    float* errors;               // [rows, B], or null
    const float* origin;         // [rows, origin_stride], or null: the weights before any correction
    int64_t origin_stride;
    float* change;               // [rows, change_stride], with origin: it less what the codes stand for
    int64_t change_stride;
    float* losses;               // [rows]: squared sum of the errors, or null; of improve: by how much it fell
    // search:
    const float* candidate_scales;  // [candidates, candidate_stride]: of the one group of the block
    int64_t candidates;
    int64_t candidate_stride;
    // improve:
    const float* local;          // [B, B] upper triangular: the inverse of hinv
    int fits;                    // 0 if the scales stay, else the block is one group
    DType scale_dtype;
};
// Rows [begin, end). update runs the block once; search runs it with each candidate and keeps what loses least;
// improve reads codes and change as well, and rewrites them in the rows that it betters.
using GptqUpdateFn = void (*)(const GptqArgs& args, int64_t begin, int64_t end);

// The products between blocks: out = base + a @ b. b is packed first, in slices of kProductDepth rows; sums run
// over a slice, then over the slices in order, whatever the tier and the threads.
constexpr int64_t kProductDepth = 256;

struct ProductPackArgs {
    const float* b;  // [K, columns] at any strides
    int64_t row_stride;
    int64_t column_stride;
    int64_t K;
    int64_t columns;
    void* panels;
};
using ProductPackFn = void (*)(const ProductPackArgs& args, int64_t begin, int64_t end);

struct ProductArgs {
    const float* a;  // [rows, a_stride]
    int64_t a_stride;
    int64_t K;
    const void* panels;
    int64_t columns;
    const float* base;  // [rows, base_stride], or null
    int64_t base_stride;
    float* out;  // [rows, out_stride]
    int64_t out_stride;
};
using ProductFn = void (*)(const ProductArgs& args, int64_t begin, int64_t end);

struct ProductKernel {
    ProductPackFn pack = nullptr;  // slices [begin, end)
    ProductFn multiply = nullptr;  // rows [begin, end)
    int width = 0;                 // columns and rows of a tile
    int height = 0;
    int64_t panel_bytes = 0;  // of a slice of b, `width` columns of it
};

// quantize_activations ----------------------------------------------------------------------------------

struct QuantizeActivationsArgs {
    const void* x;  // [rows, row_stride] of dtype
    DType dtype;
    int64_t row_stride;  // elements between rows
    int64_t K;
    int64_t group_size;  // 1..max(K, 1); K when the scale is given
    const float* scale;  // one for all, or null: chosen for every row and group
    int zero;            // -128..127, added to the codes of a given scale
    int8_t* codes;       // [rows, K]
    float* scales;       // [rows, ceil(K / group_size)]; a given scale, or NaN for a row that is not finite
};
using QuantizeActivationsFn = void (*)(const QuantizeActivationsArgs& args, int64_t begin, int64_t end);

// dequant_matmul ----------------------------------------------------------------------------------------
// The layout of the weight is in qkern/packed_weight.h.

struct PackedView;

struct PackArgs {
    const PackedView* view;
    uint32_t* codes;       // [N, code_words], form 2
    int64_t code_words;
    void* scales;          // [N, groups], or one element when scale_row_stride is 0
    void* zeros;           // uint8, or offsets of the scales' dtype, or null
    int64_t scale_row_stride;
    uint8_t* panels;
};
// Panels [begin, end): form 2 to panels, and panels to form 2 (codes are zeroed by the caller).
using PackPanelsFn = void (*)(const PackArgs& args, int64_t begin, int64_t end);

// Activations in the weight's column order, every block padded with zeros, in one of four forms:
//   int8    codes [M, padded_K], scales and sums [M, blocks]
//   floats  values [M, padded_K]
//   pairs   pairs, pair_sums [M, blocks]: bf16 products, on a tier that has them; the rows of a chunk together,
//           and of those block after block [rows, columns of the block]
//   digits  as int8, with `digits` rows for each row of x: float products of a few rows on int8 instructions
struct PrepareArgs {
    const PackedView* view;
    const void* x;  // [M, row_stride] of dtype
    DType dtype;
    int64_t M;
    int64_t row_stride;
    int8_t* codes;
    float* scales;
    int32_t* sums;     // of the codes
    int digits;
    float* values;     // null in the other forms
    uint16_t* pairs;   // bf16, the middle two columns of every quad swapped
    float* pair_sums;  // of x, where there are zero points or offsets
};
using PrepareFn = void (*)(const PrepareArgs& args, int64_t begin, int64_t end);

struct MatmulArgs {
    const PackedView* view;
    int64_t M;
    const int8_t* codes;  // as PrepareArgs made them
    const float* scales;
    const int32_t* sums;
    int digits;
    const float* values;  // not null: the form is floats, else int8
    const uint16_t* pairs;
    const float* pair_sums;
    void* out;            // [M, out_stride] of out_dtype
    DType out_dtype;
    int64_t out_stride;
    const void* bias;  // [N] or null
    DType bias_dtype;
};
// Rows of x go in equal chunks of up to kMatmulRows, or kPairRows of pairs: whole tiles of six where there are
// several.
constexpr int64_t kMatmulRows = 132;
constexpr int64_t kPairRows = 264;
constexpr int64_t matmul_chunk_rows(int64_t M, int64_t most = kMatmulRows) {
    const int64_t chunks = (M + most - 1) / most;
    return chunks <= 1 ? M : ((M + chunks - 1) / chunks + 5) / 6 * 6;
}
constexpr int64_t matmul_chunks(int64_t M, int64_t most = kMatmulRows) {
    return M <= most ? 1 : (M + matmul_chunk_rows(M, most) - 1) / matmul_chunk_rows(M, most);
}
// Up to this many rows of x, floats become digits where a tier can.
constexpr int64_t kDigitRows = 24;
// Tiles [begin, end): tile t is chunk t / panels and panel t % panels, so that a chunk's activations stay in L2
// while the weight streams past.
using MatmulFn = void (*)(const MatmulArgs& args, int64_t begin, int64_t end);

struct DecodeArgs {
    const PackedView* view;
    void* out;  // [K, out_stride] of dtype: the transposed weight, columns in the original order
    DType dtype;
    int64_t out_stride;
    int64_t first_row;  // of the weight, a multiple of 64; column 0 of out
};
// Panels [begin, end) to floats.
using DecodeFn = void (*)(const DecodeArgs& args, int64_t begin, int64_t end);

// int8_matmul -------------------------------------------------------------------------------------------
// Of a packed weight with 8-bit codes in one group (is_int8_weight in qkern/packed_weight.h).

// int32 sums are exact over a segment of columns; a longer K is cut into several, whose sums are added as f32.
struct Int8PrepareArgs {
    int64_t K;
    int64_t segment;     // columns, a multiple of 128
    const void* x;       // [M, row_stride] of dtype, quantized per token when scales is given
    DType dtype;
    const int8_t* codes; // [M, row_stride], else; null: every code is 1
    int64_t row_stride;  // elements
    char* quads;         // [M, quads_stride] bytes: the codes as the tier reads them, padded with zeros
    int64_t quads_stride;
    float* scales;       // [M], written; or null
    int32_t* sums;       // [M, segments] of the codes, or null
};
using Int8PrepareFn = void (*)(const Int8PrepareArgs& args, int64_t begin, int64_t end);

struct Int8MatmulArgs {
    const PackedView* view;
    int64_t M;
    int64_t segment;
    const char* quads;  // as Int8PrepareArgs made them
    int64_t quads_stride;
    const int32_t* sums;
    const float* scales;    // [M]
    const int32_t* zeros;   // [M] zero points of x, -128..127, or null
    const char* ones;       // a prepared row of ones, when zeros is given
    int32_t* int_out;       // [M, out_stride] the sums themselves (one segment, no offsets), or null
    void* out;              // [M, out_stride] of out_dtype
    DType out_dtype;
    int64_t out_stride;
    const void* bias;  // [N] or null
    DType bias_dtype;
};
// Tiles [begin, end): tile t is panel t % panels and chunk t / panels of x, as in MatmulFn.
using Int8MatmulFn = void (*)(const Int8MatmulArgs& args, int64_t begin, int64_t end);

// gguf_encode, gguf_decode ------------------------------------------------------------------------------

// Rows [begin, end) of contiguous x [rows, K] to blocks [rows, row_bytes]; K is a multiple of the block.
// importance [K] >= 0, or null. non_finite if a value is NaN, Inf or beyond what an fp16 block scale can hold.
using GgufEncodeFn = Status (*)(GgufType type, const float* x, const float* importance, uint8_t* out, int64_t K,
                                int64_t begin, int64_t end);
using GgufDecodeFn = void (*)(GgufType type, const uint8_t* raw, float* out, int64_t K, int64_t begin, int64_t end);

struct KernelTable {
    GgufEncodeFn gguf_encode = nullptr;
    GgufDecodeFn gguf_decode = nullptr;
    QuantizeGroupwiseFn quantize_groupwise = nullptr;
    QuantizeActivationsFn quantize_activations = nullptr;
    PackPanelsFn pack_panels = nullptr;
    PackPanelsFn unpack_panels = nullptr;
    PrepareFn matmul_prepare = nullptr;
    MatmulFn matmul_run = nullptr;
    PrepareFn matmul_prepare_digits = nullptr;  // null where floats are faster
    MatmulFn matmul_run_digits = nullptr;
    PrepareFn matmul_prepare_pairs = nullptr;  // null without bf16 products
    MatmulFn matmul_run_pairs = nullptr;
    DecodeFn matmul_decode = nullptr;
    Int8PrepareFn int8_prepare = nullptr;
    Int8MatmulFn int8_matmul = nullptr;
    int int8_bytes = 0;  // of one prepared activation
    DequantizeGroupwiseFn dequantize_groupwise = nullptr;
    PackBitsFn pack_bits = nullptr;
    UnpackBitsFn unpack_bits = nullptr;
    GptqUpdateFn gptq_update = nullptr;
    GptqUpdateFn gptq_search = nullptr;
    GptqUpdateFn gptq_improve = nullptr;
    ProductKernel product;        // fp32 with FMA; none where torch's matmul is faster
    ProductKernel fixed_product;  // 16-bit fixed point; none where that is slower
};

}  // namespace qk
