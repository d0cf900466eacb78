// The op's row loop; each tier's file includes it under its own flags.
#pragma once
#include "chunk.h"
#include "qkern/kernels.h"

namespace {

void quantize_activation_rows(const qk::QuantizeActivationsArgs& args, int64_t begin, int64_t end) {
    const int64_t groups = (args.K + args.group_size - 1) / args.group_size;
    float chunk[kChunk];
    for (int64_t row = begin; row < end; ++row) {
        const int64_t start = row * args.row_stride;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = g * args.group_size;
            const int64_t last = first + args.group_size < args.K ? first + args.group_size : args.K;
            int32_t largest = 0;
            for (int64_t k = first; k < last; k += kChunk) {
                const int64_t n = last - k < kChunk ? last - k : kChunk;
                load_chunk(args.x, args.dtype, start + k, n, chunk);
                largest = amax_bits(chunk, n, largest);
            }
            const float scale = args.scale ? given_scale(*args.scale, largest) : activation_scale(largest);
            args.scales[row * groups + g] = scale;
            for (int64_t k = first; k < last; k += kChunk) {
                const int64_t n = last - k < kChunk ? last - k : kChunk;
                load_chunk(args.x, args.dtype, start + k, n, chunk);
                int8_t* codes = args.codes + row * args.K + k;
                if (args.scale) {
                    quantize_chunk_static(chunk, n, *args.scale, args.zero, codes);
                } else {
                    quantize_chunk(chunk, n, scale, codes);
                }
            }
        }
    }
}

}  // namespace
