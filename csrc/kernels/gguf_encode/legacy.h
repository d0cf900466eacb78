// The 32-weight blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
#pragma once
#include "qkern/gguf_blocks.h"
#include "tile.h"

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

inline void pack(const int32_t* codes, BlockQ4_0* block) { pack_nibbles(codes, block->qs); }
inline void pack(const int32_t* codes, BlockQ4_1* block) { pack_nibbles(codes, block->qs); }
inline void pack(const int32_t* codes, BlockQ5_0* block) {
    pack_nibbles(codes, block->qs);
    pack_fifth_bits(codes, block->qh);
}
inline void pack(const int32_t* codes, BlockQ5_1* block) {
    pack_nibbles(codes, block->qs);
    pack_fifth_bits(codes, block->qh);
}

using BlockTile = Tile<kBlock, kBlock>;

// Code units that the value of largest magnitude is mapped to, relative to -half (the longer side), for 16 and
// for 32 codes: chosen as kCoarseEnds. A negative one turns the scale, -half has no partner.
constexpr int kReaches = 32;
constexpr float kReach[2][kReaches] = {
    {1.00f, 1.03f, 1.23f, 0.91f, 2.18f, 1.10f, 0.98f, 1.40f, -1.08f, 0.79f, 1.72f, -1.34f, 0.86f, 2.60f, -1.20f,
     1.06f, 1.16f, 0.64f, -1.52f, 1.30f, -2.34f, 1.51f, -1.03f, 1.01f, 0.95f, -1.41f, 1.87f, 0.89f, 0.77f,
     -1.79f, 2.35f, 0.84f},
    {1.00f, 1.01f, 0.94f, 1.17f, 1.06f, 0.88f, 1.44f, 0.98f, 0.82f, 1.29f, 1.03f, 1.75f, 1.13f, 0.92f, 0.74f,
     -1.09f, 0.64f, -1.03f, 0.96f, 0.99f, 1.21f, 1.35f, 1.09f, 1.92f, 1.51f, 0.86f, 0.80f, 1.05f, -1.15f, 0.90f,
     1.25f, 0.77f}};
// Then scales around the best.
constexpr float kNear[] = {0.0f, -0.008f, 0.008f, -0.016f, 0.016f, 0.0f};

// w = d * (q - half), 0 <= q < 2 * half.
template <class Block>
inline void symmetric_blocks(const BlockTile& tile, int half, const float* x, int count, Block* blocks) {
    const Run run{tile.x, tile.weights(0), kBlock};
    const float low = static_cast<float>(-half), high = static_cast<float>(half - 1);
    const Lanes extreme = extreme_of(run), xx = squares(run);
    const Lanes unit = select_less(splat(kTiny), greater(extreme, -extreme), low / extreme, Lanes{});
    Ray best{splat(kNoFit), Lanes{}, Lanes{}};
    for (const float reach : kReach[half > 8]) {
        keep_better(fit_ray(run, xx, unit * reach, low, high), &best);
    }
    const Lanes deviation = root(xx / weight_of(run)), size = greater(extreme, -extreme);
    for (const Lanes& factor : Narrowing(size * inverse_or_zero(kDeviations * deviation)).factors) {
        keep_better(fit_ray(run, xx, unit * factor, low, high), &best);
    }
    for (const float near : kNear) {
        keep_better(fit_ray(run, xx, code_units(best.scale) * (1.0f + near), low, high), &best);
    }
    // Never worse than the range, rounded.
    const Lanes fitted = unit_f16(best.scale), plain = unit_f16(extreme * (1.0f / low));
    const Lanes d = select_less(stored_error(run, plain, Lanes{}, low, high),
                                stored_error(run, fitted, Lanes{}, low, high), plain, fitted);
    for (int c = 0; c < count; ++c) {
        int32_t codes[kBlock];
        blocks[c].d = to_f16(lane(d, c));
        choose_codes(x + c * kBlock, kBlock, inverse_or_zero(from_f16(blocks[c].d)), 0.0f, low, high, codes);
        for (int i = 0; i < kBlock; ++i) codes[i] += half;
        pack(codes, blocks + c);
    }
}

// Q4_0 of weights that all count alike, in a few passes: the whole search is worth 2 % of the error, at five times the
// time. The first ray is the range, and a least-squares scale serves its codes no worse than the range does.
constexpr int kQuickReaches = 4;

