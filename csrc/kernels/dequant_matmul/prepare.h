// Activations into the order and padding of the packed weight: as f32, or quantized a block at a time.
#pragma once
#include "../quantize_activations/chunk.h"
#include "qkern/kernels.h"
#include "qkern/packed_weight.h"

namespace {

static_assert(kChunk == qk::kBlockColumns, "a block is one chunk");

void prepare_rows(const qk::PrepareArgs& args, int64_t begin, int64_t end) {
    const qk::PackedView& view = *args.view;
    float chunk[kChunk];
    for (int64_t row = begin; row < end; ++row) {
        const int64_t start = row * args.row_stride;
        const void* x = static_cast<const char*>(args.x) + start * dtype_size(args.dtype);
        int64_t at = row * view.padded_K;
        int64_t block = row * view.blocks;
        for (int64_t g = 0; g < view.groups; ++g) {
            const int64_t last = view.group_start[g + 1];
            for (int64_t k = view.group_start[g]; k < last; k += kChunk, ++block) {
                const int64_t n = last - k < kChunk ? last - k : kChunk;
                const int64_t padded = padded_columns(n, view.bits);
                float* values = args.values ? args.values + at : chunk;
                if (view.permutation) {
                    gather_chunk(x, args.dtype, view.permutation + k, n, values);
                } else {
                    load_chunk(x, args.dtype, k, n, values);
                }
                if (args.values) {
                    for (int64_t i = n; i < padded; ++i) values[i] = 0.0f;
                } else {
                    const float scale = activation_scale(amax_bits(chunk, n, 0));
                    args.scales[block] = scale;
                    args.sums[block] = quantize_chunk(chunk, n, scale, args.codes + at);
                    for (int64_t i = n; i < padded; ++i) args.codes[at + i] = 0;
                }
                at += padded;
            }
        }
    }
}

}  // namespace
