// pack_bits and unpack_bits: plain loops over 64-bit words that the compiler vectorises for the tier whose
// file includes this. Layouts: README.md beside this file.
#pragma once
#include "qkern/bitstream.h"
#include "qkern/kernels.h"
#include "qkern/unroll.h"
#include "transpose.h"

namespace {

using namespace qk;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether a code has bits that its width cannot hold.
inline bool out_of_range(const uint8_t* codes, int64_t count, int bits) {
    uint8_t all = 0;
    for (int64_t i = 0; i < count; ++i) all |= codes[i];
    return all >> bits != 0;
}

// Ten 3-bit codes to a word are the dense stream cut at every 30 bits instead of 32: 160 codes are 15 dense words
// or 16 of these, and word j begins 2j bits before dense word j.
constexpr int64_t kTensCodes = 160, kTensWords = 16, kTensDense = 15, kTensBatch = 16;
alignas(64) constexpr uint32_t kTensShift[kTensWords] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};

inline void pack_tens(const uint8_t* codes, int64_t count, uint32_t* words) {
    uint32_t dense[1 + kTensBatch * kTensDense + 1] = {};  // with a word before and after
    for (int64_t b = 0; b < count; b += kTensBatch) {
        const int64_t batch = least(kTensBatch, count - b);
        pack_blocks<3>(codes + b * kTensCodes, batch * kTensDense / 3, dense + 1);
        for (int64_t i = 0; i < batch; ++i, words += kTensWords) {
            const uint32_t* from = dense + i * kTensDense;
            QK_ROLLED for (int j = 0; j < kTensWords; ++j) {
                const uint32_t begun = from[j] >> (31 - kTensShift[j]) >> 1;
                words[j] = (from[j + 1] << kTensShift[j] | begun) & 0x3fffffffu;
            }
        }
    }
}

inline void unpack_tens(const uint32_t* words, int64_t count, uint8_t* codes) {
    uint32_t dense[kTensBatch * kTensDense];
    for (int64_t b = 0; b < count; b += kTensBatch) {
        const int64_t batch = least(kTensBatch, count - b);
        for (int64_t i = 0; i < batch; ++i, words += kTensWords) {
            QK_ROLLED for (int j = 0; j < kTensDense; ++j) {
                const uint32_t begun = (words[j] & 0x3fffffffu) >> kTensShift[j];
                dense[i * kTensDense + j] = begun | words[j + 1] << (30 - kTensShift[j]);
            }
        }
        unpack_blocks<3>(dense, batch * kTensDense / 3, codes + b * kTensCodes);
    }
}

inline void pack_words(const uint8_t* codes, int64_t count, uint32_t* words) {
    const int64_t whole = count / kTensCodes, rest = count % kTensCodes;
    pack_tens(codes, whole, words);
    if (rest == 0) return;
    uint8_t last_codes[kTensCodes] = {};
    uint32_t last_words[kTensWords];
    memcpy(last_codes, codes + whole * kTensCodes, static_cast<size_t>(rest));
    pack_tens(last_codes, 1, last_words);
    memcpy(words + whole * kTensWords, last_words, static_cast<size_t>((rest + 9) / 10) * 4);
}

inline void unpack_words(const uint32_t* words, int64_t count, uint8_t* codes) {
    const int64_t whole = count / kTensCodes, rest = count % kTensCodes;
    unpack_tens(words, whole, codes);
    if (rest == 0) return;
    uint8_t last_codes[kTensCodes];
    uint32_t last_words[kTensWords] = {};
    memcpy(last_words, words + whole * kTensWords, static_cast<size_t>((rest + 9) / 10) * 4);
    unpack_tens(last_words, 1, last_codes);
    memcpy(codes + whole * kTensCodes, last_codes, static_cast<size_t>(rest));
}

