// A codebook in compute int8 on AVX2: its entries as 16-bit words, round(32767 * table), times the activations by
// vpmaddwd. Two byte planes, which suit vpdpbusd, would cost 10 instructions for 32 codes instead of 8 (6 where
// two rows of x share the lookups), since vpmaddubsw saturates on bytes of more than 7 bits.
//
// Bound of a sum: 128 columns * 32767 * 127 < 2^30.
#pragma once
#include "panels.h"

namespace {

constexpr int64_t kWordRows = 2;  // up to this many rows of x look the words up on the way to the product

// The words of 8 rows by 4 columns: those of rows 0, 1, 4, 5 and of rows 2, 3, 6, 7.
struct Words {
    I first, second;
};

QK_INLINE Words words_of(I codes, I low, I high) {
    const I lows = Isa::lookup_bytes(low, codes), highs = Isa::lookup_bytes(high, codes);
    return {_mm256_unpacklo_epi8(lows, highs), _mm256_unpackhi_epi8(lows, highs)};
}

// The tables of a codebook's planes, which hold 32768 more.
QK_INLINE I low_bytes(const uint8_t (&planes)[2][16]) { return Isa::load_table(planes[1]); }
QK_INLINE I high_bytes(const uint8_t (&planes)[2][16]) {
    return Isa::bit_xor(Isa::load_table(planes[0]), Isa::splat_byte(0x80));
}

// GCC would add the products of several steps first, and have no register left for them.
QK_INLINE void in_turn(I& sum) {
#if defined(__GNUC__)
    asm("" : "+x"(sum));
#endif
}

template <int MT>
QK_INLINE void load_quads(const int8_t* x, int64_t x_stride, I* quads) {
    QK_UNROLL for (int m = 0; m < MT; ++m) {
        float quad;  // whose broadcast is one load
        memcpy(&quad, x + m * x_stride, 4);
        quads[m] = _mm256_cvtepi8_epi16(_mm_castps_si128(_mm_set1_ps(quad)));
    }
}

// Adds vector V of words times a quad of each of MT rows of x. Vector by vector, for want of registers.
template <int MT, int NV, int V>
QK_INLINE void add_words(const Words& words, const I* quads, I* first, I* second) {
    QK_UNROLL for (int m = 0; m < MT; ++m) {
        I& a = first[m * NV + V];
        I& b = second[m * NV + V];
        a = _mm256_add_epi32(a, _mm256_madd_epi16(words.first, quads[m]));
        b = _mm256_add_epi32(b, _mm256_madd_epi16(words.second, quads[m]));
        in_turn(a);
        in_turn(b);
    }
}

// The same for all vectors from V on, from words that are next to each other, or from codes: bits SHIFT to
// SHIFT + 4 of their bytes.
template <int MT, int NV, int V = 0>
QK_INLINE void add_expanded(const uint8_t* at, const I* quads, I* first, I* second) {
    add_words<MT, NV, V>({Isa::load(at + 64 * V), Isa::load(at + 64 * V + 32)}, quads, first, second);
    if constexpr (V + 1 < NV) add_expanded<MT, NV, V + 1>(at, quads, first, second);
}

template <int MT, int NV, int SHIFT, int V = 0>
QK_INLINE void add_codes(const uint8_t* at, I low, I high, const I* quads, I* first, I* second) {
    const I codes = Isa::bit_and(Isa::template shift_right<SHIFT>(Isa::load(at + 32 * V)), Isa::splat_byte(15));
    add_words<MT, NV, V>(words_of(codes, low, high), quads, first, second);
    if constexpr (V + 1 < NV) add_codes<MT, NV, SHIFT, V + 1>(at, low, high, quads, first, second);
}

// MT rows of x from row m0 by NV vectors of output columns from column r, over one block: from its packed codes,
// or with EXPANDED from words that were written to `expanded`.
template <int MT, int NV, bool EXPANDED, class Block>
QK_INLINE void micro_words(const Block& b, const uint8_t* expanded, int64_t R, int64_t r, int64_t m0) {
    I first[MT * NV], second[MT * NV];
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) first[i] = second[i] = Isa::splat(0);
    Ahead ahead = ahead_of(b.codes, r, Isa::kRows * NV, 4, b.padded / 4, m0, MT, b.M);
    const int8_t* x = b.x + m0 * b.x_stride;
    I quads[MT];
    if constexpr (EXPANDED) {
        const uint8_t* at = expanded + 8 * r;
        const int8_t* const end = x + b.padded;
        do {  // a block is never empty
            fetch<1>(ahead, 0);
            ahead.at += ahead.step;
            load_quads<MT>(x, b.x_stride, quads);
            add_expanded<MT, NV>(at, quads, first, second);
            at += 8 * R;
            x += 4;
        } while (x < end);
    } else {
        const I low = low_bytes(b.planes->bytes), high = high_bytes(b.planes->bytes);
        const int64_t run = b.padded / 2;  // columns
        const uint8_t* at = b.codes + 4 * r;
        const int8_t* const end = x + run;
        do {
            fetch<1>(ahead, 0);
            fetch<1>(ahead, 1);
            ahead.at += 2 * ahead.step;
            load_quads<MT>(x, b.x_stride, quads);
            add_codes<MT, NV, 0>(at, low, high, quads, first, second);
            load_quads<MT>(x + run, b.x_stride, quads);
            add_codes<MT, NV, 4>(at, low, high, quads, first, second);
            at += b.line;
            x += 4;
        } while (x < end);
    }
    QK_UNROLL for (int m = 0; m < MT; ++m) {
        const F x_scale = Isa::splat_f(b.x_scale[(m0 + m) * b.blocks] * b.factor);
        QK_UNROLL for (int v = 0; v < NV; ++v) {
            const int64_t row = r + v * Isa::kRows;
            float* out = b.tile[m0 + m] + row;
            const F sum = Isa::to_float(_mm256_hadd_epi32(first[m * NV + v], second[m * NV + v]));
            Isa::store_f(out, Isa::fma(sum, Isa::mul_f(Isa::load_f(b.scale + row), x_scale), Isa::load_f(out)));
        }
    }
}

