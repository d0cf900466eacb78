// Sixteen floats in four NEON registers, Armv8-A baseline. Same operations and order as lanes/scalar.h.
#pragma once
#include <arm_neon.h>

#include "qkern/scalar_float.h"

namespace {

constexpr int kLanes = 16;

struct Lanes {
    float32x4_t v[4];
};

#define QK_EACH_QUARTER for (int i = 0; i < 4; ++i)

inline Lanes splat(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {{v, v, v, v}};
}

inline Lanes load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }

inline void store(float* p, const Lanes& a) { QK_EACH_QUARTER vst1q_f32(p + 4 * i, a.v[i]); }

inline Lanes load_f16(const uint16_t* p) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return r;
}

inline Lanes load_bf16(const uint16_t* p) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return r;
}

inline Lanes load_codes(const uint8_t* p) {
    const uint8x16_t codes = vld1q_u8(p);
    const uint16x8_t lo = vmovl_u8(vget_low_u8(codes)), hi = vmovl_u8(vget_high_u8(codes));
    return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(lo))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(lo))),
             vcvtq_f32_u32(vmovl_u16(vget_low_u16(hi))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(hi)))}};
}

inline void store_f16(uint16_t* p, const Lanes& a) {
    QK_EACH_QUARTER vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}

// Round to nearest even in the upper 16 bits; a NaN keeps its upper payload and becomes quiet.
inline void store_bf16(uint16_t* p, const Lanes& a) {
    QK_EACH_QUARTER {
        const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        const uint32x4_t is_number = vceqq_f32(a.v[i], a.v[i]);
        vst1_u16(p + 4 * i, vshrn_n_u32(vbslq_u32(is_number, rounded, quiet), 16));
    }
}

inline void store_codes(uint8_t* p, const Lanes& a) {
    uint16x4_t words[4];
    QK_EACH_QUARTER words[i] = vmovn_u32(vcvtq_u32_f32(a.v[i]));
    const uint8x8_t lo = vmovn_u16(vcombine_u16(words[0], words[1]));
    const uint8x8_t hi = vmovn_u16(vcombine_u16(words[2], words[3]));
    vst1q_u8(p, vcombine_u8(lo, hi));
}

#define QK_LANE_OP(name, intrinsic)                                   \
    inline Lanes name(const Lanes& a, const Lanes& b) {               \
        Lanes r;                                                      \
        QK_EACH_QUARTER r.v[i] = intrinsic(a.v[i], b.v[i]);           \
        return r;                                                     \
    }
QK_LANE_OP(add, vaddq_f32)
QK_LANE_OP(sub, vsubq_f32)
QK_LANE_OP(mul, vmulq_f32)
QK_LANE_OP(div, vdivq_f32)
// The "number" forms: a NaN in one operand gives the other.
QK_LANE_OP(min, vminnmq_f32)
QK_LANE_OP(max, vmaxnmq_f32)
#undef QK_LANE_OP

// Rounded once: never where results are compared with lanes/scalar.h.
inline Lanes mul_add(const Lanes& a, const Lanes& b, const Lanes& sum) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = vfmaq_f32(sum.v[i], a.v[i], b.v[i]);
    return r;
}

inline float32x4_t or_quarter(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}

inline Lanes or_bits(const Lanes& a, const Lanes& b) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = or_quarter(a.v[i], b.v[i]);
    return r;
}

inline Lanes magnitude(const Lanes& a) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = vabsq_f32(a.v[i]);
    return r;
}

inline Lanes flip_sign(const Lanes& a) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = vnegq_f32(a.v[i]);
    return r;
}

inline Lanes max_bits(const Lanes& a, const Lanes& b) {
    Lanes r;
    QK_EACH_QUARTER {
        r.v[i] = vreinterpretq_f32_s32(vmaxq_s32(vreinterpretq_s32_f32(a.v[i]), vreinterpretq_s32_f32(b.v[i])));
    }
    return r;
}

#define QK_HALVES_OP(name, intrinsic, type, second)                                           \
    inline float32x4_t name(float32x4_t a, float32x4_t b) {                                   \
        return vreinterpretq_f32_##type(intrinsic(vreinterpretq_##type##_f32(a), second));    \
    }
QK_HALVES_OP(and_half_words, vandq_u16, u16, vreinterpretq_u16_f32(b))
QK_HALVES_OP(xor_half_words, veorq_u16, u16, vreinterpretq_u16_f32(b))
QK_HALVES_OP(max_half_words, vmaxq_s16, s16, vreinterpretq_s16_f32(b))
#undef QK_HALVES_OP

