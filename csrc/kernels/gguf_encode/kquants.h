// The 256-weight super-blocks: Q4_K and Q5_K (8 x 32, scales and minima of 6 bits), Q6_K (16 x 16, scales of
// 8 bits). Each search has the same three steps: fit every sub-block alone; take the super-block's fp16
// scale from the fits; then choose every sub-block's integers by true errors against the stored scale.
#pragma once
#include "qkern/gguf_blocks.h"
#include "search.h"

namespace {

using namespace qk;

constexpr int kSuper = 256;

// Steps of the integer scale and minimum around their fitted values; the value itself first, so that it
// wins ties.
const float kStepScale[kLanes] = {0, 0, 0, 1, 1, 1, -1, -1, -1, 2, 2, -2, -2, 0, 1, -1};
const float kStepMinimum[kLanes] = {0, 1, -1, 0, 1, -1, 0, 1, -1, 0, 1, 0, -1, 2, 2, -2};
const float kStepScale6[kLanes] = {0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8};
const float kReach6[kLanes] = {0.955f, 0.964f, 0.972f, 0.978f, 0.984f, 0.989f, 0.993f, 0.997f,
                               1.000f, 1.004f, 1.008f, 1.012f, 1.016f, 1.021f, 1.027f, 1.035f};

// Q4_K, Q5_K --------------------------------------------------------------------------------------------

constexpr int kSub = 32;
constexpr int kSubs = kSuper / kSub;
constexpr float kTop6 = 63.0f;

// What a super-block stores, the integers as floats, and the error it leaves.
struct Grid {
    uint16_t d, dmin;
    float scale[kSubs], minimum[kSubs];
    float error;
};

// Chooses scale[j] and minimum[j] near the fitted real values, by the true errors of sixteen pairs.
inline void choose_pairs(const float* x, const float* w, float top, const Fit* fits, uint16_t d16, uint16_t dmin16,
                         Grid* grid) {
    const float d = from_f16(d16), dmin = from_f16(dmin16);
    const float inverse_d = inverse_or_zero(d), inverse_dmin = inverse_or_zero(dmin);
    grid->d = d16;
    grid->dmin = dmin16;
    grid->error = 0.0f;
    for (int j = 0; j < kSubs; ++j) {
        Lanes scales = round(splat(fits[j].scale * inverse_d)) + load(kStepScale);
        Lanes minima = round(splat(fits[j].offset * -inverse_dmin)) + load(kStepMinimum);
        scales = clamp_round(scales, 0.0f, kTop6);
        minima = clamp_round(minima, 0.0f, kTop6);
        float error;
        const int c = best_lane(
            true_error(x + j * kSub, w + j * kSub, kSub, scales * d, -(minima * dmin), 0.0f, top), &error);
        grid->scale[j] = lane(scales, c);
        grid->minimum[j] = lane(minima, c);
        grid->error += error;
    }
}

inline void codes_of(const float* x, float top, const Grid& grid, int32_t* codes) {
    const float d = from_f16(grid.d), dmin = from_f16(grid.dmin);
    for (int j = 0; j < kSubs; ++j) {
        choose_codes(x + j * kSub, kSub, inverse_or_zero(d * grid.scale[j]), dmin * grid.minimum[j], 0.0f, top,
                     codes + j * kSub);
    }
}

// The d and dmin that fit the chosen integers best, all sub-blocks together; false if they do not exist.
inline bool refit(const float* x, const float* w, const Grid& grid, const int32_t* codes, uint16_t* d,
                  uint16_t* dmin) {
    Lanes aa{}, ab{}, bb{}, ax{}, bx{};
    for (int i = 0; i < kSuper; i += kLanes) {
        const Lanes a = load(codes + i) * grid.scale[i / kSub];
        const Lanes b = splat(-grid.minimum[i / kSub]);
        const Lanes v = load(x + i), weight = load(w + i);
        aa += (a * a) * weight;
        ab += (a * b) * weight;
        bb += (b * b) * weight;
        ax += (a * v) * weight;
        bx += (b * v) * weight;
    }
    const float saa = sum(aa), sab = sum(ab), sbb = sum(bb), sax = sum(ax), sbx = sum(bx);
    const float determinant = saa * sbb - sab * sab;
    float new_d, new_dmin = 0.0f;
    if (determinant > 0.0f) {
        new_d = (sax * sbb - sbx * sab) / determinant;
        new_dmin = (sbx * saa - sax * sab) / determinant;
    } else if (saa > 0.0f) {
        new_d = sax / saa;
    } else {
        return false;
    }
    if (!(new_d > 0.0f && new_dmin >= 0.0f && new_d < 65504.0f && new_dmin < 65504.0f)) return false;
    *d = to_f16(new_d);
    *dmin = to_f16(new_dmin);
    return true;
}

inline void affine_super_block(const float* x, const float* w, int levels, Grid* grid, int32_t* codes) {
    const float top = static_cast<float>(levels);
    Fit fits[kSubs];
    float largest = 0.0f, deepest = 0.0f;
    for (int j = 0; j < kSubs; ++j) {
        const float* sub = x + j * kSub;
        Range range = range_of(sub, kSub);
        range.low = range.low < 0.0f ? range.low : 0.0f;
        const float span = range.high - range.low;
        fits[j] = Fit{0.0f, 0.0f, range.low};
        if (span > kTiny) {
            const float step = span / top;
            float sum_w = 0.0f;
            for (int i = 0; i < kSub; ++i) sum_w += w[j * kSub + i];
            // No candidate starts above zero: a minimum is subtracted and at least 0.
            Lanes low = range.low + load(kInsetLow) * step;
            low = select_less(Lanes{}, low, Lanes{}, low);
            const Lanes inverse = top / ((range.high - load(kInsetHigh) * step) - low);
            const Fit fit = fit_affine(sub, w + j * kSub, kSub, sum_w, inverse, low, top, true);
            if (fit.error < kNoFit) {
                fits[j] = refine_affine(sub, w + j * kSub, kSub, sum_w, fit, top, true);
            } else {
                fits[j].scale = step;
            }
        }
        largest = fits[j].scale > largest ? fits[j].scale : largest;
        deepest = -fits[j].offset > deepest ? -fits[j].offset : deepest;
    }
    choose_pairs(x, w, top, fits, to_f16(largest / kTop6), to_f16(deepest / kTop6), grid);
    codes_of(x, top, *grid, codes);
    uint16_t d, dmin;
    if (refit(x, w, *grid, codes, &d, &dmin)) {
        Grid again;
        choose_pairs(x, w, top, fits, d, dmin, &again);
        if (again.error < grid->error) {
            *grid = again;
            codes_of(x, top, *grid, codes);
        }
    }
}

inline void pack_scales(const Grid& grid, uint8_t* scales) {
    for (int j = 0; j < 4; ++j) {
        const int low_scale = static_cast<int>(grid.scale[j]), high_scale = static_cast<int>(grid.scale[j + 4]);
        const int low_min = static_cast<int>(grid.minimum[j]), high_min = static_cast<int>(grid.minimum[j + 4]);
        scales[j] = static_cast<uint8_t>(low_scale | (high_scale >> 4) << 6);
        scales[j + 4] = static_cast<uint8_t>(low_min | (high_min >> 4) << 6);
        scales[j + 8] = static_cast<uint8_t>((high_scale & 15) | (high_min & 15) << 4);
    }
}

// Byte 32 p + i: sub-block 2 p in the low nibble, 2 p + 1 in the high one.
inline void pack_pairs(const int32_t* codes, uint8_t* qs) {
    for (int p = 0; p < kSubs / 2; ++p) {
        for (int i = 0; i < kSub; ++i) {
            qs[kSub * p + i] =
                static_cast<uint8_t>((codes[2 * kSub * p + i] & 15) | (codes[2 * kSub * p + kSub + i] & 15) << 4);
        }
    }
}

inline void encode_block(const float* x, const float* w, BlockQ4_K* block) {
    Grid grid;
    int32_t codes[kSuper];
    affine_super_block(x, w, 15, &grid, codes);
    block->d = grid.d;
    block->dmin = grid.dmin;
    pack_scales(grid, block->scales);
    pack_pairs(codes, block->qs);
}

inline void encode_block(const float* x, const float* w, BlockQ5_K* block) {
    Grid grid;
    int32_t codes[kSuper];
    affine_super_block(x, w, 31, &grid, codes);
    block->d = grid.d;
    block->dmin = grid.dmin;
    pack_scales(grid, block->scales);
    pack_pairs(codes, block->qs);
    for (int i = 0; i < kSub; ++i) {
        int bits = 0;
        for (int j = 0; j < kSubs; ++j) bits |= (codes[kSub * j + i] >> 4) << j;
        block->qh[i] = static_cast<uint8_t>(bits);
    }
}

// Q6_K --------------------------------------------------------------------------------------------------

constexpr int kSub6 = 16;
constexpr int kSubs6 = kSuper / kSub6;
constexpr float kLow6 = -32.0f, kHigh6 = 31.0f;

// Chooses the integer scale of each sub-block near the fitted one; returns the error.
inline float choose_scales(const float* x, const float* w, const Fit* fits, uint16_t d16, float* scale) {
    const float d = from_f16(d16), inverse_d = inverse_or_zero(d);
    float total = 0.0f;
    for (int j = 0; j < kSubs6; ++j) {
        Lanes scales = round(splat(fits[j].scale * inverse_d)) + load(kStepScale6);
        scales = clamp_round(scales, -128.0f, 127.0f);
        float error;
        const int c = best_lane(
            true_error(x + j * kSub6, w + j * kSub6, kSub6, scales * d, Lanes{}, kLow6, kHigh6), &error);
        scale[j] = lane(scales, c);
        total += error;
    }
    return total;
}

inline void codes_of(const float* x, uint16_t d16, const float* scale, int32_t* codes) {
    const float d = from_f16(d16);
    for (int j = 0; j < kSubs6; ++j) {
        choose_codes(x + j * kSub6, kSub6, inverse_or_zero(d * scale[j]), 0.0f, kLow6, kHigh6, codes + j * kSub6);
    }
}

inline uint16_t refit(const float* x, const float* w, const float* scale, const int32_t* codes) {
    Lanes aa{}, ax{};
    for (int i = 0; i < kSuper; i += kLanes) {
        const Lanes a = load(codes + i) * scale[i / kSub6];
        const Lanes weighted = a * load(w + i);
        aa += weighted * a;
        ax += weighted * load(x + i);
    }
    return to_f16(sum(ax) * inverse_or_zero(sum(aa)));
}

inline void encode_block(const float* x, const float* w, BlockQ6_K* block) {
    Fit fits[kSubs6];
    float widest = 0.0f;
    for (int j = 0; j < kSubs6; ++j) {
        const float* sub = x + j * kSub6;
        const float extreme = range_of(sub, kSub6).extreme();
        fits[j] = Fit{0.0f, 0.0f, 0.0f};
        if (extreme < -kTiny || extreme > kTiny) {
            fits[j] = fit_scale(sub, w + j * kSub6, kSub6, load(kReach6) * (kLow6 / extreme), kLow6, kHigh6);
        }
        const float size = fits[j].scale < 0.0f ? -fits[j].scale : fits[j].scale;
        if (size > (widest < 0.0f ? -widest : widest)) widest = fits[j].scale;
    }
    float scale[kSubs6], again[kSubs6];
    int32_t codes[kSuper];
    // The widest sub-block gets the code -128, the longer side.
    block->d = to_f16(widest / -128.0f);
    const float error = choose_scales(x, w, fits, block->d, scale);
    codes_of(x, block->d, scale, codes);
    const uint16_t d = refit(x, w, scale, codes);
    if (choose_scales(x, w, fits, d, again) < error) {
        block->d = d;
        memcpy(scale, again, sizeof(scale));
        codes_of(x, block->d, scale, codes);
    }
    for (int j = 0; j < kSubs6; ++j) block->scales[j] = static_cast<int8_t>(scale[j]);
    for (int i = 0; i < kSuper; ++i) codes[i] += 32;
    for (int half = 0; half < 2; ++half) {
        const int32_t* q = codes + 128 * half;
        for (int i = 0; i < 64; ++i) {
            block->ql[64 * half + i] = static_cast<uint8_t>((q[i] & 15) | (q[64 + i] & 15) << 4);
        }
        for (int i = 0; i < 32; ++i) {
            block->qh[32 * half + i] = static_cast<uint8_t>(q[i] >> 4 | q[32 + i] >> 4 << 2 | q[64 + i] >> 4 << 4 |
                                                            q[96 + i] >> 4 << 6);
        }
    }
}

}  // namespace
