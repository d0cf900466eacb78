// pack_bits and unpack_bits: plain loops over 64-bit words that the compiler vectorises for the tier whose
// file includes this. Layouts: README.md beside this file.
#pragma once
#include "qkern/bitstream.h"
#include "qkern/kernels.h"

namespace {

using namespace qk;

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileCodes = 512;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether a code has bits that its width cannot hold.
inline bool out_of_range(const uint8_t* codes, int64_t count, int bits) {
    uint8_t all = 0;
    for (int64_t i = 0; i < count; ++i) all |= codes[i];
    return all >> bits != 0;
}

// floor(32 / B) codes to a word, least significant first.
template <int B>
inline void pack_words(const uint8_t* codes, int64_t count, uint32_t* words) {
    constexpr int64_t per = 32 / B;
    for (int64_t w = 0; w * per < count; ++w) {
        const int64_t n = least(per, count - w * per);
        uint32_t word = 0;
        for (int64_t i = 0; i < n; ++i) word |= static_cast<uint32_t>(codes[w * per + i]) << (B * i);
        words[w] = word;
    }
}

template <int B>
inline void unpack_words(const uint32_t* words, int64_t count, uint8_t* codes) {
    constexpr int64_t per = 32 / B;
    for (int64_t w = 0; w * per < count; ++w) {
        const int64_t n = least(per, count - w * per);
        for (int64_t i = 0; i < n; ++i) codes[w * per + i] = static_cast<uint8_t>(words[w] >> (B * i) & ((1u << B) - 1));
    }
}

// Rows of codes to the transposed stream [words][N], through tiles of dense words.
template <int B>
inline void pack_transposed(const BitsArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t tile_words = kTileCodes * B / 32;
    uint32_t tile[kTileRows][tile_words];
    for (int64_t n = begin; n < end; n += kTileRows) {
        const int64_t rows = least(kTileRows, end - n);
        for (int64_t k = 0; k < args.K; k += kTileCodes) {
            const int64_t count = least(kTileCodes, args.K - k), words = (count * B + 31) / 32;
            for (int64_t r = 0; r < rows; ++r) pack_stream<B>(args.codes + (n + r) * args.codes_stride + k, count, tile[r]);
            for (int64_t w = 0; w < words; ++w) {
                uint32_t* out = args.packed + (k * B / 32 + w) * args.N + n;
                for (int64_t r = 0; r < rows; ++r) out[r] = tile[r][w];
            }
        }
    }
}

template <int B>
inline void unpack_transposed(const BitsArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t tile_words = kTileCodes * B / 32;
    uint32_t tile[kTileRows][tile_words];
    for (int64_t n = begin; n < end; n += kTileRows) {
        const int64_t rows = least(kTileRows, end - n);
        for (int64_t k = 0; k < args.K; k += kTileCodes) {
            const int64_t count = least(kTileCodes, args.K - k), words = (count * B + 31) / 32;
            for (int64_t w = 0; w < words; ++w) {
                const uint32_t* in = args.packed + (k * B / 32 + w) * args.N + n;
                for (int64_t r = 0; r < rows; ++r) tile[r][w] = in[r];
            }
            for (int64_t r = 0; r < rows; ++r) unpack_stream<B>(tile[r], count, args.codes + (n + r) * args.codes_stride + k);
        }
    }
}

// Nibble i of an AWQ word holds row kAwqOrder[i] of the eight.
constexpr int kAwqOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int64_t kAwqColumns = 64, kAwqWords = 16;  // a tile writes whole cache lines

inline void pack_awq(const BitsArgs& args, int64_t begin, int64_t end) {
    const int64_t words_per_row = args.N / 8;
    uint32_t tile[kAwqWords][kAwqColumns];
    for (int64_t n = begin; n < end; n += 8 * kAwqWords) {
        const int64_t words = least(8 * kAwqWords, end - n) / 8;
        for (int64_t k = 0; k < args.K; k += kAwqColumns) {
            const int64_t columns = least(kAwqColumns, args.K - k);
            for (int64_t c = 0; c < words; ++c) {
                const uint8_t* rows[8];
                for (int i = 0; i < 8; ++i) rows[i] = args.codes + (n + 8 * c + kAwqOrder[i]) * args.codes_stride + k;
                for (int64_t j = 0; j < columns; ++j) {
                    uint32_t word = 0;
                    for (int i = 0; i < 8; ++i) word |= static_cast<uint32_t>(rows[i][j]) << (4 * i);
                    tile[c][j] = word;
                }
            }
            for (int64_t j = 0; j < columns; ++j) {
                uint32_t* out = args.packed + (k + j) * words_per_row + n / 8;
                for (int64_t c = 0; c < words; ++c) out[c] = tile[c][j];
            }
        }
    }
}

inline void unpack_awq(const BitsArgs& args, int64_t begin, int64_t end) {
    const int64_t words_per_row = args.N / 8;
    uint32_t tile[kAwqWords][kAwqColumns];
    for (int64_t n = begin; n < end; n += 8 * kAwqWords) {
        const int64_t words = least(8 * kAwqWords, end - n) / 8;
        for (int64_t k = 0; k < args.K; k += kAwqColumns) {
            const int64_t columns = least(kAwqColumns, args.K - k);
            for (int64_t j = 0; j < columns; ++j) {
                const uint32_t* in = args.packed + (k + j) * words_per_row + n / 8;
                for (int64_t c = 0; c < words; ++c) tile[c][j] = in[c];
            }
            for (int64_t c = 0; c < words; ++c) {
                for (int i = 0; i < 8; ++i) {
                    uint8_t* codes = args.codes + (n + 8 * c + kAwqOrder[i]) * args.codes_stride + k;
                    for (int64_t j = 0; j < columns; ++j) codes[j] = static_cast<uint8_t>(tile[c][j] >> (4 * i) & 15u);
                }
            }
        }
    }
}

template <int B>
void pack_rows(const BitsArgs& args, int64_t begin, int64_t end) {
    if (args.layout == BitLayout::gptq) return pack_transposed<B>(args, begin, end);
    constexpr int64_t per = 32 / B;
    const bool dense = args.layout == BitLayout::dense || 32 % B == 0;  // then both are the same words
    const int64_t words = dense ? (args.K * B + 31) / 32 : (args.K + per - 1) / per;
    for (int64_t n = begin; n < end; ++n) {
        const uint8_t* codes = args.codes + n * args.codes_stride;
        uint32_t* out = args.packed + n * words;
        dense ? pack_stream<B>(codes, args.K, out) : pack_words<B>(codes, args.K, out);
    }
}

template <int B>
void unpack_rows(const BitsArgs& args, int64_t begin, int64_t end) {
    if (args.layout == BitLayout::gptq) return unpack_transposed<B>(args, begin, end);
    constexpr int64_t per = 32 / B;
    const bool dense = args.layout == BitLayout::dense || 32 % B == 0;  // then both are the same words
    const int64_t words = dense ? (args.K * B + 31) / 32 : (args.K + per - 1) / per;
    for (int64_t n = begin; n < end; ++n) {
        uint8_t* codes = args.codes + n * args.codes_stride;
        const uint32_t* in = args.packed + n * words;
        dense ? unpack_stream<B>(in, args.K, codes) : unpack_words<B>(in, args.K, codes);
    }
}

Status pack(const BitsArgs& args, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
        if (out_of_range(args.codes + n * args.codes_stride, args.K, args.bits)) return Status::code_range;
    }
    if (args.layout == BitLayout::awq) {
        pack_awq(args, begin, end);
        return Status::ok;
    }
    switch (args.bits) {
        case 2: pack_rows<2>(args, begin, end); break;
        case 3: pack_rows<3>(args, begin, end); break;
        case 4: pack_rows<4>(args, begin, end); break;
        default: pack_rows<8>(args, begin, end); break;
    }
    return Status::ok;
}

void unpack(const BitsArgs& args, int64_t begin, int64_t end) {
    if (args.layout == BitLayout::awq) return unpack_awq(args, begin, end);
    switch (args.bits) {
        case 2: return unpack_rows<2>(args, begin, end);
        case 3: return unpack_rows<3>(args, begin, end);
        case 4: return unpack_rows<4>(args, begin, end);
        default: return unpack_rows<8>(args, begin, end);
    }
}

}  // namespace
