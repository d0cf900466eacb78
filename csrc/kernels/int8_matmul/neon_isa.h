// NEON: 4 rows a register. Codes enter as signed bytes, 128 less. With the dot product extension one instruction
// multiplies 16 of them by a quad of activations; without it, widening products are added in pairs
// (|product| <= 128 * 128 fits int16, and pairs are widened before they are added).
#pragma once
#include "qkern/lanes/neon.h"

namespace {

struct Isa {
    static constexpr int kRows = 4;
    static constexpr int kVectors = 4;
    static constexpr int kTileM = 4;  // 16 sums, 4 registers of activations, 1 of codes
    static constexpr int kBias = 128;

    using X = int8_t;
    using I = int32x4_t;
    using Codes = int8x16_t;
    using Quad = int8x16_t;

    static void place(const int8_t* codes, int64_t n, X* out) { memcpy(out, codes, static_cast<size_t>(n)); }
    static I load(const int32_t* at) { return vld1q_s32(at); }
    static void store(int32_t* at, I value) { vst1q_s32(at, value); }
    static I zero() { return vdupq_n_s32(0); }
    static I add(I a, I b) { return vaddq_s32(a, b); }
    static Codes load_codes(const uint8_t* at) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(at), vdupq_n_u8(128))); }
    static Quad load_quad(const X* at) {
        int32_t quad;
        memcpy(&quad, at, 4);
        return vreinterpretq_s8_s32(vdupq_n_s32(quad));
    }
    static I dot(I sum, Codes codes, Quad quad) {
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, codes, quad);
#else
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(quad)));
        const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(codes), vget_high_s8(quad)));
        return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
    }
};

}  // namespace
