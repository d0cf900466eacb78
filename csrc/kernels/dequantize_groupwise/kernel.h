// dequantize_groupwise over Lanes; README.md beside this file has formula and numerics. A tier's file
// includes its lanes header, then this.
#pragma once
#include "qkern/bitstream.h"
#include "qkern/codebooks.h"
#include "qkern/kernels.h"
#include "qkern/lanes/columns.h"
#include "qkern/stream.h"

namespace {

using namespace qk;

constexpr int64_t kAhead = 2048;  // bytes of codes between what is read and what is fetched

inline void unpack_chunk(int bits, const uint32_t* words, int64_t count, uint8_t* codes) {
    switch (bits) {
        case 2: return unpack_stream<2>(words, count, codes);
        case 3: return unpack_stream<3>(words, count, codes);
        case 4: return unpack_stream<4>(words, count, codes);
        default: return unpack_stream<8>(words, count, codes);
    }
}

// The groups of columns [first, last), in any order.
inline void pick(const DequantizeArgs& args, int64_t scale_row, int64_t first, int64_t last, Columns& of) {
    for (int64_t i = 0; i < last - first; ++i) {
        const int64_t at = scale_row + args.group_index[first + i];
        of.scale[i] = load_float(args.scales, args.scale_dtype, at);
        if (args.zeros) of.zero[i] = static_cast<float>(args.zeros[at]);
        if (args.offsets) of.offset[i] = load_float(args.offsets, args.scale_dtype, at);
    }
}

template <DType D, class Value>
inline void expand(const uint8_t* codes, int64_t count, void* out, const Value& value) {
    for (int64_t i = 0; i < count; i += kLanes) store_lanes<D>(out, i, value(load_codes(codes + i), i));
}

// One chunk at a time, of codes of at most four bits: a table of what each of sixteen codes is worth in the group.
template <DType D>
inline void look_up(const DequantizeArgs& args, const float* entries, const uint8_t* codes, int64_t first, int64_t last,
                    Groups& groups, uint16_t* table, uint16_t* out) {
    for (int64_t k = first; k < last;) {
        if (k == groups.end) {
            groups.next_group();
            const int64_t g = groups.g % kLanes;
            Lanes worth = load(entries);
            if (args.zeros) worth = sub(worth, splat(groups.zero[g]));
            worth = mul(worth, splat(groups.scale[g]));
            store_lanes<D>(table, 0, args.offsets ? add(worth, splat(groups.offset[g])) : worth);
        }
        const int64_t to = groups.end < last ? groups.end : last;
        for (; k < to; k += 32) look_up_halves(table, codes + (k - first), out + (k - first));
        k = to;
    }
}

// What a code is worth before the zero point that a group gives, the scale and the offset.
inline Lanes worth_of_codes(const DequantizeArgs& args) {
    if (args.codebook != 0) return load(args.codebook == 1 ? kNf4.values : kFp4.values);
    uint8_t codes[kLanes];
    for (int i = 0; i < kLanes; ++i) codes[i] = static_cast<uint8_t>(i);
    const bool middle = !args.zeros && !args.offsets;
    return sub(load_codes(codes), splat(middle ? static_cast<float>(1 << (args.bits - 1)) : 0.0f));
}

template <DType D>
void dequantize_rows(const DequantizeArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t size = D == DType::f32 ? 4 : 2;
    const float* values = args.codebook == 1 ? kNf4.values : kFp4.values;
    const int64_t scale_size = dtype_size(args.scale_dtype);
    const bool by_table = D != DType::f32 && args.bits <= 4 && args.group_size >= kLanes && !args.group_index;
    Columns of = {};
    if (args.codebook == 0 && !args.offsets) Groups::fill(of.zero, 0, kColumns, static_cast<float>(1 << (args.bits - 1)));
    alignas(64) float entries[kLanes];
    store(entries, worth_of_codes(args));
    alignas(64) uint16_t table[kLanes] = {};
    // Both are written by 16 or 32 elements: the last ones may run over.
    alignas(64) uint8_t codes[kColumns + 32] = {};
    alignas(64) char weights[(kColumns + 32) * size];
    for (int64_t n = begin; n < end; ++n) {
        const int64_t scale_row = n / args.rows_per_scale * args.groups;
        Groups groups{static_cast<const char*>(args.scales) + scale_row * scale_size, args.scale_dtype,
                      args.zeros ? args.zeros + scale_row : nullptr,
                      args.offsets ? static_cast<const char*>(args.offsets) + scale_row * scale_size : nullptr,
                      args.groups, args.group_size};
        const uint32_t* words = args.codes + n * args.code_words;
        char* out = static_cast<char*>(args.out) + (n - args.first_row) * args.out_stride * size;
        for (int64_t k = 0; k < args.K; k += kColumns) {
            const int64_t last = k + kColumns < args.K ? k + kColumns : args.K;
            const uint32_t* from = words + k * args.bits / 32;
            for (int64_t i = 0; i < kColumns * args.bits / 8; i += 64) {
                __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead + i);
            }
            unpack_chunk(args.bits, from, last - k, codes);
            if (by_table) {
                look_up<D>(args, entries, codes, k, last, groups, table, reinterpret_cast<uint16_t*>(weights));
                copy_out(out + k * size, weights, (last - k) * size, args.streamed);
                continue;
            }
            args.group_index ? pick(args, scale_row, k, last, of) : groups.expand(k, last, of);
            if (args.codebook != 0) {
                expand<D>(codes, last - k, weights, [&](const Lanes& q, int64_t i) {
                    return mul(lookup(values, q), load(of.scale + i));
                });
            } else if (args.offsets) {
                expand<D>(codes, last - k, weights, [&](const Lanes& q, int64_t i) {
                    return add(mul(q, load(of.scale + i)), load(of.offset + i));
                });
            } else {
                expand<D>(codes, last - k, weights, [&](const Lanes& q, int64_t i) {
                    return mul(sub(q, load(of.zero + i)), load(of.scale + i));
                });
            }
            copy_out(out + k * size, weights, (last - k) * size, args.streamed);
        }
    }
    end_stream();
}

void dequantize(const DequantizeArgs& args, int64_t begin, int64_t end) {
    switch (args.out_dtype) {
        case DType::f32: return dequantize_rows<DType::f32>(args, begin, end);
        case DType::f16: return dequantize_rows<DType::f16>(args, begin, end);
        default: return dequantize_rows<DType::bf16>(args, begin, end);
    }
}

}  // namespace
