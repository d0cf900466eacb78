// Sixteen fp32 values side by side, in the compiler's portable vectors: one register in avx512, two in avx2,
// four elsewhere. Every tier compiles the same source with its own flags; there is no FMA contraction and
// every sum has one fixed order, so all tiers give the same bits. Everything is in an anonymous
// namespace: a tier's object file shares no inline code with another's.
#pragma once
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "qkern/scalar_float.h"

namespace {

#if defined(__AVX512F__)
constexpr int kRegister = 16;
#elif defined(__AVX__)
constexpr int kRegister = 8;
#else
constexpr int kRegister = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kRegister)));

// Two vectors as one; nesting doubles again.
template <class V> struct Twice {
    V a, b;
};

template <int registers> struct Wide {
    using F = Twice<typename Wide<registers / 2>::F>;
};
template <> struct Wide<1> {
    using F = Floats;
};

// What few blocks need stays out of the way of the others.
#define QK_RARE __attribute__((noinline))

constexpr int kLanes = 16;
using Lanes = Wide<kLanes / kRegister>::F;

#define QK_LANEWISE(op)                                                                         \
    template <class V> inline Twice<V> operator op(const Twice<V>& x, const Twice<V>& y) {      \
        return {x.a op y.a, x.b op y.b};                                                        \
    }                                                                                           \
    template <class V> inline Twice<V> operator op(const Twice<V>& x, float y) {                \
        return {x.a op y, x.b op y};                                                            \
    }                                                                                           \
    template <class V> inline Twice<V> operator op(float x, const Twice<V>& y) {                \
        return {x op y.a, x op y.b};                                                            \
    }
QK_LANEWISE(+)
QK_LANEWISE(-)
QK_LANEWISE(*)
QK_LANEWISE(/)
#undef QK_LANEWISE

template <class V> inline Twice<V> operator-(const Twice<V>& x) { return {-x.a, -x.b}; }
template <class V> inline void operator+=(Twice<V>& x, const Twice<V>& y) { x = x + y; }

// x < y ? yes : no, lane by lane.
inline Floats select_less(const Floats& x, const Floats& y, const Floats& yes, const Floats& no) {
    return x < y ? yes : no;
}
template <class V>
inline Twice<V> select_less(const Twice<V>& x, const Twice<V>& y, const Twice<V>& yes, const Twice<V>& no) {
    return {select_less(x.a, y.a, yes.a, no.a), select_less(x.b, y.b, yes.b, no.b)};
}

inline Lanes lesser(const Lanes& x, const Lanes& y) { return select_less(x, y, x, y); }
inline Lanes greater(const Lanes& x, const Lanes& y) { return select_less(y, x, x, y); }

inline Lanes splat(float value) { return value - Lanes{}; }

inline Lanes load(const float* data) {
    Lanes lanes;
    memcpy(&lanes, data, sizeof(lanes));
    return lanes;
}

// Sixteen rows of sixteen values turned: lane c of column i is value i of row c.
#if defined(__AVX512F__)
inline void transpose(const float* rows, int64_t stride, Lanes* columns) {
    __m512 v[16], t[16];
    for (int c = 0; c < 16; ++c) v[c] = _mm512_loadu_ps(rows + c * stride);
    for (int c = 0; c < 16; c += 2) {
        t[c] = _mm512_unpacklo_ps(v[c], v[c + 1]);
        t[c + 1] = _mm512_unpackhi_ps(v[c], v[c + 1]);
    }
    // Value i of rows c to c + 3 in v[c + i % 4], a quarter for each i / 4.
    for (int c = 0; c < 16; c += 4) {
        v[c] = _mm512_shuffle_ps(t[c], t[c + 2], 0x44);
        v[c + 1] = _mm512_shuffle_ps(t[c], t[c + 2], 0xee);
        v[c + 2] = _mm512_shuffle_ps(t[c + 1], t[c + 3], 0x44);
        v[c + 3] = _mm512_shuffle_ps(t[c + 1], t[c + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 low = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88);
        const __m512 high = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
        const __m512 low2 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
        const __m512 high2 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
        columns[i] = reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(low, low2, 0x88));
        columns[i + 8] = reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(low, low2, 0xdd));
        columns[i + 4] = reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(high, high2, 0x88));
        columns[i + 12] = reinterpret_cast<Lanes>(_mm512_shuffle_f32x4(high, high2, 0xdd));
    }
}
#else
inline void transpose(const float* rows, int64_t stride, Lanes* columns) {
    float* lane = reinterpret_cast<float*>(columns);
    for (int c = 0; c < kLanes; ++c) {
        for (int i = 0; i < kLanes; ++i) lane[i * kLanes + c] = rows[c * stride + i];
    }
}
#endif

// Below this every fp16 scale is zero, and above it no reciprocal of the searches overflows.
constexpr float kTiny = 1.0f / (1 << 26);

inline bool any_positive(const Lanes& value) {
    float values[kLanes];
    memcpy(values, &value, sizeof(values));
    int any = 0;
    for (int c = 0; c < kLanes; ++c) any |= values[c] > 0.0f;
    return any != 0;
}