template <bool EXPANDED, class Block>
inline void rows_words(const Block& b, const uint8_t* expanded, int64_t R, int64_t M) {
    int64_t m = 0;
    for (; m + 2 <= M; m += 2) {
        for (int64_t r = 0; r < R; r += 2 * Isa::kRows) micro_words<2, 2, EXPANDED>(b, expanded, R, r, m);
    }
    if (m == M) return;
    int64_t r = 0;
    for (; r + 4 * Isa::kRows <= R; r += 4 * Isa::kRows) micro_words<1, 4, EXPANDED>(b, expanded, R, r, m);
    for (; r < R; r += 2 * Isa::kRows) micro_words<1, 2, EXPANDED>(b, expanded, R, r, m);
}

// One block of a codebook; `scratch` has room for two bytes of each of its codes.
template <class Block>
inline void product_words(const Block& b, int64_t R, int64_t M, uint8_t* scratch) {
    if (M <= kWordRows) return rows_words<false>(b, scratch, R, M);
    const I low = low_bytes(b.planes->bytes), high = high_bytes(b.planes->bytes), nibble = Isa::splat_byte(15);
    const int64_t count = b.padded / 8;
    for (int64_t j = 0; j < count; ++j) {
        for (int64_t r = 0; r < R; r += Isa::kRows) {
            const I line = Isa::load(b.codes + j * b.line + 4 * r);
            const Words words[2] = {words_of(Isa::bit_and(line, nibble), low, high),
                                    words_of(Isa::bit_and(Isa::template shift_right<4>(line), nibble), low, high)};
            QK_UNROLL for (int run = 0; run < 2; ++run) {
                uint8_t* out = scratch + ((run * count + j) * R + r) * 8;
                Isa::store(out, words[run].first);
                Isa::store(out + 32, words[run].second);
            }
        }
    }
    rows_words<true>(b, scratch, R, M);
}

}  // namespace
