// Dense little-endian bit streams: codes of b bits, one to a byte, to and from 32-bit words.
//
// Eight codes at a time move through one 64-bit word: three shift-or-mask steps squeeze eight bytes to
// 8 * b bits, and the mirror image spreads them. Compilers vectorise these loops for every tier.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

template <int B>
inline uint64_t squeeze(uint64_t x) {
    if (B == 8) return x;
    constexpr uint64_t pair = (1ull << (2 * B)) - 1, quad = (1ull << (4 * B)) - 1;
    x = (x | x >> (8 - B)) & (pair * 0x0001000100010001ull);
    x = (x | x >> (16 - 2 * B)) & (quad * 0x0000000100000001ull);
    return (x | x >> (32 - 4 * B)) & ((quad << (4 * B)) | quad);
}

template <int B>
inline uint64_t spread(uint64_t x) {
    if (B == 8) return x;
    constexpr uint64_t one = (1ull << B) - 1, pair = (1ull << (2 * B)) - 1, quad = (1ull << (4 * B)) - 1;
    x = (x | x << (32 - 4 * B)) & (quad * 0x0000000100000001ull);
    x = (x | x << (16 - 2 * B)) & (pair * 0x0001000100010001ull);
    return (x | x << (8 - B)) & (one * 0x0101010101010101ull);
}

inline uint64_t load_u64(const uint8_t* p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

// 32 * blocks codes to B * blocks words.
template <int B>
inline void pack_blocks(const uint8_t* codes, int64_t blocks, uint32_t* words) {
    if (B == 8) {
        // By constant sizes: a copy of unknown size becomes a string instruction, slow where it is short.
        for (int64_t i = 0; i < blocks; ++i) memcpy(words + 8 * i, codes + 32 * i, 32);
    } else if (B == 4) {
        for (int64_t i = 0; i < blocks * 4; ++i) words[i] = static_cast<uint32_t>(squeeze<4>(load_u64(codes + 8 * i)));
    } else if (B == 2) {
        for (int64_t i = 0; i < blocks * 2; ++i) {
            words[i] = static_cast<uint32_t>(squeeze<2>(load_u64(codes + 16 * i)) |
                                             squeeze<2>(load_u64(codes + 16 * i + 8)) << 16);
        }
    } else {
        for (int64_t i = 0; i < blocks; ++i) {
            const uint64_t a = squeeze<3>(load_u64(codes + 32 * i)), b = squeeze<3>(load_u64(codes + 32 * i + 8));
            const uint64_t c = squeeze<3>(load_u64(codes + 32 * i + 16)), d = squeeze<3>(load_u64(codes + 32 * i + 24));
            words[3 * i] = static_cast<uint32_t>(a | b << 24);
            words[3 * i + 1] = static_cast<uint32_t>(b >> 8 | c << 16);
            words[3 * i + 2] = static_cast<uint32_t>(c >> 16 | d << 8);
        }
    }
}

template <int B>
inline void unpack_blocks(const uint32_t* words, int64_t blocks, uint8_t* codes) {
    const auto put = [codes](int64_t i, uint64_t x) { memcpy(codes + 8 * i, &x, 8); };
    if (B == 8) {
        for (int64_t i = 0; i < blocks; ++i) memcpy(codes + 32 * i, words + 8 * i, 32);
    } else if (B == 4) {
        for (int64_t i = 0; i < blocks * 4; ++i) put(i, spread<4>(words[i]));
    } else if (B == 2) {
        for (int64_t i = 0; i < blocks * 2; ++i) {
            put(2 * i, spread<2>(words[i] & 0xffffu));
            put(2 * i + 1, spread<2>(words[i] >> 16));
        }
    } else {
        for (int64_t i = 0; i < blocks; ++i) {
            const uint64_t a = words[3 * i], b = words[3 * i + 1], c = words[3 * i + 2];
            put(4 * i, spread<3>(a & 0xffffffu));
            put(4 * i + 1, spread<3>((a >> 24 | b << 8) & 0xffffffu));
            put(4 * i + 2, spread<3>((b >> 16 | c << 16) & 0xffffffu));
            put(4 * i + 3, spread<3>(c >> 8));
        }
    }
}

// Any number of codes; the rest of the last word is zero bits. Writes ceil(count * B / 32) words.
template <int B>
inline void pack_stream(const uint8_t* codes, int64_t count, uint32_t* words) {
    const int64_t blocks = count / 32;
    pack_blocks<B>(codes, blocks, words);
    const int64_t rest = count - 32 * blocks;
    if (rest == 0) return;
    uint8_t last_codes[32] = {};
    uint32_t last_words[B];
    memcpy(last_codes, codes + 32 * blocks, static_cast<size_t>(rest));
    pack_blocks<B>(last_codes, 1, last_words);
    memcpy(words + B * blocks, last_words, static_cast<size_t>((rest * B + 31) / 32) * 4);
}

template <int B>
inline void unpack_stream(const uint32_t* words, int64_t count, uint8_t* codes) {
    const int64_t blocks = count / 32;
    unpack_blocks<B>(words, blocks, codes);
    const int64_t rest = count - 32 * blocks;
    if (rest == 0) return;
    uint8_t last_codes[32];
    uint32_t last_words[B] = {};
    memcpy(last_words, words + B * blocks, static_cast<size_t>((rest * B + 31) / 32) * 4);
    unpack_blocks<B>(last_words, 1, last_codes);
    memcpy(codes + 32 * blocks, last_codes, static_cast<size_t>(rest));
}

}  // namespace
