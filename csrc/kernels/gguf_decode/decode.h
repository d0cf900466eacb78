// gguf_decode: GGUF blocks to rows of fp32, by the formulas of qkern/gguf_blocks.h. The products are rounded in
// the order written there and nothing is contracted, so the bits equal those of the format's other decoders.
// The one source of all tiers: plain loops that the compiler vectorizes with the tier's flags.
#pragma once
#include <string.h>

#include "qkern/gguf_blocks.h"
#include "qkern/kernels.h"
#include "qkern/scalar_float.h"

namespace {

using namespace qk;

// The 32 codes of a block: nibbles, and fifth bits where there are any.
inline void codes32(const uint8_t* qs, const uint8_t* qh, float* codes) {
    uint32_t fifth = 0;
    if (qh) memcpy(&fifth, qh, 4);
    for (uint32_t i = 0; i < 16; ++i) {
        codes[i] = static_cast<float>((qs[i] & 15u) | (fifth >> i & 1u) << 4);
        codes[i + 16] = static_cast<float>(static_cast<uint32_t>(qs[i] >> 4) | (fifth >> (i + 16) & 1u) << 4);
    }
}

inline void symmetric(uint16_t half, const uint8_t* qs, const uint8_t* qh, float zero, float* y) {
    const float d = from_f16(half);
    codes32(qs, qh, y);
    for (int i = 0; i < 32; ++i) y[i] = d * (y[i] - zero);
}

inline void affine(uint16_t half, uint16_t offset, const uint8_t* qs, const uint8_t* qh, float* y) {
    const float d = from_f16(half), m = from_f16(offset);
    codes32(qs, qh, y);
    for (int i = 0; i < 32; ++i) y[i] = d * y[i] + m;
}

inline void decode_block(const BlockQ4_0& b, float* y) { symmetric(b.d, b.qs, nullptr, 8.0f, y); }
inline void decode_block(const BlockQ5_0& b, float* y) { symmetric(b.d, b.qs, b.qh, 16.0f, y); }
inline void decode_block(const BlockQ4_1& b, float* y) { affine(b.d, b.m, b.qs, nullptr, y); }
inline void decode_block(const BlockQ5_1& b, float* y) { affine(b.d, b.m, b.qs, b.qh, y); }

inline void decode_block(const BlockQ8_0& b, float* y) {
    const float d = from_f16(b.d);
    for (int i = 0; i < 32; ++i) y[i] = static_cast<float>(b.qs[i]) * d;
}

// 32 codes of a table, times a step.
inline void looked_up(float step, const uint8_t* qs, float* y) {
    for (int i = 0; i < 16; ++i) {
        y[i] = step * static_cast<float>(kIq4Values[qs[i] & 15]);
        y[i + 16] = step * static_cast<float>(kIq4Values[qs[i] >> 4]);
    }
}

inline void decode_block(const BlockIQ4_NL& b, float* y) { looked_up(from_f16(b.d), b.qs, y); }

inline void decode_block(const BlockIQ4_XS& b, float* y) {
    const float d = from_f16(b.d);
    for (int j = 0; j < 8; ++j) {
        const int scale = (b.scales_l[j / 2] >> 4 * (j & 1) & 15) | (b.scales_h >> 2 * j & 3) << 4;
        looked_up(d * static_cast<float>(scale - 32), b.qs + 16 * j, y + 32 * j);
    }
}

inline void decode_block(const BlockQ2_K& b, float* y) {
    const float d = from_f16(b.d), dmin = from_f16(b.dmin);
    for (int j = 0; j < 16; ++j) {
        const float step = d * static_cast<float>(b.scales[j] & 15);
        const float offset = dmin * static_cast<float>(b.scales[j] >> 4);
        const uint8_t* quads = b.qs + 32 * (j / 8) + 16 * (j % 2);
        const int shift = 2 * (j % 8 / 2);
        for (int i = 0; i < 16; ++i) y[16 * j + i] = step * static_cast<float>(quads[i] >> shift & 3) - offset;
    }
}

inline void decode_block(const BlockQ3_K& b, float* y) {
    const float d = from_f16(b.d);
    for (int j = 0; j < 16; ++j) {
        const int scale = (b.scales[j % 8] >> 4 * (j / 8) & 15) | (b.scales[8 + j % 4] >> 2 * (j / 4) & 3) << 4;
        const float step = d * static_cast<float>(scale - 32);
        const uint8_t* quads = b.qs + 32 * (j / 8) + 16 * (j % 2);
        const uint8_t* thirds = b.hmask + 16 * (j % 2);
        const int shift = 2 * (j % 8 / 2), bit = j / 2;
        for (int i = 0; i < 16; ++i) {
            const int code = (quads[i] >> shift & 3) | (thirds[i] >> bit & 1) << 2;
            y[16 * j + i] = step * static_cast<float>(code - 4);
        }
    }
}

// qh null: Q4_K.
inline void decode_super(uint16_t half, uint16_t half_min, const uint8_t* scales, const uint8_t* qh, const uint8_t* qs,
                         float* y) {
    const float d = from_f16(half), dmin = from_f16(half_min);
    for (int j = 0; j < 8; ++j) {
        const int k = j & 3;
        const int scale = j < 4 ? scales[k] & 63 : (scales[k + 8] & 15) | scales[k] >> 6 << 4;
        const int minimum = j < 4 ? scales[k + 4] & 63 : scales[k + 8] >> 4 | scales[k + 4] >> 6 << 4;
        const float step = d * static_cast<float>(scale), offset = dmin * static_cast<float>(minimum);
        const uint8_t* nibbles = qs + 32 * (j / 2);
        const int shift = 4 * (j & 1);
        for (int i = 0; i < 32; ++i) {
            int code = nibbles[i] >> shift & 15;
            if (qh) code |= (qh[i] >> j & 1) << 4;
            y[32 * j + i] = step * static_cast<float>(code) - offset;
        }
    }
}

inline void decode_block(const BlockQ4_K& b, float* y) { decode_super(b.d, b.dmin, b.scales, nullptr, b.qs, y); }
inline void decode_block(const BlockQ5_K& b, float* y) { decode_super(b.d, b.dmin, b.scales, b.qh, b.qs, y); }

inline void decode_block(const BlockQ6_K& b, float* y) {
    const float d = from_f16(b.d);
    for (int j = 0; j < 16; ++j) {
        const float step = d * static_cast<float>(b.scales[j]);
        const int half = j / 8, quarter = j % 8 / 2, odd = j % 2;
        const uint8_t* low = b.ql + 64 * half + 32 * (quarter % 2) + 16 * odd;
        const uint8_t* high = b.qh + 32 * half + 16 * odd;
        const int low_shift = 4 * (quarter / 2), high_shift = 2 * quarter;
        for (int i = 0; i < 16; ++i) {
            const int code = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
            y[16 * j + i] = step * static_cast<float>(code - 32);
        }
    }
}

template <class Block> void decode_rows(const uint8_t* raw, float* out, int64_t K, int64_t begin, int64_t end, int length) {
    const int64_t blocks = K / length;
    for (int64_t b = begin * blocks; b < end * blocks; ++b) {
        // A copy, since a row of raw bytes need not be aligned.
        Block block;
        memcpy(&block, raw + b * static_cast<int64_t>(sizeof(Block)), sizeof(Block));
        decode_block(block, out + b * length);
    }
}

void decode_halves(bool bfloat, const uint8_t* raw, float* out, int64_t K, int64_t begin, int64_t end) {
    for (int64_t k = begin * K; k < end * K; ++k) {
        uint16_t half;
        memcpy(&half, raw + 2 * k, 2);
        out[k] = bfloat ? from_bf16(half) : from_f16(half);
    }
}

void decode(GgufType type, const uint8_t* raw, float* out, int64_t K, int64_t begin, int64_t end) {
    switch (type) {
    case GgufType::q4_0: return decode_rows<BlockQ4_0>(raw, out, K, begin, end, 32);
    case GgufType::q4_1: return decode_rows<BlockQ4_1>(raw, out, K, begin, end, 32);
    case GgufType::q5_0: return decode_rows<BlockQ5_0>(raw, out, K, begin, end, 32);
    case GgufType::q5_1: return decode_rows<BlockQ5_1>(raw, out, K, begin, end, 32);
    case GgufType::q8_0: return decode_rows<BlockQ8_0>(raw, out, K, begin, end, 32);
    case GgufType::iq4_nl: return decode_rows<BlockIQ4_NL>(raw, out, K, begin, end, 32);
    case GgufType::q2_k: return decode_rows<BlockQ2_K>(raw, out, K, begin, end, 256);
    case GgufType::q3_k: return decode_rows<BlockQ3_K>(raw, out, K, begin, end, 256);
    case GgufType::q4_k: return decode_rows<BlockQ4_K>(raw, out, K, begin, end, 256);
    case GgufType::q5_k: return decode_rows<BlockQ5_K>(raw, out, K, begin, end, 256);
    case GgufType::q6_k: return decode_rows<BlockQ6_K>(raw, out, K, begin, end, 256);
    case GgufType::iq4_xs: return decode_rows<BlockIQ4_XS>(raw, out, K, begin, end, 256);
    case GgufType::f16: return decode_halves(false, raw, out, K, begin, end);
    case GgufType::bf16: return decode_halves(true, raw, out, K, begin, end);
    }
}

}  // namespace
