// Eight adjacent elements of a row, the unit of the kernels that read or write form 2: eight codes are `bits` bytes.
#pragma once
#include "qkern/cuda/simt.h"
#include "qkern/types.h"

namespace qk::gpu {

constexpr int kChunk = 8;

QK_DEVICE float load_float(DType dtype, const void* from, int64_t i) {
    if (dtype == DType::f32) return load_once(static_cast<const float*>(from) + i);
    const uint16_t bits = load_once(static_cast<const uint16_t*>(from) + i);
    return dtype == DType::f16 ? from_f16(bits) : from_bf16(bits);
}

// Element i and the seven behind it, zeros from the `left`th on; `whole`: a chunk lies at a multiple of 16 bytes.
QK_DEVICE void load_chunk(DType dtype, const void* from, int64_t i, int64_t left, bool whole, float (&values)[kChunk]) {
    if (!whole || left < kChunk) {
        QK_UNROLL for (int p = 0; p < kChunk; ++p) values[p] = p < left ? load_float(dtype, from, i + p) : 0.0f;
    } else if (dtype == DType::f32) {
        const auto* at = reinterpret_cast<const float4*>(static_cast<const float*>(from) + i);
        const float4 low = load_once(at), high = load_once(at + 1);
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
        const uint4 words = load_once(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + i));
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
        QK_UNROLL for (int p = 0; p < kChunk; ++p) {
            const auto bits = static_cast<uint16_t>(pairs[p / 2] >> (16 * (p % 2)));
            values[p] = dtype == DType::f16 ? from_f16(bits) : from_bf16(bits);
        }
    }
}

template <DType kOut>
QK_DEVICE void store_float(void* to, int64_t i, float value) {
    if constexpr (kOut == DType::f32) {
        static_cast<float*>(to)[i] = value;
    } else {
        static_cast<uint16_t*>(to)[i] = kOut == DType::f16 ? to_f16(value) : to_bf16(value);
    }
}

// Element i and the seven behind it; their place is a multiple of 16 bytes.
template <DType kOut>
QK_DEVICE void store_chunk(void* to, int64_t i, const float (&values)[kChunk]) {
    if constexpr (kOut == DType::f32) {
        float* at = static_cast<float*>(to) + i;
        QK_UNROLL for (int p = 0; p < kChunk; p += 4) {
            store_16(at + p, make_uint4(as_bits(values[p]), as_bits(values[p + 1]), as_bits(values[p + 2]),
                                        as_bits(values[p + 3])));
        }
    } else {
        uint32_t pairs[4];
        QK_UNROLL for (int p = 0; p < 4; ++p) {
            const uint16_t low = kOut == DType::f16 ? to_f16(values[2 * p]) : to_bf16(values[2 * p]);
            const uint16_t high = kOut == DType::f16 ? to_f16(values[2 * p + 1]) : to_bf16(values[2 * p + 1]);
            pairs[p] = low | (static_cast<uint32_t>(high) << 16);
        }
        store_16(static_cast<uint16_t*>(to) + i, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    }
}

// Codes of chunk c of a row of `words` words, the first in the lowest bits. Beyond the row's end they are 0.
template <int kBits>
QK_DEVICE uint64_t load_codes(const uint32_t* row, int64_t words, int64_t c) {
    const int64_t word = c * kBits / 4;
    const int shift = static_cast<int>(c * kBits % 4) * 8;
    if constexpr (kBits == 8) {
        const uint64_t high = word + 1 < words ? load_once(row + word + 1) : 0u;
        return load_once(row + word) | (high << 32);
    } else if constexpr (kBits == 3) {
        const uint64_t high = shift > 8 && word + 1 < words ? load_once(row + word + 1) : 0u;
        return ((load_once(row + word) | (high << 32)) >> shift) & 0xffffffu;
    } else if constexpr (kBits == 4) {
        return load_once(row + word);
    } else {
        return (load_once(row + word) >> shift) & 0xffffu;
    }
}

// The reverse; bytes beyond the row's end are not written. The last chunk of a row also clears what is left of it.
template <int kBits>
QK_DEVICE void store_codes(uint32_t* row, int64_t words, int64_t c, bool last, uint64_t codes) {
    auto* bytes = reinterpret_cast<uint8_t*>(row);
    const int64_t begin = c * kBits, end = words * 4;
    if (kBits == 4) {
        row[c] = static_cast<uint32_t>(codes);
    } else if (kBits == 2 && begin + 2 <= end) {
        reinterpret_cast<uint16_t*>(row)[c] = static_cast<uint16_t>(codes);
    } else if (kBits == 8 && begin + 8 <= end) {
        row[2 * c] = static_cast<uint32_t>(codes);
        row[2 * c + 1] = static_cast<uint32_t>(codes >> 32);
    } else {
        QK_UNROLL for (int i = 0; i < kBits; ++i) {
            if (begin + i < end) bytes[begin + i] = static_cast<uint8_t>(codes >> (8 * i));
        }
    }
    if (last) {
        for (int64_t at = begin + kBits; at < end; ++at) bytes[at] = 0;
    }
}

}  // namespace qk::gpu
