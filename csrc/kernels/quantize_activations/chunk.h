// Pieces of up to kChunk activations: loaded as f32, their largest magnitude, their int8 codes.
// Plain loops that the compiler vectorizes with the flags of the including tier.
#pragma once
#include <string.h>

#include "qkern/scalar_float.h"
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr int64_t kChunk = 128;

inline void load_chunk(const void* x, qk::DType dtype, int64_t at, int64_t n, float* out) {
    if (dtype == qk::DType::f32) {
        memcpy(out, static_cast<const float*>(x) + at, static_cast<size_t>(n) * 4);
        return;
    }
    const uint16_t* halves = static_cast<const uint16_t*>(x) + at;
    if (dtype == qk::DType::bf16) {
        for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(halves[i]);
        return;
    }
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + i))));
    }
#elif defined(__aarch64__)
    for (; i + 4 <= n; i += 4) {
        vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i))));
    }
#endif
    for (; i < n; ++i) out[i] = from_f16(halves[i]);
}

// The same for columns picked by an index.
inline void gather_chunk(const void* x, qk::DType dtype, const int32_t* index, int64_t n, float* out) {
    if (dtype == qk::DType::f32) {
        for (int64_t i = 0; i < n; ++i) out[i] = static_cast<const float*>(x)[index[i]];
        return;
    }
    uint16_t halves[kChunk];
    for (int64_t i = 0; i < n; ++i) halves[i] = static_cast<const uint16_t*>(x)[index[i]];
    load_chunk(halves, dtype, 0, n, out);
}

// Bits of the largest magnitude; as integers NaN > Inf > every finite value, so a NaN is not lost.
inline int32_t amax_bits(const float* x, int64_t n, int32_t before) {
    int32_t largest = before;
    for (int64_t i = 0; i < n; ++i) {
        int32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

inline float activation_scale(int32_t largest) { return float_of(static_cast<uint32_t>(largest)) / 127.0f; }

// A given scale for values of this largest magnitude: it cannot carry NaN or Inf by itself.
inline float given_scale(float scale, int32_t largest) { return largest < 0x7f800000 ? scale : float_of(0x7fc00000u); }

// 1.5 * 2^23: adding it to a float of at most 2^22 leaves the rounded integer in the low bits of the sum.
constexpr float kRoundShift = 12582912.0f;
constexpr int32_t kRoundShiftBits = 0x4b400000;

// q = clamp(rint(x / scale), returns the sum of the codes. With a scale that is not finite the
// codes only carry signs (Inf) or nothing (NaN), and the scale makes every product Inf or NaN. A zero scale
// (nothing in the chunk is as large as 127 of the smallest f32) gives zeros.
inline int32_t quantize_chunk(const float* x, int64_t n, float scale, int8_t* q) {
    if (!(scale > 0.0f) || (bits_of(scale) & 0x7f800000u) == 0x7f800000u) {
        int32_t sum = 0;
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bits = bits_of(x[i]);
            const bool infinite = (bits & 0x7fffffffu) == 0x7f800000u;
            q[i] = static_cast<int8_t>(!infinite ? 0 : bits >> 31 ? -127 : 127);
            sum += q[i];
        }
        return sum;
    }
    int32_t codes[kChunk];
    int32_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        float ratio = x[i] / scale;
        ratio = ratio > 127.0f ? 127.0f : ratio;
        ratio = ratio < -127.0f ? -127.0f : ratio;
        ratio += kRoundShift;
        int32_t bits;
        memcpy(&bits, &ratio, 4);
        codes[i] = bits - kRoundShiftBits;
        sum += codes[i];
    }
    for (int64_t i = 0; i < n; ++i) q[i] = static_cast<int8_t>(codes[i]);
    return sum;
}

// q = clamp(rint(x / scale) + zero, -128, 127), the scale given; NaN has the code 0.
inline void quantize_chunk_static(const float* x, int64_t n, float scale, int zero, int8_t* q) {
    const float low = static_cast<float>(-128 - zero), high = static_cast<float>(127 - zero);
    int32_t codes[kChunk];
    for (int64_t i = 0; i < n; ++i) {
        const float ratio = x[i] / scale;
        float kept = ratio > high ? high : ratio;
        kept = kept < low ? low : kept;
        kept += kRoundShift;
        int32_t bits;
        memcpy(&bits, &kept, 4);
        codes[i] = ratio == ratio ? bits - kRoundShiftBits + zero : 0;
    }
    for (int64_t i = 0; i < n; ++i) q[i] = static_cast<int8_t>(codes[i]);
}

}  // namespace
