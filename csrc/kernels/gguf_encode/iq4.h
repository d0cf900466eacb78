// IQ4_NL (32 weights) and IQ4_XS (8 x 32, scales of 6 bits): codes of a table that is denser near zero. Sixteen
// candidate scales side by side; the error of a fit is S(x x) - scale S(x v).
#pragma once
#include "columns.h"
#include "legacy.h"
#include "qkern/gguf_blocks.h"

namespace {

using namespace qk;

// The table's value nearest to u: up one step for every midpoint that u has reached.
inline Lanes nearest_value(const Lanes& u) {
    Lanes value = splat(static_cast<float>(kIq4Values[0]));
    for (int k = 1; k < 16; ++k) {
        const float step = static_cast<float>(kIq4Values[k] - kIq4Values[k - 1]);
        const float middle = 0.5f * static_cast<float>(kIq4Values[k] + kIq4Values[k - 1]);
        value += select_less(u, splat(middle), Lanes{}, splat(step));
    }
    return value;
}

// The best of the candidates' least-squares fits: its scale, what a scale that is off costs, and by how much the fit
// is better than nothing.
struct ValueFit {
    float scale, weight, gain;
};

inline ValueFit fit_values(const float* x, const float* w, const Lanes& inverse) {
    Lanes vv{}, xv{};
    for (int i = 0; i < kBlock; ++i) {
        const Lanes v = nearest_value(inverse * x[i]);
        const Lanes wv = v * w[i];
        vv += wv * v;
        xv += wv * x[i];
    }
    const Lanes scale = xv * inverse_or_zero(vv);
    float loss;
    const int c = best_lane(-(scale * xv), &loss);
    return {lane(scale, c), lane(vv, c), -loss};
}

// The error of each lane's own scale, as it is stored.
inline Lanes error_of_values(const float* x, const float* w, const Lanes& scale) {
    const Lanes inverse = inverse_or_zero(scale);
    Lanes error{};
    for (int i = 0; i < kBlock; ++i) {
        const Lanes r = x[i] - nearest_value(inverse * x[i]) * scale;
        error += (r * w[i]) * r;
    }
    return error;
}

// Units of the table that the value of largest magnitude is mapped to, over -127.
const float kReachIq4[kLanes] = {0.72f, 0.76f, 0.80f, 0.84f, 0.87f, 0.90f, 0.93f, 0.955f,
                                 0.98f, 1.00f, 1.02f, 1.05f, 1.08f, 1.12f, 1.16f, 1.2f};
// Values of the table and a little beside them that the weight that counts most is mapped to.
const float kAnchorIq4[kLanes] = {-104.0f, -83.0f, -65.0f, -49.0f, 69.0f,  53.0f,  38.0f,  89.0f,
                                  113.0f,  -74.0f, -57.0f, 61.0f,  79.0f, -93.0f, 101.0f, -115.0f};
// Relative steps around a fit.
const float kNearIq4[kLanes] = {0.0f,   -0.008f, 0.008f, -0.016f, 0.016f, -0.024f, 0.024f, -0.033f,
                                0.033f, -0.043f, 0.043f, -0.054f, 0.054f, -0.068f, 0.068f, 0.085f};

inline ValueFit refined(const float* x, const float* w, const ValueFit& fit) {
    const ValueFit near = fit_values(x, w, inverse_or_zero(fit.scale + fit.scale * load(kNearIq4)));
    return near.gain > fit.gain ? near : fit;
}

// Scale 0 where an fp16 scale holds none of the weights.
inline ValueFit fit_iq4(const float* x, const float* w) {
    const float extreme = range_of(x, kBlock).extreme();
    if (!(extreme < -kTiny || extreme > kTiny)) return {0.0f, 0.0f, 0.0f};
    const Lanes reach = load(kReachIq4) * (static_cast<float>(kIq4Values[0]) / extreme);
    const ValueFit down = fit_values(x, w, reach), up = fit_values(x, w, -reach);
    const ValueFit fit = refined(x, w, up.gain > down.gain ? up : down);
    // With importance the outlier need not be what counts.
    float heaviest = 0.0f, anchor = extreme;
    for (int i = 0; i < kBlock; ++i) {
        const float weight = (w[i] * x[i]) * x[i];
        anchor = weight > heaviest ? x[i] : anchor;
        heaviest = weight > heaviest ? weight : heaviest;
    }
    if (anchor == extreme || !(anchor < -kTiny || anchor > kTiny)) return fit;
    const ValueFit other = refined(x, w, fit_values(x, w, load(kAnchorIq4) / anchor));
    return other.gain > fit.gain ? other : fit;
}

inline void choose_values(const float* x, float scale, uint8_t* qs) {
    const float inverse = inverse_or_zero(scale);
    uint8_t codes[kBlock];
    for (int i = 0; i < kBlock; ++i) {
        const float u = x[i] * inverse;
        int code = 0;
        for (int k = 1; k < 16; ++k) code += !(u < 0.5f * static_cast<float>(kIq4Values[k] + kIq4Values[k - 1]));
        codes[i] = static_cast<uint8_t>(code);
    }
    for (int i = 0; i < kBlock / 2; ++i) qs[i] = static_cast<uint8_t>(codes[i] | codes[i + kBlock / 2] << 4);
}

inline void encode_block(const float* x, const float* w, BlockIQ4_NL* block) {
    block->d = to_f16(unit_f16(fit_iq4(x, w).scale));
    choose_values(x, from_f16(block->d), block->qs);
}

// IQ4_XS ------------------------------------------------------------------------------------------------

constexpr int kRunsIq4 = 8;
const float kStepScaleIq4[kLanes] = {0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8};

// Chooses the integer scale of each run near the fitted one; returns the error.
inline float choose_scales_iq4(const float* x, const float* w, const float* fits, float d, float* scale) {
    const float inverse_d = inverse_or_zero(d);
    float total = 0.0f;
    for (int j = 0; j < kRunsIq4; ++j) {
        const Lanes nearest = code_of(splat(fits[j] * inverse_d), kLowScale, kHighScale);
        const Lanes scales = within(nearest + load(kStepScaleIq4), kLowScale, kHighScale);
        float error;
        const int c = best_lane(error_of_values(x + kBlock * j, w + kBlock * j, scales * d), &error);
        scale[j] = lane(scales, c);
        total += error;
    }
    return total;
}

// The d that suits the codes of the chosen scales.
inline float refit_iq4(const float* x, const float* w, float d, const float* scale) {
    Lanes aa{}, ax{};
    for (int i = 0; i < kSuper; i += kLanes) {
        const float a = scale[i / kBlock];
        const Lanes v = nearest_value(load(x + i) * inverse_or_zero(a * d)) * a;
        const Lanes weighted = v * load(w + i);
        aa += weighted * v;
        ax += weighted * load(x + i);
    }
    return unit_f16(sum(ax) * inverse_or_zero(sum(aa)));
}

inline void encode_block(const float* x, const float* w, BlockIQ4_XS* block) {
    float fits[kRunsIq4], weights[kRunsIq4], scale[kRunsIq4], again[kRunsIq4];
    float widest = 0.0f, fitted = 0.0f;
    for (int j = 0; j < kRunsIq4; ++j) {
        const ValueFit fit = fit_iq4(x + kBlock * j, w + kBlock * j);
        fits[j] = fit.scale;
        weights[j] = fit.weight;
        fitted -= fit.gain;
        if (fits[j] * fits[j] > widest * widest) widest = fits[j];
    }
    for (int k = 0; k < kSuper; ++k) fitted += (w[k] * x[k]) * x[k];
    float cost, d = choose_d(fits, weights, kRunsIq4, widest, &cost);
    float error = choose_scales_iq4(x, w, fits, d, scale);
    const auto consider = [&](float next) {
        const float left = choose_scales_iq4(x, w, fits, next, again);
        if (!(left < error)) return false;
        error = left;
        d = next;
        memcpy(scale, again, sizeof(scale));
        return true;
    };
    if (cost > kCoarseScales * fitted) {
        for (int top = kFirstCoarse; top < kLastCoarse; ++top) consider(unit_f16(widest / static_cast<float>(-top)));
    }
    for (int r = 0; r < 2 && consider(refit_iq4(x, w, d, scale)); ++r) {
    }
    block->d = to_f16(d);
    block->scales_h = 0;
    memset(block->scales_l, 0, sizeof(block->scales_l));
    for (int j = 0; j < kRunsIq4; ++j) {
        const int stored = static_cast<int>(scale[j]) + 32;
        block->scales_l[j / 2] = static_cast<uint8_t>(block->scales_l[j / 2] | (stored & 15) << 4 * (j & 1));
        block->scales_h = static_cast<uint16_t>(block->scales_h | (stored >> 4) << 2 * j);
        choose_values(x + kBlock * j, d * scale[j], block->qs + 16 * j);
    }
}

}  // namespace