inline Lanes magnitude_halves(const Lanes& a) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = and_half_words(a.v[i], vreinterpretq_f32_u16(vdupq_n_u16(0x7fff)));
    return r;
}

inline Lanes flip_sign_halves(const Lanes& a) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = xor_half_words(a.v[i], vreinterpretq_f32_u16(vdupq_n_u16(0x8000)));
    return r;
}

inline Lanes max_halves(const Lanes& a, const Lanes& b) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = max_half_words(a.v[i], b.v[i]);
    return r;
}

inline Lanes upper_of_pairs(const Lanes& a) {
    Lanes r;
    QK_EACH_QUARTER {
        const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]);
        const float32x4_t low = vreinterpretq_f32_u32(vshlq_n_u32(bits, 16));
        const float32x4_t larger = max_half_words(a.v[i], low);
        r.v[i] = and_half_words(larger, vreinterpretq_f32_u32(vdupq_n_u32(0xffff0000u)));
    }
    return r;
}

inline bool any_bit(const Lanes& a) {
    const float32x4_t all = or_quarter(or_quarter(a.v[0], a.v[1]), or_quarter(a.v[2], a.v[3]));
    return vmaxvq_u32(vreinterpretq_u32_f32(all)) != 0;
}

inline Lanes round_even(const Lanes& a) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = vrndnq_f32(a.v[i]);
    return r;
}

inline Lanes count_above(const Lanes& count, const Lanes& x, const Lanes& threshold) {
    Lanes r;
    const uint32x4_t one = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    QK_EACH_QUARTER {
        const uint32x4_t step = vandq_u32(vcgtq_f32(x.v[i], threshold.v[i]), one);
        r.v[i] = vaddq_f32(count.v[i], vreinterpretq_f32_u32(step));
    }
    return r;
}

inline Lanes where_above(const Lanes& x, const Lanes& threshold, const Lanes& a, const Lanes& b) {
    Lanes r;
    QK_EACH_QUARTER r.v[i] = vbslq_f32(vcgtq_f32(x.v[i], threshold.v[i]), a.v[i], b.v[i]);
    return r;
}

// The table is 64 bytes: position p selects bytes 4p .. 4p + 3.
inline Lanes lookup(const float* table, const Lanes& index) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(table);
    const uint8x16x4_t whole = {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
    Lanes r;
    QK_EACH_QUARTER {
        const uint32x4_t first = vmulq_n_u32(vcvtq_u32_f32(index.v[i]), 0x04040404u);
        const uint8x16_t where = vreinterpretq_u8_u32(vaddq_u32(first, vdupq_n_u32(0x03020100u)));
        r.v[i] = vreinterpretq_f32_u8(vqtbl4q_u8(whole, where));
    }
    return r;
}

// Byte tables of the lower and the upper halves.
inline void look_up_halves(const uint16_t* table, const uint8_t* codes, uint16_t* out) {
    const uint16x8_t first = vld1q_u16(table), second = vld1q_u16(table + 8);
    const uint8x16_t low = vcombine_u8(vmovn_u16(first), vmovn_u16(second));
    const uint8x16_t high = vcombine_u8(vshrn_n_u16(first, 8), vshrn_n_u16(second, 8));
    for (int i = 0; i < 32; i += 16) {
        const uint8x16_t at = vld1q_u8(codes + i);
        const uint8x16_t x = vqtbl1q_u8(low, at), y = vqtbl1q_u8(high, at);
        vst1q_u16(out + i, vreinterpretq_u16_u8(vzip1q_u8(x, y)));
        vst1q_u16(out + i + 8, vreinterpretq_u16_u8(vzip2q_u8(x, y)));
    }
}

#define QK_LANE_REDUCE(name, quarter, half)                                                   \
    inline float name(const Lanes& a) {                                                       \
        const float32x4_t four = quarter(quarter(a.v[0], a.v[2]), quarter(a.v[1], a.v[3]));   \
        const float32x2_t two = half(vget_low_f32(four), vget_high_f32(four));                \
        return vget_lane_f32(half(two, vdup_lane_f32(two, 1)), 0);                            \
    }
QK_LANE_REDUCE(reduce_add, vaddq_f32, vadd_f32)
QK_LANE_REDUCE(reduce_min, vminq_f32, vmin_f32)
QK_LANE_REDUCE(reduce_max, vmaxq_f32, vmax_f32)
#undef QK_LANE_REDUCE
#undef QK_EACH_QUARTER

}  // namespace

#include "qkern/lanes/memory.h"
