// The op's row loop over Lanes; README.md beside this file has formula and numerics. A tier's file includes its
// lanes header, then this.
#pragma once
#include "chunk.h"
#include "qkern/kernels.h"
#include "qkern/lanes/columns.h"

namespace {

using namespace qk;

// Columns [first, last) of a row, one group, in pieces: with a given scale, or where something is not finite.
inline void quantize_group(const QuantizeActivationsArgs& args, int64_t row, int64_t g) {
    const int64_t groups = (args.K + args.group_size - 1) / args.group_size, start = row * args.row_stride;
    const int64_t first = g * args.group_size;
    const int64_t last = first + args.group_size < args.K ? first + args.group_size : args.K;
    float chunk[kChunk];
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

// Groups [first, first + count) of a row, count at most kLanes; false if something in them is not finite.
template <DType D>
bool quantize_groups(const QuantizeActivationsArgs& args, int64_t row, int64_t first, int64_t count, float* scales) {
    constexpr int64_t size = D == DType::f32 ? 4 : 2;
    const char* x = static_cast<const char*>(args.x) + row * args.row_stride * size;
    const int64_t begin = first * args.group_size;
    const int64_t end = begin + count * args.group_size < args.K ? begin + count * args.group_size : args.K;
    Lanes up[kLanes], none[kLanes];
    if (!all_finite(extremes<D, false>(x, begin, args.K, args.group_size, count, up, none))) return false;
    const Lanes scale = div(largest_of_each<D>(up), splat(127.0f));
    store_some<DType::f32>(scales, first, count, scale);
    // Of a group whose scale is 0 everything is smaller than 1, and rounds to 0.
    alignas(64) float divisors[kLanes];
    store(divisors, one_for_zero(scale));
    Groups groups{divisors, DType::f32, nullptr, nullptr, count, args.group_size};
    Columns of;
    alignas(64) uint8_t shifted[kColumns + kLanes];  // codes + 128, by whole Lanes: the last ones may run over
    const auto code = [&](const Lanes& w, int64_t i) {
        const Lanes q = add(round_even(div(w, load(of.scale + i))), splat(128.0f));
        return min(max(q, splat(1.0f)), splat(255.0f));
    };
    for (int64_t k = begin; k < end; k += kColumns) {
        const int64_t n = end - k < kColumns ? end - k : kColumns;
        groups.expand(k - begin, k - begin + n, of);
        int64_t i = 0;
        for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
            // The next row is fetched while this one is divided.
            const char* next = x + (args.row_stride + k + i) * size;
            for (int64_t line = 0; line < 4 * kLanes * size; line += 64) __builtin_prefetch(next + line);
            Lanes four[4];
            for (int j = 0; j < 4; ++j) four[j] = code(load_lanes<D>(x, k + i + kLanes * j), i + kLanes * j);
            store_codes(shifted + i, four);
        }
        for (; i < n; i += kLanes) store_codes(shifted + i, code(load_some<D>(x, k + i, n - i), i));
        int8_t* codes = args.codes + row * args.K + k;
        for (int64_t j = 0; j < n; ++j) codes[j] = static_cast<int8_t>(shifted[j] ^ 0x80);
    }
    return true;
}

template <DType D>
void quantize_activation_rows(const QuantizeActivationsArgs& args, int64_t begin, int64_t end) {
    const int64_t groups = (args.K + args.group_size - 1) / args.group_size;
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t g = 0; g < groups; g += kLanes) {
            const int64_t count = groups - g < kLanes ? groups - g : kLanes;
            if (!args.scale && quantize_groups<D>(args, row, g, count, args.scales + row * groups)) continue;
            for (int64_t i = 0; i < count; ++i) quantize_group(args, row, g + i);
        }
    }
}

void quantize_activations(const QuantizeActivationsArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
        case DType::f32: return quantize_activation_rows<DType::f32>(args, begin, end);
        case DType::f16: return quantize_activation_rows<DType::f16>(args, begin, end);
        default: return quantize_activation_rows<DType::bf16>(args, begin, end);
    }
}

}  // namespace
