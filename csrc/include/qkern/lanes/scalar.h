// Sixteen floats in plain C++: what a tier's own lanes/<isa>.h provides in registers.
//
// A kernel that must give the same bits in every tier is written once over `Lanes` and compiled by each
// tier with its own header. Every operation is one IEEE operation a lane (round to nearest even, nothing
// contracted), and the reductions have a fixed order. Anonymous namespace: tiers share no inline code.
#pragma once
#include <string.h>

#include "qkern/scalar_float.h"

namespace {

constexpr int kLanes = 16;

struct Lanes {
    float v[kLanes];
};

#define QK_EACH_LANE for (int i = 0; i < kLanes; ++i)

inline Lanes splat(float x) {
    Lanes r;
    QK_EACH_LANE r.v[i] = x;
    return r;
}

inline Lanes load(const float* p) {
    Lanes r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}

inline Lanes load_f16(const uint16_t* p) {
    Lanes r;
    QK_EACH_LANE r.v[i] = from_f16(p[i]);
    return r;
}

inline Lanes load_bf16(const uint16_t* p) {
    Lanes r;
    QK_EACH_LANE r.v[i] = from_bf16(p[i]);
    return r;
}

inline Lanes load_codes(const uint8_t* p) {
    Lanes r;
    QK_EACH_LANE r.v[i] = static_cast<float>(p[i]);
    return r;
}

inline void store(float* p, const Lanes& a) { memcpy(p, a.v, sizeof a.v); }

inline void store_f16(uint16_t* p, const Lanes& a) { QK_EACH_LANE p[i] = to_f16(a.v[i]); }

inline void store_bf16(uint16_t* p, const Lanes& a) { QK_EACH_LANE p[i] = to_bf16(a.v[i]); }

// Lanes must hold integers 0..255.
inline void store_codes(uint8_t* p, const Lanes& a) { QK_EACH_LANE p[i] = static_cast<uint8_t>(static_cast<int>(a.v[i])); }

#define QK_LANE_OP(name, expression)                        \
    inline Lanes name(const Lanes& a, const Lanes& b) {     \
        Lanes r;                                            \
        QK_EACH_LANE r.v[i] = expression;                   \
        return r;                                           \
    }
QK_LANE_OP(add, a.v[i] + b.v[i])
QK_LANE_OP(sub, a.v[i] - b.v[i])
QK_LANE_OP(mul, a.v[i] * b.v[i])
QK_LANE_OP(div, a.v[i] / b.v[i])
// A NaN in `a` gives `b`.
QK_LANE_OP(min, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
QK_LANE_OP(max, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
// `count` plus one where `x` is above `threshold`.
inline Lanes count_above(const Lanes& count, const Lanes& x, const Lanes& threshold) {
    Lanes r;
    QK_EACH_LANE r.v[i] = count.v[i] + (x.v[i] > threshold.v[i] ? 1.0f : 0.0f);
    return r;
}
#undef QK_LANE_OP

// `a` where `x` is above `threshold`, else `b`.
inline Lanes where_above(const Lanes& x, const Lanes& threshold, const Lanes& a, const Lanes& b) {
    Lanes r;
    QK_EACH_LANE r.v[i] = x.v[i] > threshold.v[i] ? a.v[i] : b.v[i];
    return r;
}

// To the nearest integer, ties to even.
inline Lanes round_even(const Lanes& a) {
    Lanes r;
    // Beyond 2^23 every float is an integer; below, adding 2^23 makes the hardware round.
    QK_EACH_LANE {
        const float magnitude = float_of(bits_of(a.v[i]) & 0x7fffffffu);
        const float rounded = (magnitude + 8388608.0f) - 8388608.0f;
        const float kept = magnitude < 8388608.0f ? rounded : magnitude;
        r.v[i] = float_of(bits_of(kept) | (bits_of(a.v[i]) & 0x80000000u));
    }
    return r;
}

// table[index]; lanes must hold integers 0..15.
inline Lanes lookup(const float* table, const Lanes& index) {
    Lanes r;
    QK_EACH_LANE r.v[i] = table[static_cast<int>(index.v[i]) & 15];
    return r;
}

// 32 entries of a table of sixteen, by codes of 0..15.
inline void look_up_halves(const uint16_t* table, const uint8_t* codes, uint16_t* out) {
    for (int i = 0; i < 32; ++i) out[i] = table[codes[i] & 15];
}

inline Lanes or_bits(const Lanes& a, const Lanes& b) {
    Lanes r;
    QK_EACH_LANE r.v[i] = float_of(bits_of(a.v[i]) | bits_of(b.v[i]));
    return r;
}

// Without the sign bit, and with the other sign; NaN as every number.
inline Lanes magnitude(const Lanes& a) {
    Lanes r;
    QK_EACH_LANE r.v[i] = float_of(bits_of(a.v[i]) & 0x7fffffffu);
    return r;
}

inline Lanes flip_sign(const Lanes& a) {
    Lanes r;
    QK_EACH_LANE r.v[i] = float_of(bits_of(a.v[i]) ^ 0x80000000u);
    return r;
}

// The larger one of the bits as signed integers: floats of at least +0 as they are, below Inf, below NaN;
// anything with a sign is below them all.
inline Lanes max_bits(const Lanes& a, const Lanes& b) {
    Lanes r;
    QK_EACH_LANE {
        const int32_t x = static_cast<int32_t>(bits_of(a.v[i])), y = static_cast<int32_t>(bits_of(b.v[i]));
        r.v[i] = float_of(static_cast<uint32_t>(x > y ? x : y));
    }
    return r;
}

// The register as 32 halves: without their signs, with the other signs, the larger ones as signed integers.
inline Lanes magnitude_halves(const Lanes& a) {
    Lanes r;
    QK_EACH_LANE r.v[i] = float_of(bits_of(a.v[i]) & 0x7fff7fffu);
    return r;
}

inline Lanes flip_sign_halves(const Lanes& a) {
    Lanes r;
    QK_EACH_LANE r.v[i] = float_of(bits_of(a.v[i]) ^ 0x80008000u);
    return r;
}

inline Lanes max_halves(const Lanes& a, const Lanes& b) {
    int16_t x[2 * kLanes], y[2 * kLanes];
    memcpy(x, a.v, sizeof x);
    memcpy(y, b.v, sizeof y);
    for (int i = 0; i < 2 * kLanes; ++i) x[i] = x[i] > y[i] ? x[i] : y[i];
    Lanes r;
    memcpy(r.v, x, sizeof x);
    return r;
}

// The larger half of every pair, as a signed integer, above a zero.
inline Lanes upper_of_pairs(const Lanes& a) {
    Lanes r;
    QK_EACH_LANE {
        const uint32_t low = bits_of(a.v[i]) << 16, high = bits_of(a.v[i]) & 0xffff0000u;
        r.v[i] = float_of(static_cast<int32_t>(low) > static_cast<int32_t>(high) ? low : high);
    }
    return r;
}

inline bool any_bit(const Lanes& a) {
    uint32_t all = 0;
    QK_EACH_LANE all |= bits_of(a.v[i]);
    return all != 0;
}

// Lane i with lane i + 8, then + 4, + 2, + 1: the order that every tier follows.
#define QK_LANE_REDUCE(name, expression)                                             \
    inline float name(Lanes r) {                                                     \
        for (int half = kLanes / 2; half > 0; half /= 2) {                           \
            for (int i = 0; i < half; ++i) {                                         \
                const float a = r.v[i], b = r.v[i + half];                           \
                r.v[i] = expression;                                                 \
            }                                                                        \
        }                                                                            \
        return r.v[0];                                                               \
    }
QK_LANE_REDUCE(reduce_add, a + b)
QK_LANE_REDUCE(reduce_min, a < b ? a : b)
QK_LANE_REDUCE(reduce_max, a > b ? a : b)
#undef QK_LANE_REDUCE
#undef QK_EACH_LANE

}  // namespace

#include "qkern/lanes/memory.h"
