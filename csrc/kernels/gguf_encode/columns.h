// A super-block by columns, for the types that have sixteen sub-blocks of sixteen weights, and d for signed integer
// scales. A lane is a sub-block here, and the candidates come one after another.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kquants.h"
#include "qkern/gguf_blocks.h"

namespace {

using namespace qk;

// Weights of a sub-block, and sub-blocks of a super-block.
constexpr int kRun = 16;
static_assert(kRun == kLanes, "a lane is a sub-block");

// A super-block by columns: lane j of column i is weight i of sub-block j. Without weights (kEven) all w are 1.
struct Columns {
    Lanes x[kRun], w[kRun], wx[kRun];
    Lanes low;         // taken off x in Q2_K, so that x is at least 0 and no sum cancels
    Lanes w1, x1, xx;  // weighted sums of 1, x, x x
    Lanes inverse_w1;
};

// Written as instructions where the compiler makes two of a selection; of two zeros, or of a NaN, b.
#if defined(__AVX512F__)
inline Lanes least(const Lanes& a, const Lanes& b) {
    return reinterpret_cast<Lanes>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
inline Lanes most(const Lanes& a, const Lanes& b) {
    return reinterpret_cast<Lanes>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#else
inline Lanes least(const Lanes& a, const Lanes& b) { return select_less(a, b, a, b); }
inline Lanes most(const Lanes& a, const Lanes& b) { return select_less(b, a, a, b); }
#endif

inline Lanes within(const Lanes& value, float low, float high) {
    return least(splat(high), most(splat(low), value));
}

// The nearest integer within [low, high].
inline Lanes code_of(const Lanes& value, float low, float high) { return round(within(value, low, high)); }

inline float largest(const Lanes& lanes) {
    float values[kLanes];
    memcpy(values, &lanes, sizeof(values));
    float found = values[0];
    for (int c = 1; c < kLanes; ++c) found = values[c] > found ? values[c] : found;
    return found;
}

inline bool is_even(const float* w) {
    int other = 0;
    for (int k = 0; k < kSuper; ++k) other |= w[k] != w[0];
    return other == 0;
}

// Sums of the columns of x, which `low` has been taken off.
template <bool kEven> inline void add_up(Columns* t) {
    t->w1 = kEven ? splat(static_cast<float>(kRun)) : Lanes{};
    t->x1 = t->xx = Lanes{};
    for (int i = 0; i < kRun; ++i) {
        if (!kEven) {
            t->wx[i] = t->w[i] * t->x[i];
            t->w1 += t->w[i];
        }
        const Lanes wx = kEven ? t->x[i] : t->wx[i];
        t->x1 += wx;
        t->xx += wx * t->x[i];
    }
    t->inverse_w1 = 1.0f / t->w1;
}

// Bytes of the codes in the order of the weights.
inline void bytes_of(const Lanes* columns, uint8_t* codes) {
    float values[kSuper], turned[kSuper];
    memcpy(values, columns, sizeof(values));
    for (int j = 0; j < kRun; ++j) {
        for (int i = 0; i < kRun; ++i) turned[kRun * j + i] = values[kRun * i + j];
    }
    for (int k = 0; k < kSuper; ++k) codes[k] = static_cast<uint8_t>(static_cast<int32_t>(turned[k]));
}

// Bits 2 f and 2 f + 1 of byte 32 h + i: weight 128 h + 32 f + i.
inline void pack_quads(const uint8_t* codes, uint8_t* qs) {
    for (int h = 0; h < 2; ++h) {
        const uint8_t* q = codes + 128 * h;
        for (int i = 0; i < 32; ++i) {
            qs[32 * h + i] = static_cast<uint8_t>((q[i] & 3) | (q[32 + i] & 3) << 2 | (q[64 + i] & 3) << 4 |
                                                  (q[96 + i] & 3) << 6);
        }
    }
}

// Signed 6-bit scales: d times -32 to 31, in Q3_K and IQ4_XS.
constexpr float kLowScale = -32.0f, kHighScale = 31.0f;
// Where their rounding costs more than this, relative to what else is lost, true errors choose d from widest over
// -kFirstCoarse, -kFirstCoarse - 1, ...
constexpr float kCoarseScales = 0.03f;
constexpr int kFirstCoarse = 22, kLastCoarse = 45;

// The d under which the integers nearest to the fitted scales cost least; a lane is a candidate. A scale that is off
// by e costs weight * e * e. The widest gets about -32, the longer side.
inline float choose_d(const float* fits, const float* weights, int count, float widest, float* cost) {
    float best = 0.0f;
    *cost = kNoFit;
    for (int c = 0; c < 2 * kLanes; c += kLanes) {
        float tops[kLanes];
        for (int k = 0; k < kLanes; ++k) tops[k] = -28.0f - 0.25f * static_cast<float>(c + k);
        const Lanes d = widest / load(tops), inverse = inverse_or_zero(d);
        Lanes costs{};
        for (int j = 0; j < count; ++j) {
            const Lanes off = code_of(inverse * fits[j], kLowScale, kHighScale) * d - fits[j];
            costs += (off * weights[j]) * off;
        }
        float least_cost;
        const int k = best_lane(costs, &least_cost);
        if (least_cost < *cost) {
            *cost = least_cost;
            best = lane(d, k);
        }
    }
    return unit_f16(best);
}

}  // namespace
