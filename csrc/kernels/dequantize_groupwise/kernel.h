// dequantize_groupwise over Lanes; README.md beside this file has formula and numerics. A tier's file
// includes its lanes header, then this.
#pragma once
#include "qkern/bitstream.h"
#include "qkern/codebooks.h"
#include "qkern/kernels.h"

namespace {

using namespace qk;

constexpr int64_t kChunk = 256;

inline void unpack_chunk(int bits, const uint32_t* words, int64_t count, uint8_t* codes) {
    switch (bits) {
        case 2: return unpack_stream<2>(words, count, codes);
        case 3: return unpack_stream<3>(words, count, codes);
        case 4: return unpack_stream<4>(words, count, codes);
        default: return unpack_stream<8>(words, count, codes);
    }
}

template <DType D>
struct Dequantizer {
    const DequantizeArgs& args;
    const float* table;  // codebook values by code, or null
    int64_t scale_row;   // first scale of this row

    float scale(int64_t g) const { return load_float(args.scales, args.scale_dtype, scale_row + g); }

    float zero(int64_t g) const {
        if (args.zeros) return static_cast<float>(args.zeros[scale_row + g]);
        return table || args.offsets ? 0.0f : static_cast<float>(1 << (args.bits - 1));
    }

    float offset(int64_t g) const { return load_float(args.offsets, args.scale_dtype, scale_row + g); }

    Lanes weights(const uint8_t* codes, const Lanes& scale, const Lanes& zero) const {
        const Lanes q = load_codes(codes);
        return mul(table ? lookup(table, q) : sub(q, zero), scale);
    }

    // Columns [k, last) of one group.
    void group(const uint8_t* codes, int64_t k, int64_t last, int64_t g, void* out) const {
        const Lanes s = splat(scale(g)), z = splat(zero(g));
        if (args.offsets) {
            const Lanes m = splat(offset(g));
            for (; k < last; k += kLanes, codes += kLanes) {
                store_some<D>(out, k, last - k, add(weights(codes, s, z), m));
            }
        } else {
            for (; k < last; k += kLanes, codes += kLanes) store_some<D>(out, k, last - k, weights(codes, s, z));
        }
    }

    // Columns [k, last), each with the group that the index names.
    void indexed(const uint8_t* codes, int64_t k, int64_t last, void* out) const {
        for (; k < last; k += kLanes, codes += kLanes) {
            const int64_t count = last - k < kLanes ? last - k : kLanes;
            alignas(64) float s[kLanes] = {}, z[kLanes] = {}, m[kLanes] = {};
            for (int64_t i = 0; i < count; ++i) {
                const int64_t g = args.group_index[k + i];
                s[i] = scale(g);
                z[i] = zero(g);
                if (args.offsets) m[i] = offset(g);
            }
            Lanes w = weights(codes, load(s), load(z));
            if (args.offsets) w = add(w, load(m));
            store_some<D>(out, k, count, w);
        }
    }

    void row(const uint32_t* words, void* out) const {
        alignas(64) uint8_t codes[kChunk + kLanes] = {};
        for (int64_t begin = 0; begin < args.K; begin += kChunk) {
            const int64_t end = begin + kChunk < args.K ? begin + kChunk : args.K;
            unpack_chunk(args.bits, words + begin * args.bits / 32, end - begin, codes);
            if (args.group_index) {
                indexed(codes, begin, end, out);
                continue;
            }
            for (int64_t k = begin; k < end;) {
                const int64_t g = k / args.group_size;
                const int64_t group_end = (g + 1) * args.group_size;
                const int64_t last = group_end < end ? group_end : end;
                group(codes + (k - begin), k, last, g, out);
                k = last;
            }
        }
    }
};

template <DType D>
void dequantize_rows(const DequantizeArgs& args, int64_t begin, int64_t end) {
    const float* table = args.codebook == 0 ? nullptr : args.codebook == 1 ? kNf4.values : kFp4.values;
    for (int64_t n = begin; n < end; ++n) {
        const Dequantizer<D> rows{args, table, n / args.rows_per_scale * args.groups};
        const int64_t at = (n - args.first_row) * args.out_stride;
        rows.row(args.codes + n * args.code_words, static_cast<char*>(args.out) + at * (D == DType::f32 ? 4 : 2));
    }
}

void dequantize(const DequantizeArgs& args, int64_t begin, int64_t end) {
    switch (args.out_dtype) {
        case DType::f32: return dequantize_rows<DType::f32>(args, begin, end);
        case DType::f16: return dequantize_rows<DType::f16>(args, begin, end);
        default: return dequantize_rows<DType::bf16>(args, begin, end);
    }
}

}  // namespace
