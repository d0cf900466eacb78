// Codes of the CUDA layout to the registers of an mma: q - 2^(bits - 1), exact in both 16-bit floats, or the entry of
// a codebook. README.md beside this says how.
#pragma once
#include "cuda_layout.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {

using namespace qk::gpu;

// One lane's part of a tile.
template <int kBits>
struct Tile {
    uint4 lines[kBits];
};

QK_DEVICE uint32_t word_of(const uint4& line, int w) { return w == 0 ? line.x : w == 1 ? line.y : w == 2 ? line.z : line.w; }

// Two copies of a 16-bit float.
constexpr uint32_t twice(uint32_t bits) { return bits | (bits << 16); }

// Powers of two, negated sums of two of them and the like, as fp16.
constexpr uint32_t f16_bits(int value) {  // a whole number below 2048
    if (value == 0) return 0;
    const uint32_t sign = value < 0 ? 0x8000u : 0u;
    int size = value < 0 ? -value : value, exponent = 0;
    while ((size >> exponent) > 1) ++exponent;
    return sign | (static_cast<uint32_t>(exponent + 15) << 10) |
           ((static_cast<uint32_t>(size) << (10 - exponent)) & 1023u);
}
constexpr uint32_t bf16_bits(int value) {  // a whole number below 256
    if (value == 0) return 0;
    const uint32_t sign = value < 0 ? 0x8000u : 0u;
    int size = value < 0 ? -value : value, exponent = 0;
    while ((size >> exponent) > 1) ++exponent;
    return sign | (static_cast<uint32_t>(exponent + 127) << 7) | ((static_cast<uint32_t>(size) << (7 - exponent)) & 127u);
}

template <class T, int kBits>
struct Codes;

// fp16: codes under the exponent of 1024 read 1024 + 2^p q when their lowest bit is bit p.

// 1024 + 2^p q  ->  q - midpoint
template <int kBits, int p>
QK_DEVICE uint32_t f16_finish(uint32_t raised) {
    constexpr int midpoint = 1 << (kBits - 1);
    if constexpr (p == 0) {
        return f16_sub2(raised, twice(f16_bits(1024 + midpoint)));
    } else {
        constexpr uint32_t shrink = twice(static_cast<uint32_t>(15 - p) << 10);  // 2^-p
        return f16_fma2(raised, shrink, twice(f16_bits(-((1024 >> p) + midpoint))));
    }
}

template <>
struct Codes<F16, 4> {
    template <int i, int s>
    static QK_DEVICE void get(const Tile<4>& tile, uint32_t (&a)[4]) {
        const uint32_t w = word_of(tile.lines[i], s), high = w >> 8;
        constexpr uint32_t raise = twice(0x6400);
        a[0] = f16_finish<4, 0>(and_or(w, twice(0x000f), raise));
        a[1] = f16_finish<4, 4>(and_or(w, twice(0x00f0), raise));
        a[2] = f16_finish<4, 0>(and_or(high, twice(0x000f), raise));
        a[3] = f16_finish<4, 4>(and_or(high, twice(0x00f0), raise));
    }
};

template <>
struct Codes<F16, 8> {
    template <int i, int s>
    static QK_DEVICE void get(const Tile<8>& tile, uint32_t (&a)[4]) {
        QK_UNROLL for (int pair = 0; pair < 2; ++pair) {
            const uint32_t w = word_of(tile.lines[2 * i + s / 2], 2 * (s % 2) + pair);
            a[2 * pair] = f16_finish<8, 0>(byte_permute(w, 0x64646464u, 0x4140));
            a[2 * pair + 1] = f16_finish<8, 0>(byte_permute(w, 0x64646464u, 0x4342));
        }
    }
};

// Two bits of register 4 (s % 2) + j, raised, below bit 10.
template <int j, int kOdd>
QK_DEVICE uint32_t f16_low_two(uint32_t w) {
    return and_or(kOdd ? w >> 8 : w, twice(3u << (2 * j)), twice(0x6400));
}

template <>
struct Codes<F16, 2> {
    template <int i, int s>
    static QK_DEVICE void get(const Tile<2>& tile, uint32_t (&a)[4]) {
        const uint32_t w = word_of(tile.lines[i / 2], 2 * (i % 2) + s / 2);
        a[0] = f16_finish<2, 0>(f16_low_two<0, s % 2>(w));
        a[1] = f16_finish<2, 2>(f16_low_two<1, s % 2>(w));
        a[2] = f16_finish<2, 4>(f16_low_two<2, s % 2>(w));
        a[3] = f16_finish<2, 6>(f16_low_two<3, s % 2>(w));
    }
};

// The third bit of register r, moved to bit `to` of both halves; the bits around it are not cleared.
template <int r, int to>
QK_DEVICE uint32_t third_to(uint32_t h) {
    constexpr int from = third_bit(r);
    if constexpr (from >= to) {
        return h >> (from - to);
    } else {
        return h << (to - from);
    }
}

