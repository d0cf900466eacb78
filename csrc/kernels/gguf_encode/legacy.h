// The 32-weight blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
#pragma once
#include "qkern/gguf_blocks.h"
#include "search.h"

namespace {

using namespace qk;

constexpr int kBlock = 32;

inline void pack_nibbles(const int32_t* codes, uint8_t* qs) {
    for (int i = 0; i < kBlock / 2; ++i) {
        qs[i] = static_cast<uint8_t>((codes[i] & 15) | (codes[i + kBlock / 2] & 15) << 4);
    }
}

inline void pack_fifth_bits(const int32_t* codes, uint8_t* qh) {
    uint32_t bits = 0;
    for (int i = 0; i < kBlock; ++i) bits |= static_cast<uint32_t>(codes[i] >> 4 & 1) << i;
    memcpy(qh, &bits, 4);
}

// Code units that the value of largest magnitude is mapped to, relative to -half (the longer side): a little
// clipping pays. Chosen by the error on Gaussian, heavy-tailed and trained blocks.
const float kReach[kLanes] = {0.80f, 0.84f, 0.87f, 0.90f, 0.925f, 0.945f, 0.96f, 0.975f,
                              0.99f, 1.00f, 1.01f, 1.025f, 1.04f, 1.06f, 1.08f, 1.11f};
// Steps around the fitted scale, in the last pass over true errors.
const float kNear[kLanes] = {0.0f,    -0.005f, 0.005f, -0.010f, 0.010f, -0.016f, 0.016f, -0.022f,
                             0.022f, -0.029f, 0.029f, -0.037f, 0.037f, -0.046f, 0.046f, 0.056f};

// w = d * (q - half), 0 <= q < 2 * half.
inline void symmetric_block(const float* x, const float* w, int half, uint16_t* d, int32_t* codes) {
    const float low = static_cast<float>(-half), high = static_cast<float>(half - 1);
    const float extreme = range_of(x, kBlock).extreme();
    float scale = 0.0f;
    if (extreme < -kTiny || extreme > kTiny) {
        const Lanes reach = load(kReach) * (low / extreme);
        const Fit down = fit_scale(x, w, kBlock, reach, low, high);
        const Fit up = fit_scale(x, w, kBlock, -reach, low, high);
        const float fitted = up.error < down.error ? up.scale : down.scale;
        const Lanes near = fitted + fitted * load(kNear);
        float error;
        scale = lane(near, best_lane(true_error(x, w, kBlock, near, Lanes{}, low, high), &error));
    }
    *d = to_f16(scale);
    choose_codes(x, kBlock, inverse_or_zero(from_f16(*d)), 0.0f, low, high, codes);
    for (int i = 0; i < kBlock; ++i) codes[i] += half;
}

// w = d * q + m, 0 <= q <= top.
inline void affine_block(const float* x, const float* w, int top, uint16_t* d, uint16_t* m, int32_t* codes) {
    const float high = static_cast<float>(top);
    const Range range = range_of(x, kBlock);
    const float span = range.high - range.low;
    float scale = 0.0f, offset = range.low;
    if (span > kTiny) {
        const float step = span / high;
        float sum_w = 0.0f;
        for (int i = 0; i < kBlock; ++i) sum_w += w[i];
        const Lanes low = range.low + load(kInsetLow) * step;
        const Lanes inverse = high / (span - (load(kInsetLow) + load(kInsetHigh)) * step);
        const Fit coarse = fit_affine(x, w, kBlock, sum_w, inverse, low, high, false);
        const Fit fit = refine_affine(x, w, kBlock, sum_w, coarse, high, false);
        scale = fit.scale;
        offset = fit.offset;
    }
    // A fit may start below the range, where fp16 ends before the weights do.
    offset = offset < -65504.0f ? -65504.0f : offset > 65504.0f ? 65504.0f : offset;
    *d = to_f16(scale);
    *m = to_f16(offset);
    choose_codes(x, kBlock, inverse_or_zero(from_f16(*d)), -from_f16(*m), 0.0f, high, codes);
}

inline void encode_block(const float* x, const float* w, BlockQ4_0* block) {
    int32_t codes[kBlock];
    symmetric_block(x, w, 8, &block->d, codes);
    pack_nibbles(codes, block->qs);
}

inline void encode_block(const float* x, const float* w, BlockQ4_1* block) {
    int32_t codes[kBlock];
    affine_block(x, w, 15, &block->d, &block->m, codes);
    pack_nibbles(codes, block->qs);
}

inline void encode_block(const float* x, const float* w, BlockQ5_0* block) {
    int32_t codes[kBlock];
    symmetric_block(x, w, 16, &block->d, codes);
    pack_nibbles(codes, block->qs);
    pack_fifth_bits(codes, block->qh);
}

inline void encode_block(const float* x, const float* w, BlockQ5_1* block) {
    int32_t codes[kBlock];
    affine_block(x, w, 31, &block->d, &block->m, codes);
    pack_nibbles(codes, block->qs);
    pack_fifth_bits(codes, block->qh);
}

// The largest magnitude is code 127 or -127; eight bits leave nothing to search for.
inline void encode_block(const float* x, const float*, BlockQ8_0* block) {
    int32_t codes[kBlock];
    const float extreme = range_of(x, kBlock).extreme();
    block->d = to_f16((extreme < 0.0f ? -extreme : extreme) / 127.0f);
    choose_codes(x, kBlock, inverse_or_zero(from_f16(block->d)), 0.0f, -127.0f, 127.0f, codes);
    for (int i = 0; i < kBlock; ++i) block->qs[i] = static_cast<int8_t>(codes[i]);
}

}  // namespace