// Nearest integer, ties to even, for |value| < 2^22: adding 1.5 * 2^23 leaves no fraction bits.
constexpr float kRound = 12582912.0f;

inline Lanes round(const Lanes& value) { return (value + kRound) - kRound; }

// Clamps to [low, high], then rounds; high and low are integers. A NaN stays NaN.
inline Lanes clamp_round(const Lanes& v, float low, float high) {
    const Lanes lows = splat(low), highs = splat(high);
    const Lanes value = select_less(v, lows, lows, v);
    return round(select_less(highs, value, highs, value));
}

inline Lanes root(const Lanes& value) {
    float values[kLanes];
    memcpy(values, &value, sizeof(values));
    for (int c = 0; c < kLanes; ++c) values[c] = __builtin_sqrtf(values[c]);
    return load(values);
}

// What to_f16 makes of values below 65504, but for ties.
inline Lanes round_f16(const Lanes& value) {
    const Lanes size = greater(value, -value);
    const Lanes upper = value * 8193.0f;
    const Lanes normal = upper - (upper - value);
    const Lanes subnormal = (value + 0.75f) - 0.75f;
    return select_less(size, splat(1.0f / (1 << 14)), subnormal, normal);
}

// The fp16 unit of integer scales: the value as fp16 has it, but next to zero, where fp16 has a few steps, rounded away
// from it, so that the integers stay in range and no block vanishes. Never -0.
constexpr float kHalfStep = 1.0f / (1 << 24), kFewSteps = 16 * kHalfStep;

inline Lanes unit_f16(const Lanes& value) {
    const Lanes size = greater(value, -value), nearest = (size + 0.75f) - 0.75f;
    const Lanes above = nearest + select_less(nearest, size, splat(kHalfStep), Lanes{});
    return select_less(size, splat(kFewSteps), select_less(value, Lanes{}, -above, above), round_f16(value));
}

inline float unit_f16(float value) {
    const float size = value < 0.0f ? -value : value, nearest = (size + 0.75f) - 0.75f;
    const float above = nearest < size ? nearest + kHalfStep : nearest;
    if (size < kFewSteps) return value < 0.0f ? -above : above;
    return from_f16(to_f16(value));
}

// Nearest of the integers low..high, not for NaN. AVX2 and later are quicker at clamping what kRound has made
// of a float as an integer: it has the order of the values.
#if defined(__AVX2__)
typedef int32_t Integers __attribute__((vector_size(4 * kRegister)));

inline Floats snap(const Floats& value, float low, float high) {
    const Integers rounded = reinterpret_cast<Integers>(value + kRound);
    const Integers lows = reinterpret_cast<Integers>((low + kRound) - Floats{});
    const Integers highs = reinterpret_cast<Integers>((high + kRound) - Floats{});
    const Integers raised = rounded < lows ? lows : rounded;
    return reinterpret_cast<Floats>(raised < highs ? raised : highs) - kRound;
}
#else
inline Floats snap(const Floats& value, float low, float high) {
    const Floats lows = low - Floats{}, highs = high - Floats{};
    const Floats raised = select_less(lows, value, value, lows);
    return (select_less(raised, highs, raised, highs) + kRound) - kRound;
}
#endif
template <class V> inline Twice<V> snap(const Twice<V>& value, float low, float high) {
    return {snap(value.a, low, high), snap(value.b, low, high)};
}

// 1 / value, and 0 where value is 0 or NaN.
inline Lanes inverse_or_zero(const Lanes& value) {
    const Lanes zero{}, inverse = 1.0f / value;
    return select_less(value, zero, inverse, select_less(zero, value, inverse, zero));
}

inline float inverse_or_zero(float value) { return value == 0.0f ? 0.0f : 1.0f / value; }

// The lane with the smallest error; the first one on ties, lane 0 if all are NaN.
inline int best_lane(const Lanes& error, float* least) {
    float values[kLanes];
    memcpy(values, &error, sizeof(values));
    int best = 0;
    for (int c = 1; c < kLanes; ++c) {
        if (values[c] < values[best]) best = c;
    }
    *least = values[best];
    return best;
}

inline float lane(const Lanes& lanes, int c) {
    float values[kLanes];
    memcpy(values, &lanes, sizeof(values));
    return values[c];
}

// Sum of the lanes by halves: a fixed order.
inline float sum(const Lanes& lanes) {
    float values[kLanes];
    memcpy(values, &lanes, sizeof(values));
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int c = 0; c < half; ++c) values[c] += values[c + half];
    }
    return values[0];
}

// codes[i] = clamp(rint((x[i] + offset) * inverse)) for n a multiple of 16.
inline void choose_codes(const float* x, int n, float inverse, float offset, float low, float high,
                         int32_t* codes) {
    for (int i = 0; i < n; i += kLanes) {
        float values[kLanes];
        const Lanes code = clamp_round((load(x + i) + offset) * inverse, low, high);
        memcpy(values, &code, sizeof(values));
        for (int c = 0; c < kLanes; ++c) codes[i + c] = static_cast<int32_t>(values[c]);
    }
}

}  // namespace