template <>
struct Codes<F16, 3> {
    template <int j, int s>
    static QK_DEVICE uint32_t raised(uint32_t w, uint32_t h) {
        return and_or(third_to<4 * s + j, 2 * j + 2>(h), twice(4u << (2 * j)), f16_low_two<j, s % 2>(w));
    }
    template <int i, int s>
    static QK_DEVICE void get(const Tile<3>& tile, uint32_t (&a)[4]) {
        const uint32_t w = word_of(tile.lines[i / 2], 2 * (i % 2) + s / 2), h = word_of(tile.lines[2], i);
        a[0] = f16_finish<3, 0>(raised<0, s>(w, h));
        a[1] = f16_finish<3, 2>(raised<1, s>(w, h));
        a[2] = f16_finish<3, 4>(raised<2, s>(w, h));
        a[3] = f16_finish<3, 6>(raised<3, s>(w, h));
    }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// bf16: codes of up to 7 bits at bit 0 under the exponent of 128 read 128 + q.
template <int kBits>
QK_DEVICE uint32_t bf16_finish(uint32_t raised) {
    return bf16_fma2(raised, twice(bf16_bits(1)), twice(bf16_bits(-(128 + (1 << (kBits - 1))))));
}

template <>
struct Codes<BF16, 4> {
    template <int i, int s>
    static QK_DEVICE void get(const Tile<4>& tile, uint32_t (&a)[4]) {
        const uint32_t w = word_of(tile.lines[i], s);
        QK_UNROLL for (int j = 0; j < 4; ++j) {
            a[j] = bf16_finish<4>(and_or(w >> (4 * j), twice(0x000f), twice(0x4300)));
        }
    }
};

template <>
struct Codes<BF16, 2> {
    template <int i, int s>
    static QK_DEVICE void get(const Tile<2>& tile, uint32_t (&a)[4]) {
        const uint32_t w = word_of(tile.lines[i / 2], 2 * (i % 2) + s / 2);
        QK_UNROLL for (int j = 0; j < 4; ++j) {
            a[j] = bf16_finish<2>(and_or(w >> (8 * (s % 2) + 2 * j), twice(3), twice(0x4300)));
        }
    }
};

template <>
struct Codes<BF16, 3> {
    template <int j, int s>
    static QK_DEVICE uint32_t one(uint32_t w, uint32_t h) {
        const uint32_t low = and_or(w >> (8 * (s % 2) + 2 * j), twice(3), twice(0x4300));
        return bf16_finish<3>(and_or(third_to<4 * s + j, 2>(h), twice(4), low));
    }
    template <int i, int s>
    static QK_DEVICE void get(const Tile<3>& tile, uint32_t (&a)[4]) {
        const uint32_t w = word_of(tile.lines[i / 2], 2 * (i % 2) + s / 2), h = word_of(tile.lines[2], i);
        a[0] = one<0, s>(w, h);
        a[1] = one<1, s>(w, h);
        a[2] = one<2, s>(w, h);
        a[3] = one<3, s>(w, h);
    }
};

template <>
struct Codes<BF16, 8> {
    // 2^23 + q as a float, less 2^23 + 128: at most eight significant bits, so the upper half is the bf16.
    static QK_DEVICE uint32_t one(uint32_t w, uint32_t selector) {
        return as_bits(sub(as_float(byte_permute(w, 0x4b000000u, selector)), 8388608.0f + 128.0f));
    }
    template <int i, int s>
    static QK_DEVICE void get(const Tile<8>& tile, uint32_t (&a)[4]) {
        QK_UNROLL for (int pair = 0; pair < 2; ++pair) {
            const uint32_t w = word_of(tile.lines[2 * i + s / 2], 2 * (s % 2) + pair);
            a[2 * pair] = byte_permute(one(w, 0x7650), one(w, 0x7651), 0x7632);
            a[2 * pair + 1] = byte_permute(one(w, 0x7652), one(w, 0x7653), 0x7632);
        }
    }
};

#endif

// A codebook: four nibbles at once choose bytes from a table of 16, half of it at a time.
QK_DEVICE uint32_t choose(const uint32_t* bytes, uint32_t nibbles, uint32_t upper) {
    const uint32_t low = byte_permute(bytes[0], bytes[1], nibbles), high = byte_permute(bytes[2], bytes[3], nibbles);
    return (high & upper) | (low & ~upper);
}

template <int i, int s>
QK_DEVICE void look_up(const Tile<4>& tile, const uint32_t (&table)[8], uint32_t (&a)[4]) {
    const uint32_t w = word_of(tile.lines[i], s);
    QK_UNROLL for (int part = 0; part < 2; ++part) {
        const uint32_t four = w >> (16 * part), nibbles = four & 0x7777u;
        const uint32_t upper = byte_permute(0x0000ff00u, 0, (four >> 3) & 0x1111u);
        const uint32_t low = choose(table, nibbles, upper), high = choose(table + 4, nibbles, upper);
        a[2 * part] = byte_permute(low, high, 0x5140);
        a[2 * part + 1] = byte_permute(low, high, 0x7362);
    }
}

}  // namespace qk::cuda
