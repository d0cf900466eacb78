// Scalar conversions between f32 and the 16-bit floats, round to nearest even, exact for every input.
// Everything is in an anonymous namespace: a tier's object file must not share inline code with another's.
#pragma once
#include <string.h>

#include "qkern/types.h"

namespace {

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline float from_bf16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

inline uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);  // quiet NaN
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float from_f16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    // A value with exponent field e and 2^112 too small: one exact multiplication also normalizes subnormals.
    return float_of(sign | bits_of(float_of(rest << 13) * float_of(0x77800000u)));
}

inline uint16_t to_f16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
    if (magnitude < 0x38800000u) {
        // Subnormal in f16: adding 2^-1 * 2^... aligns the mantissa so that the hardware rounds it.
        const float aligned = float_of(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of(aligned) - 0x3f000000u));
    }
    const uint32_t odd = magnitude >> 13 & 1u;
    return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

inline int64_t dtype_size(qk::DType dtype) { return dtype == qk::DType::f32 ? 4 : 2; }

inline float load_float(const void* data, qk::DType dtype, int64_t i) {
    if (dtype == qk::DType::f32) return static_cast<const float*>(data)[i];
    const uint16_t half = static_cast<const uint16_t*>(data)[i];
    return dtype == qk::DType::f16 ? from_f16(half) : from_bf16(half);
}

inline void store_float(void* data, qk::DType dtype, int64_t i, float value) {
    if (dtype == qk::DType::f32) {
        static_cast<float*>(data)[i] = value;
    } else {
        static_cast<uint16_t*>(data)[i] = dtype == qk::DType::f16 ? to_f16(value) : to_bf16(value);
    }
}

inline float round_to(float value, qk::DType dtype) {
    if (dtype == qk::DType::f16) return from_f16(to_f16(value));
    return dtype == qk::DType::bf16 ? from_bf16(to_bf16(value)) : value;
}

}  // namespace
