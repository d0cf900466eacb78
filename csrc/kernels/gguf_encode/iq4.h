// IQ4_NL (32 weights) and IQ4_XS (8 x 32, scales of 6 bits): codes of a table that is denser near zero. Sixteen
// candidate scales side by side, as in search.h; the error of a fit is S(x x) - scale S(x v).
#pragma once
#include "kquants.h"
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

// The best least-squares scale of the candidates' codes; `error` is what it leaves less S(x x).
inline Fit fit_values(const float* x, const float* w, const Lanes& inverse) {
    Lanes vv{}, xv{};
    for (int i = 0; i < kBlock; ++i) {
        const Lanes v = nearest_value(inverse * x[i]);
        const Lanes wv = v * w[i];
        vv += wv * v;
        xv += wv * x[i];
    }
    const Lanes scale = xv * inverse_or_zero(vv);
    Fit fit;
    const int c = best_lane(-(scale * xv), &fit.error);
    fit.scale = lane(scale, c);
    fit.offset = 0.0f;
    return fit;
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
// Relative steps around a fit.
const float kNearIq4[kLanes] = {0.0f,   -0.008f, 0.008f, -0.016f, 0.016f, -0.024f, 0.024f, -0.033f,
                                0.033f, -0.043f, 0.043f, -0.054f, 0.054f, -0.068f, 0.068f, 0.085f};

// The real scale of 32 weights; 0 where an fp16 scale holds none of them.
inline float fit_iq4(const float* x, const float* w) {
    const float extreme = range_of(x, kBlock).extreme();
    if (!(extreme < -kTiny || extreme > kTiny)) return 0.0f;
    const Lanes reach = load(kReachIq4) * (static_cast<float>(kIq4Values[0]) / extreme);
    const Fit down = fit_values(x, w, reach), up = fit_values(x, w, -reach);
    const Fit first = up.error < down.error ? up : down;
    const Fit again = fit_values(x, w, inverse_or_zero(first.scale + first.scale * load(kNearIq4)));
    return again.error < first.error ? again.scale : first.scale;
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
    block->d = to_f16(fit_iq4(x, w));
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
        const Lanes nearest = clamp_round(splat(fits[j] * inverse_d), -32.0f, 31.0f);
        const Lanes scales = clamp_round(nearest + load(kStepScaleIq4), -32.0f, 31.0f);
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
    return from_f16(to_f16(sum(ax) * inverse_or_zero(sum(aa))));
}

inline void encode_block(const float* x, const float* w, BlockIQ4_XS* block) {
    float fits[kRunsIq4], scale[kRunsIq4], again[kRunsIq4];
    float widest = 0.0f;
    for (int j = 0; j < kRunsIq4; ++j) {
        fits[j] = fit_iq4(x + kBlock * j, w + kBlock * j);
        if (fits[j] * fits[j] > widest * widest) widest = fits[j];
    }
    // The widest run gets -32, the longer side.
    float d = from_f16(to_f16(widest / -32.0f));
    float error = choose_scales_iq4(x, w, fits, d, scale);
    for (int r = 0; r < 2; ++r) {
        const float next = refit_iq4(x, w, d, scale);
        const float left = choose_scales_iq4(x, w, fits, next, again);
        if (!(left < error)) break;
        error = left;
        d = next;
        memcpy(scale, again, sizeof(scale));
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
