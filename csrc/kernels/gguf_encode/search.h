// Searches for the scale (and offset) of a block: sixteen candidates side by side, one weight after another.
//
// A candidate fixes the codes l; the best scale for these codes is a weighted least-squares fit. With u the
// weight in code units and r = u - l the rounding residual, the fit moves the scale by g = sum(w r l) /
// sum(w l l), and leaves the error sum(w r r) - g sum(w r l): all terms are small, so nothing cancels in fp32
// as it would in sum(w x x) - ....
#pragma once
#include "lanes.h"

namespace {

constexpr float kNoFit = 3.0e38f;

struct Fit {
    float error;
    float scale;
    float offset;
};

// x ~ scale * l with low <= l <= high. `inverse` holds the candidates' code units per unit of weight.
inline Fit fit_scale(const float* x, const float* w, int n, const Lanes& inverse, float low, float high) {
    Lanes rr{}, rl{}, ll{};
    for (int i = 0; i < n; ++i) {
        const Lanes u = inverse * x[i];
        const Lanes l = clamp_round(u, low, high);
        const Lanes r = u - l;
        const Lanes wr = r * w[i];
        rr += wr * r;
        rl += wr * l;
        ll += (l * w[i]) * l;
    }
    const Lanes gain = rl * inverse_or_zero(ll);
    const Lanes unit = inverse_or_zero(inverse);
    const Lanes error = ((rr - gain * rl) * unit) * unit;
    Fit fit;
    const int c = best_lane(error, &fit.error);
    fit.scale = (1.0f + lane(gain, c)) * lane(unit, c);
    fit.offset = 0.0f;
    return fit;
}

// Steps by which the affine candidates' ends lie inside the range of the block.
const float kInsetLow[kLanes] = {0.0f, 0.4f, 0.4f, 0.0f, -0.3f, 0.8f, 0.0f, 0.8f,
                                 0.4f, 0.8f, 1.3f, 0.0f, 1.3f, 0.4f, -0.3f, 0.2f};
const float kInsetHigh[kLanes] = {0.0f, 0.4f, 0.0f, 0.4f, -0.3f, 0.0f, 0.8f, 0.4f,
                                  0.8f, 0.8f, 0.0f, 1.3f, 0.4f, 1.3f, 0.2f, -0.3f};

// x ~ scale * l + offset with 0 <= l <= top; the candidates map `low` to 0. With `no_offset_above_zero` fits
// with a positive offset are out (K-quants subtract a minimum that is at least 0).
inline Fit fit_affine(const float* x, const float* w, int n, float sum_w, const Lanes& inverse, const Lanes& low,
                      float top, bool no_offset_above_zero) {
    const Lanes shift = low * inverse;
    Lanes rr{}, rl{}, ll{}, r1{}, l1{};
    for (int i = 0; i < n; ++i) {
        const Lanes u = inverse * x[i] - shift;
        const Lanes l = clamp_round(u, 0.0f, top);
        const Lanes r = u - l;
        const Lanes wr = r * w[i];
        const Lanes wl = l * w[i];
        rr += wr * r;
        rl += wr * l;
        r1 += wr;
        ll += wl * l;
        l1 += wl;
    }
    // Where all codes are alike the determinant is rounding noise, and only the offset can move.
    const Lanes squares = sum_w * ll, difference = squares - l1 * l1;
    const Lanes determinant = select_less(difference, 1e-5f * squares, Lanes{}, difference);
    const Lanes gain = (sum_w * rl - l1 * r1) * inverse_or_zero(determinant);
    const Lanes move = (r1 - gain * l1) / sum_w;
    const Lanes unit = inverse_or_zero(inverse);
    Lanes error = ((rr - gain * rl - move * r1) * unit) * unit;
    const Lanes offset = (move + shift) * unit;
    if (no_offset_above_zero) error = select_less(Lanes{}, offset, splat(kNoFit), error);
    Fit fit;
    const int c = best_lane(error, &fit.error);
    fit.scale = (1.0f + lane(gain, c)) * lane(unit, c);
    fit.offset = lane(offset, c);
    return fit;
}

// Candidates around a fit: relative steps of the scale, and steps of the offset in units of the scale. The
// first is the fit itself, whose codes need not be the ones it was made from.
const float kFitScale[kLanes] = {0.0f, -0.06f, -0.03f, 0.03f, 0.06f,  -0.015f, 0.015f, 0.0f,
                                 0.0f, -0.03f, 0.03f,  0.03f, -0.03f, 0.0f,    0.0f,   0.10f};
const float kFitOffset[kLanes] = {0.0f,   0.0f, 0.0f, 0.0f,  0.0f,  0.0f, 0.0f,  0.25f,
                                  -0.25f, 0.2f, 0.2f, -0.2f, -0.2f, 0.5f, -0.5f, 0.0f};

// fit_affine around an earlier fit; never worse than it.
inline Fit refine_affine(const float* x, const float* w, int n, float sum_w, const Fit& fit, float top,
                         bool no_offset_above_zero) {
    if (!(fit.scale > 0.0f)) return fit;
    const Lanes scales = fit.scale + fit.scale * load(kFitScale);
    // The middle of the range stays where it is while the scale changes.
    const Lanes low = (fit.offset + (fit.scale - scales) * (0.5f * top)) + load(kFitOffset) * fit.scale;
    const Fit again = fit_affine(x, w, n, sum_w, 1.0f / scales, low, top, no_offset_above_zero);
    return again.error < fit.error ? again : fit;
}

// The error of each lane's own scale and offset, as stored: no fit.
inline Lanes true_error(const float* x, const float* w, int n, const Lanes& scale, const Lanes& offset, float low,
                        float high) {
    const Lanes inverse = inverse_or_zero(scale);
    Lanes error{};
    for (int i = 0; i < n; ++i) {
        const Lanes shifted = x[i] - offset;
        const Lanes l = clamp_round(shifted * inverse, low, high);
        const Lanes r = shifted - l * scale;
        error += (r * w[i]) * r;
    }
    return error;
}

struct Range {
    float low, high;
    // The value of largest magnitude, with its sign.
    float extreme() const { return -low > high ? low : high; }
};

inline Range range_of(const float* x, int n) {
    Lanes low = load(x), high = low;
    for (int i = kLanes; i < n; i += kLanes) {
        const Lanes v = load(x + i);
        low = select_less(v, low, v, low);
        high = select_less(high, v, v, high);
    }
    Range range{lane(low, 0), lane(high, 0)};
    for (int c = 1; c < kLanes; ++c) {
        range.low = lane(low, c) < range.low ? lane(low, c) : range.low;
        range.high = lane(high, c) > range.high ? lane(high, c) : range.high;
    }
    return range;
}

}  // namespace