inline void fetch_row(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// Tiles of the transposed stream [words][N]: dense words of several rows, whose turned blocks are whole lines.
constexpr int64_t kTileRows = 64;
template <int B>
constexpr int64_t tile_codes() {
    return B == 8 ? 256 : 512;
}

template <int B>
inline void pack_transposed(const BitsArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t codes = tile_codes<B>(), stride = codes * B / 32;
    const bool streamed = args.N * args.K * B / 8 >= kStreamedBytes;
    alignas(64) uint32_t tile[kTileRows][stride];
    for (int64_t n = begin; n < end; n += kTileRows) {
        const int64_t rows = least(kTileRows, end - n);
        for (int64_t k = 0; k < args.K; k += codes) {
            const int64_t count = least(codes, args.K - k), words = (count * B + 31) / 32;
            for (int64_t r = 0; r < rows; ++r) {
                const uint8_t* from = args.codes + (n + r) * args.codes_stride + k;
                fetch_row(from + codes, codes);
                pack_stream<B>(from, count, tile[r]);
            }
            transpose(tile[0], stride, rows, words, args.packed + k * B / 32 * args.N + n, args.N, streamed);
        }
    }
}

template <int B>
inline void unpack_transposed(const BitsArgs& args, int64_t begin, int64_t end) {
    constexpr int64_t codes = tile_codes<B>(), stride = codes * B / 32;
    const bool streamed = args.N * args.K >= kStreamedBytes;
    alignas(64) uint32_t tile[kTileRows][stride];
    alignas(64) uint8_t line[codes];
    for (int64_t n = begin; n < end; n += kTileRows) {
        const int64_t rows = least(kTileRows, end - n);
        for (int64_t k = 0; k < args.K; k += codes) {
            const int64_t count = least(codes, args.K - k), words = (count * B + 31) / 32;
            for (int64_t w = 0; w < words; w += kBlock) {
                const uint32_t* from = args.packed + (k * B / 32 + w) * args.N + n;
                for (int64_t i = kBlock; i < 2 * kBlock; ++i) {
                    for (int64_t r = 0; r < kTileRows; r += kBlock) fetch_far(from + i * args.N + r);
                }
                transpose(from, args.N, least(kBlock, words - w), rows, &tile[0][w], stride, false);
            }
            for (int64_t r = 0; r < rows; ++r) {
                if (B != 8) unpack_stream<B>(tile[r], count, line);
                const void* from = B == 8 ? static_cast<const void*>(tile[r]) : line;
                copy_out(args.codes + (n + r) * args.codes_stride + k, from, count, streamed);
            }
        }
    }
}

// Rows of the eight whose nibbles are bytes 0..3 of an AWQ word, lower nibble first.
constexpr int kAwqRows[4][2] = {{0, 2}, {4, 6}, {1, 3}, {5, 7}};
constexpr int64_t kAwqColumns = 128, kAwqWords = 32;  // a tile turns whole cache lines

inline void pack_awq(const BitsArgs& args, int64_t begin, int64_t end) {
    const bool streamed = args.N * args.K / 2 >= kStreamedBytes;
    alignas(64) uint32_t tile[kAwqWords][kAwqColumns];
    alignas(64) uint8_t bytes[4][kAwqColumns];
    for (int64_t n = begin; n < end; n += 8 * kAwqWords) {
        const int64_t words = least(8 * kAwqWords, end - n) / 8;
        for (int64_t k = 0; k < args.K; k += kAwqColumns) {
            const int64_t columns = least(kAwqColumns, args.K - k);
            for (int64_t c = 0; c < words; ++c) {
                const uint8_t* rows = args.codes + (n + 8 * c) * args.codes_stride + k;
                for (int b = 0; b < 4; ++b) {
                    const uint8_t* low = rows + kAwqRows[b][0] * args.codes_stride;
                    const uint8_t* high = rows + kAwqRows[b][1] * args.codes_stride;
                    fetch_row(low + kAwqColumns, kAwqColumns);
                    fetch_row(high + kAwqColumns, kAwqColumns);
                    for (int64_t j = 0; j < columns; ++j) bytes[b][j] = static_cast<uint8_t>(low[j] | high[j] << 4);
                }
                for (int64_t j = 0; j < columns; ++j) {
                    tile[c][j] = bytes[0][j] | static_cast<uint32_t>(bytes[1][j]) << 8 |
                                 static_cast<uint32_t>(bytes[2][j]) << 16 | static_cast<uint32_t>(bytes[3][j]) << 24;
                }
            }
            transpose(tile[0], kAwqColumns, words, columns, args.packed + k * (args.N / 8) + n / 8, args.N / 8, streamed);
        }
    }
}

inline void unpack_awq(const BitsArgs& args, int64_t begin, int64_t end) {
    const bool streamed = args.N * args.K >= kStreamedBytes;
    alignas(64) uint32_t tile[kAwqWords][kAwqColumns];
    alignas(64) uint8_t low[kAwqColumns], high[kAwqColumns];
    for (int64_t n = begin; n < end; n += 8 * kAwqWords) {
        const int64_t words = least(8 * kAwqWords, end - n) / 8;
        for (int64_t k = 0; k < args.K; k += kAwqColumns) {
            const int64_t columns = least(kAwqColumns, args.K - k);
            for (int64_t j = 0; j < columns; j += kBlock) {
                const uint32_t* from = args.packed + (k + j) * (args.N / 8) + n / 8;
                for (int64_t i = kBlock; i < 2 * kBlock; ++i) {
                    for (int64_t c = 0; c < kAwqWords; c += kBlock) fetch_far(from + i * (args.N / 8) + c);
                }
                transpose(from, args.N / 8, least(kBlock, columns - j), words, &tile[0][j], kAwqColumns, false);
            }
            for (int64_t c = 0; c < words; ++c) {
                uint8_t* rows = args.codes + (n + 8 * c) * args.codes_stride + k;
                for (int b = 0; b < 4; ++b) {
                    for (int64_t j = 0; j < columns; ++j) {
                        const uint8_t byte = static_cast<uint8_t>(tile[c][j] >> 8 * b);
                        low[j] = byte & 15;
                        high[j] = byte >> 4;
                    }
                    copy_out(rows + kAwqRows[b][0] * args.codes_stride, low, columns, streamed);
                    copy_out(rows + kAwqRows[b][1] * args.codes_stride, high, columns, streamed);
                }
            }
        }
    }
}

template <int B>
void pack_rows(const BitsArgs& args, int64_t begin, int64_t end) {
    if (args.layout == BitLayout::gptq) return pack_transposed<B>(args, begin, end);
    const bool dense = args.layout == BitLayout::dense || B != 3;  // else both are the same words
    const int64_t words = dense ? (args.K * B + 31) / 32 : (args.K + 9) / 10;
    for (int64_t n = begin; n < end; ++n) {
        const uint8_t* codes = args.codes + n * args.codes_stride;
        uint32_t* out = args.packed + n * words;
        dense ? pack_stream<B>(codes, args.K, out) : pack_words(codes, args.K, out);
    }
}

template <int B>
void unpack_rows(const BitsArgs& args, int64_t begin, int64_t end) {
    if (args.layout == BitLayout::gptq) return unpack_transposed<B>(args, begin, end);
    const bool dense = args.layout == BitLayout::dense || B != 3;  // else both are the same words
    const int64_t words = dense ? (args.K * B + 31) / 32 : (args.K + 9) / 10;
    for (int64_t n = begin; n < end; ++n) {
        uint8_t* codes = args.codes + n * args.codes_stride;
        const uint32_t* in = args.packed + n * words;
        dense ? unpack_stream<B>(in, args.K, codes) : unpack_words(in, args.K, codes);
    }
}

void pack_some(const BitsArgs& args, int64_t begin, int64_t end) {
    if (args.layout == BitLayout::awq) return pack_awq(args, begin, end);
    switch (args.bits) {
        case 2: return pack_rows<2>(args, begin, end);
        case 3: return pack_rows<3>(args, begin, end);
        case 4: return pack_rows<4>(args, begin, end);
        default: return pack_rows<8>(args, begin, end);
    }
}

Status pack(const BitsArgs& args, int64_t begin, int64_t end) {
    // Rows are packed while they are still in the cache from the check.
    const int64_t step = args.layout == BitLayout::awq ? 8 * kAwqWords : args.layout == BitLayout::gptq ? kTileRows : 1;
    for (int64_t first = begin; first < end; first += step) {
        const int64_t last = least(first + step, end);
        for (int64_t n = first; n < last; ++n) {
            if (out_of_range(args.codes + n * args.codes_stride, args.K, args.bits)) return Status::code_range;
        }
        pack_some(args, first, last);
    }
    end_stream();
    return Status::ok;
}

void unpack_some(const BitsArgs& args, int64_t begin, int64_t end) {
    if (args.layout == BitLayout::awq) return unpack_awq(args, begin, end);
    switch (args.bits) {
        case 2: return unpack_rows<2>(args, begin, end);
        case 3: return unpack_rows<3>(args, begin, end);
        case 4: return unpack_rows<4>(args, begin, end);
        default: return unpack_rows<8>(args, begin, end);
    }
}

void unpack(const BitsArgs& args, int64_t begin, int64_t end) {
    unpack_some(args, begin, end);
    end_stream();
}

}  // namespace
