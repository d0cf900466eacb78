// The kinds of code bytes that compute int8 multiplies, and a codebook as two planes of bytes,
// round(32767 * table) = 256 * high + low - 32768, which keeps the table's error below 2^-16 of its largest entry.
#pragma once
#include "panels.h"

namespace {

// What the bytes of a block hold: packed codes, or one code a byte as `expand` writes them. A codebook's codes
// are looked up in two tables; expanded, the plane of low bytes follows that of high ones.
enum class Codes { bits2, bits3, bits4, bits8, codebook, narrow, wide, planes };

constexpr int stored_bits(Codes kind) {
    return kind == Codes::bits2 ? 2 : kind == Codes::bits3 ? 3 : kind == Codes::bits4 || kind == Codes::codebook ? 4 : 8;
}

constexpr int runs(Codes kind) { return stored_bits(kind) == 3 ? 8 : 8 / stored_bits(kind); }

constexpr bool is_expanded(Codes kind) { return kind == Codes::narrow || kind == Codes::wide || kind == Codes::planes; }

constexpr int planes(Codes kind) { return kind == Codes::codebook || kind == Codes::planes ? 2 : 1; }

// 8 significant bits a code: the product needs the wide form.
constexpr bool is_wide(Codes kind) { return kind == Codes::bits8 || kind == Codes::wide || planes(kind) == 2; }

constexpr Codes expanded(Codes kind) {
    return planes(kind) == 2 ? Codes::planes : is_wide(kind) ? Codes::wide : Codes::narrow;
}

struct Planes {
    uint8_t bytes[2][16];  // high, low
};

inline Planes planes_of(const float* table) {
    Planes planes;
    for (int i = 0; i < 16; ++i) {
        const float scaled = table[i] * 32767.0f;
        const int32_t value = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f)) + 32768;
        planes.bytes[0][i] = static_cast<uint8_t>(value >> 8);
        planes.bytes[1][i] = static_cast<uint8_t>(value);
    }
    return planes;
}

}  // namespace
