// NEON: 4 rows a register. With the dot product extension one instruction multiplies 16 signed codes by a quad
// of activations; without it, widening products are added in pairs. Codes of up to 4 bits are signed bytes as
// they are, 8-bit codes enter 128 less: |product| <= 128 * 127 fits int16.
#pragma once
#include <arm_neon.h>

#include "prepare.h"

namespace {

struct Isa {
    static constexpr int kRows = 4;
    static constexpr int kVectors = 4;
    static constexpr int kDirectM = 4;  // 16 sums, 4 code vectors
    static constexpr int kDirectRows = 8;
    static constexpr int kTileM = 4;
    static constexpr int kFloatM = 4;
    static constexpr int kPairQuads = 0;
    static constexpr bool kSignedWide = true;

    using I = int32x4_t;
    using F = float32x4_t;
    using Table = uint8x16x4_t;  // the bytes of 16 floats

    static uint8x16_t bytes(I a) { return vreinterpretq_u8_s32(a); }
    static I lanes(uint8x16_t a) { return vreinterpretq_s32_u8(a); }

    static I load(const uint8_t* at) { return lanes(vld1q_u8(at)); }
    static I load_i(const int32_t* at) { return vld1q_s32(at); }
    static void store(uint8_t* at, I value) { vst1q_u8(at, bytes(value)); }
    static I splat(int32_t value) { return vdupq_n_s32(value); }
    static I splat_byte(int value) { return lanes(vdupq_n_u8(static_cast<uint8_t>(value))); }
    static I bit_and(I a, I b) { return vandq_s32(a, b); }
    static I or_and(I a, I b, I c) { return vorrq_s32(a, vandq_s32(b, c)); }
    static I bit_xor(I a, I b) { return veorq_s32(a, b); }
    template <int SHIFT>
    static I shift_right(I a) {
        if constexpr (SHIFT == 0) {
            return a;
        } else {
            return lanes(vshrq_n_u8(bytes(a), SHIFT));
        }
    }
    template <int SHIFT>
    static I shift_left(I a) {
        return lanes(vshlq_n_u8(bytes(a), SHIFT));
    }
    static I sub(I a, I b) { return vsubq_s32(a, b); }
    static I mul(I a, I b) { return vmulq_s32(a, b); }
    template <int BYTE>
    static uint32x4_t byte_u32(I a) {
        uint32x4_t shifted = vreinterpretq_u32_s32(a);
        if constexpr (BYTE > 0) shifted = vshrq_n_u32(shifted, 8 * BYTE);
        return vandq_u32(shifted, vdupq_n_u32(255));
    }
    template <int BYTE>
    static I byte(I a) {
        return vreinterpretq_s32_u32(byte_u32<BYTE>(a));
    }
    static I load_quad(const int8_t* at) {
        int32_t quad;
        memcpy(&quad, at, 4);
        return vdupq_n_s32(quad);
    }
    template <bool WIDE>
    static I dot4(I sum, I codes, I quad) {
        const int8x16_t a = vreinterpretq_s8_s32(codes), b = vreinterpretq_s8_s32(quad);
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, a, b);
#else
        const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
        const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(a), vget_high_s8(b)));
        return vaddq_s32(sum, vpaddq_s32(low, high));
#endif
    }
    static I load_table(const uint8_t* table) { return lanes(vld1q_u8(table)); }
    static I lookup_bytes(I table, I codes) { return lanes(vqtbl1q_u8(bytes(table), bytes(codes))); }

    static F load_f(const float* at) { return vld1q_f32(at); }
    static void store_f(float* at, F value) { vst1q_f32(at, value); }
    static F load_as_float(const uint8_t* at, qk::DType dtype) {
        if (dtype == qk::DType::f32) return vreinterpretq_f32_u8(vld1q_u8(at));
        const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(at));
        if (dtype == qk::DType::f16) return vcvt_f32_f16(vreinterpret_f16_u16(halves));
        return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
    }
    static void store_as(void* at, qk::DType dtype, F value) {
        auto* out = static_cast<uint8_t*>(at);
        if (dtype == qk::DType::f32) {
            vst1q_u8(out, vreinterpretq_u8_f32(value));
        } else if (dtype == qk::DType::f16) {
            vst1_u8(out, vreinterpret_u8_f16(vcvt_f16_f32(value)));
        } else {
            // Round to nearest even; a NaN keeps its upper half with the quiet bit set.
            const uint32x4_t raw = vreinterpretq_u32_f32(value);
            const uint32x4_t upper = vshrq_n_u32(raw, 16);
            const uint32x4_t bias = vaddq_u32(vandq_u32(upper, vdupq_n_u32(1)), vdupq_n_u32(0x7fff));
            const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(raw, bias), 16);
            const uint32x4_t quiet = vorrq_u32(upper, vdupq_n_u32(0x40));
            const uint32x4_t word = vbslq_u32(vceqq_f32(value, value), rounded, quiet);
            vst1_u8(out, vreinterpret_u8_u16(vmovn_u32(word)));
        }
    }
    static F splat_f(float value) { return vdupq_n_f32(value); }
    static F to_float(I a) { return vcvtq_f32_s32(a); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub_f(F a, F b) { return vsubq_f32(a, b); }
    static F mul_f(F a, F b) { return vmulq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static Table load_float_table(const float* table) {
        const auto* raw = reinterpret_cast<const uint8_t*>(table);
        return {{vld1q_u8(raw), vld1q_u8(raw + 16), vld1q_u8(raw + 32), vld1q_u8(raw + 48)}};
    }
    template <int BYTE>
    static F lookup_floats(const Table& table, I codes) {
        // Four bytes of entry c: 4c, 4c + 1, 4c + 2, 4c + 3.
        const uint32x4_t index = vmulq_u32(byte_u32<BYTE>(codes), vdupq_n_u32(0x04040404u));
        const uint32x4_t at = vaddq_u32(index, vdupq_n_u32(0x03020100u));
        return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(at)));
    }
};

}  // namespace