inline void quick_blocks(const BlockTile& tile, int count, BlockQ4_0* blocks) {
    constexpr float kLow = -8.0f, kHigh = 7.0f;
    const Run run{tile.x, nullptr, kBlock};
    const Lanes extreme = extreme_of(run), xx = squares(run);
    const Lanes unit = select_less(splat(kTiny), greater(extreme, -extreme), kLow / extreme, Lanes{});
    Ray best{splat(kNoFit), Lanes{}, Lanes{}};
    for (int k = 0; k < kQuickReaches; ++k) {
        keep_better(fit_ray(run, xx, unit * kReach[0][k], kLow, kHigh), &best);
    }
    const Lanes d = unit_f16(best.scale), inverse = inverse_or_zero(d);
    uint8_t pairs[kBlock / 2][kLanes];
    for (int i = 0; i < kBlock / 2; ++i) {
        const Lanes low = snap(run.x[i] * inverse, kLow, kHigh) - kLow;
        const Lanes high = snap(run.x[i + kBlock / 2] * inverse, kLow, kHigh) - kLow;
        const Lanes pair = low + high * 16.0f;
        float values[kLanes];
        memcpy(values, &pair, sizeof(values));
        for (int c = 0; c < kLanes; ++c) pairs[i][c] = static_cast<uint8_t>(static_cast<int32_t>(values[c]));
    }
    for (int c = 0; c < count; ++c) {
        blocks[c].d = to_f16(lane(d, c));
        for (int i = 0; i < kBlock / 2; ++i) blocks[c].qs[i] = pairs[i][c];
    }
}

// w = d * q + m, 0 <= q <= top.
template <class Block>
inline void affine_blocks(BlockTile& tile, float top, const float* x, int count, Block* blocks) {
    const Centered run = center(tile.x, tile.weights(0), kBlock);
    const Best best = fit_lines(run, top, false, kCoarse, nullptr);
    // A fit may start below the range, where fp16 ends before the weights do.
    const Lanes offset = round_f16(lesser(greater(best.offset, splat(-65504.0f)), splat(65504.0f)));
    // The scale that suits the codes with the offset as it is stored.
    const Lanes scale = unit_f16(best.line.scale - best.line.slope * (offset - best.line.offset));
    // Never worse than the range, rounded.
    const Lanes low = round_f16(run.low + run.mean), step = unit_f16((run.high - run.low) * (1.0f / top));
    const Lanes plain = stored_error(run.run, step, low - run.mean, 0.0f, top);
    const Lanes fitted = stored_error(run.run, scale, offset - run.mean, 0.0f, top);
    const Lanes d = select_less(plain, fitted, step, scale), m = select_less(plain, fitted, low, offset);
    for (int c = 0; c < count; ++c) {
        int32_t codes[kBlock];
        blocks[c].d = to_f16(lane(d, c));
        blocks[c].m = to_f16(lane(m, c));
        choose_codes(x + c * kBlock, kBlock, inverse_or_zero(from_f16(blocks[c].d)), -from_f16(blocks[c].m), 0.0f,
                     top, codes);
        pack(codes, blocks + c);
    }
}

inline void encode_tile(BlockTile& tile, const float* x, int count, BlockQ4_0* blocks) {
    if (tile.even) return quick_blocks(tile, count, blocks);
    symmetric_blocks(tile, 8, x, count, blocks);
}
inline void encode_tile(BlockTile& tile, const float* x, int count, BlockQ5_0* blocks) {
    symmetric_blocks(tile, 16, x, count, blocks);
}
inline void encode_tile(BlockTile& tile, const float* x, int count, BlockQ4_1* blocks) {
    affine_blocks(tile, 15.0f, x, count, blocks);
}
inline void encode_tile(BlockTile& tile, const float* x, int count, BlockQ5_1* blocks) {
    affine_blocks(tile, 31.0f, x, count, blocks);
}

// The largest magnitude is code 127 or -127; eight bits leave nothing to search for.
inline void encode_block(const float* x, const float*, BlockQ8_0* block) {
    int32_t codes[kBlock];
    const float extreme = range_of(x, kBlock).extreme();
    block->d = to_f16(unit_f16((extreme < 0.0f ? -extreme : extreme) / 127.0f));
    choose_codes(x, kBlock, inverse_or_zero(from_f16(block->d)), 0.0f, -127.0f, 127.0f, codes);
    for (int i = 0; i < kBlock; ++i) block->qs[i] = static_cast<int8_t>(codes[i]);
}

}  // namespace
