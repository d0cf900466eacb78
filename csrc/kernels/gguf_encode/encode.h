// gguf_encode: rows of fp32 to GGUF blocks. The one source of all tiers; see lanes.h and README.md.
#pragma once
#include "iq4.h"
#include "kquants.h"
#include "kquants_small.h"
#include "legacy.h"
#include "qkern/kernels.h"

namespace {

using namespace qk;

// Largest magnitude below this, as bits: fp16 scales and offsets of any block then stay finite.
constexpr uint32_t kFp16Limit = 0x477fe000u;  // 65504
constexpr uint32_t kInfinity = 0x7f800000u;

inline bool all_below(const float* x, int64_t n, uint32_t limit) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= (bits_of(x[i]) & 0x7fffffffu) >= limit;
    return bad == 0;
}

inline bool all_alike(const float* x, int64_t n) {
    bool alike = true;
    for (int64_t i = 1; i < n; ++i) alike &= x[i] == x[0];
    return alike;
}

// Importance of a block's weights; a run of `group` without any is evenly important, and a little (Tile).
inline void load_weights(const float* importance, int length, int group, float* w) {
    memcpy(w, importance, static_cast<size_t>(length) * sizeof(float));
    for (int begin = 0; begin < length; begin += group) {
        int any = 0;
        for (int i = begin; i < begin + group; ++i) any |= importance[i] > 0.0f;
        if (any) continue;
        float peak = 0.0f;
        for (int i = 0; i < length; ++i) peak = importance[i] > peak ? importance[i] : peak;
        for (int i = begin; i < begin + group; ++i) w[i] = peak > 0.0f ? kEven * peak : 1.0f;
    }
}

template <class Block>
Status encode_rows(const float* x, const float* importance, uint8_t* out, int64_t K, int64_t begin, int64_t end,
                   int length, int group) {
    float w[kSuper];
    for (float& weight : w) weight = 1.0f;
    const int64_t blocks = K / length;
    for (int64_t n = begin; n < end; ++n) {
        if (!all_below(x + n * K, K, kFp16Limit)) return Status::non_finite;
        Block* row = reinterpret_cast<Block*>(out + n * blocks * static_cast<int64_t>(sizeof(Block)));
        for (int64_t b = 0; b < blocks; ++b) {
            if (importance) load_weights(importance + b * length, length, group, w);
            encode_block(x + n * K + b * length, w, row + b);
        }
    }
    return Status::ok;
}

// The same, sixteen blocks at a time.
template <class Block, int length, int group>
Status encode_tiles(const float* x, const float* importance, uint8_t* out, int64_t K, int64_t begin, int64_t end) {
    Tile<length, group> tile;
    const int64_t period = K / length, last = end * period;
    if (importance && all_alike(importance, K)) importance = nullptr;
    if (!all_below(x + begin * K, (end - begin) * K, kFp16Limit)) return Status::non_finite;
    for (int64_t b = begin * period; b < last; b += kLanes) {
        const int count = static_cast<int>(last - b < kLanes ? last - b : kLanes);
        tile.load(x + b * length, importance, b, period, count);
        encode_tile(tile, x + b * length, count, reinterpret_cast<Block*>(out) + b);
    }
    return Status::ok;
}

Status encode_halves(bool bfloat, const float* x, uint8_t* out, int64_t K, int64_t begin, int64_t end) {
    // Below 65520 fp16 rounds to a finite value; bf16 has the range of fp32.
    const uint32_t limit = bfloat ? 0x7f7f8000u : 0x477ff000u;
    for (int64_t n = begin; n < end; ++n) {
        const float* row = x + n * K;
        if (!all_below(row, K, limit)) return Status::non_finite;
        uint16_t* halves = reinterpret_cast<uint16_t*>(out) + n * K;
        for (int64_t k = 0; k < K; ++k) halves[k] = bfloat ? to_bf16(row[k]) : to_f16(row[k]);
    }
    return Status::ok;
}

Status encode(GgufType type, const float* x, const float* importance, uint8_t* out, int64_t K, int64_t begin,
              int64_t end) {
    switch (type) {
        case GgufType::q4_0: return encode_tiles<BlockQ4_0, kBlock, kBlock>(x, importance, out, K, begin, end);
        case GgufType::q4_1: return encode_tiles<BlockQ4_1, kBlock, kBlock>(x, importance, out, K, begin, end);
        case GgufType::q5_0: return encode_tiles<BlockQ5_0, kBlock, kBlock>(x, importance, out, K, begin, end);
        case GgufType::q5_1: return encode_tiles<BlockQ5_1, kBlock, kBlock>(x, importance, out, K, begin, end);
        case GgufType::q8_0: return encode_rows<BlockQ8_0>(x, nullptr, out, K, begin, end, kBlock, kBlock);
        case GgufType::iq4_nl: return encode_rows<BlockIQ4_NL>(x, importance, out, K, begin, end, kBlock, kBlock);
        case GgufType::q2_k: return encode_rows<BlockQ2_K>(x, importance, out, K, begin, end, kSuper, kRun);
        case GgufType::q3_k: return encode_rows<BlockQ3_K>(x, importance, out, K, begin, end, kSuper, kRun);
        case GgufType::q4_k: return encode_tiles<BlockQ4_K, kSuper, kSub>(x, importance, out, K, begin, end);
        case GgufType::q5_k: return encode_tiles<BlockQ5_K, kSuper, kSub>(x, importance, out, K, begin, end);
        case GgufType::q6_k: return encode_tiles<BlockQ6_K, kSuper, kSub6>(x, importance, out, K, begin, end);
        case GgufType::iq4_xs: return encode_rows<BlockIQ4_XS>(x, importance, out, K, begin, end, kSuper, kBlock);
        case GgufType::f16: return encode_halves(false, x, out, K, begin, end);
        case GgufType::bf16: return encode_halves(true, x, out, K, begin, end);
    }
    return Status::ok;
}

}  // namespace
