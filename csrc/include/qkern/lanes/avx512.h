// Sixteen floats in one AVX-512 register. Same operations and order as lanes/scalar.h.
#pragma once
#include <immintrin.h>

#include "qkern/codebooks.h"
#include "qkern/scalar_float.h"

namespace {

constexpr int kLanes = 16;

struct Lanes {
    __m512 v;
};

inline Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, const Lanes& a) { _mm512_storeu_ps(p, a.v); }

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline Lanes load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(load_256(p))}; }

inline Lanes load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(p)), 16))};
}

inline Lanes load_codes(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}

inline void store_f16(uint16_t* p, const Lanes& a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// Round to nearest even in the upper 16 bits; a NaN keeps its upper payload and becomes quiet.
inline void store_bf16(uint16_t* p, const Lanes& a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
}

inline void store_codes(uint8_t* p, const Lanes& a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline Lanes add(const Lanes& a, const Lanes& b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes sub(const Lanes& a, const Lanes& b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes mul(const Lanes& a, const Lanes& b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes div(const Lanes& a, const Lanes& b) { return {_mm512_div_ps(a.v, b.v)}; }
// Rounded once: never where results are compared with lanes/scalar.h.
inline Lanes mul_add(const Lanes& a, const Lanes& b, const Lanes& sum) { return {_mm512_fmadd_ps(a.v, b.v, sum.v)}; }
inline Lanes min(const Lanes& a, const Lanes& b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes max(const Lanes& a, const Lanes& b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes or_bits(const Lanes& a, const Lanes& b) { return {_mm512_or_ps(a.v, b.v)}; }

inline Lanes magnitude(const Lanes& a) { return {_mm512_abs_ps(a.v)}; }
inline Lanes flip_sign(const Lanes& a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }

inline Lanes max_bits(const Lanes& a, const Lanes& b) {
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}

inline Lanes magnitude_halves(const Lanes& a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi16(0x7fff)))};
}
inline Lanes flip_sign_halves(const Lanes& a) {
    return {_mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.v), _mm512_set1_epi16(-0x8000)))};
}
inline Lanes max_halves(const Lanes& a, const Lanes& b) {
    return {_mm512_castsi512_ps(_mm512_max_epi16(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}

inline Lanes upper_of_pairs(const Lanes& a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i larger = _mm512_max_epi16(bits, _mm512_slli_epi32(bits, 16));
    return {_mm512_castsi512_ps(_mm512_and_si512(larger, _mm512_set1_epi32(-0x10000)))};
}

inline bool any_bit(const Lanes& a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    return _mm512_test_epi32_mask(bits, bits) != 0;
}

inline Lanes round_even(const Lanes& a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline Lanes count_above(const Lanes& count, const Lanes& x, const Lanes& threshold) {
    const __mmask16 above = _mm512_cmp_ps_mask(x.v, threshold.v, _CMP_GT_OQ);
    return {_mm512_mask_add_ps(count.v, above, count.v, _mm512_set1_ps(1.0f))};
}

inline Lanes where_above(const Lanes& x, const Lanes& threshold, const Lanes& a, const Lanes& b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, threshold.v, _CMP_GT_OQ), b.v, a.v)};
}

inline Lanes lookup(const float* table, const Lanes& index) {
    return {_mm512_permutexvar_ps(_mm512_cvtps_epi32(index.v), _mm512_loadu_ps(table))};
}

#define QK_LANE_REDUCE(name, op)                                                                           \
    inline float name(const Lanes& a) {                                                                    \
        const __m256 eight = _mm256_##op##_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1)); \
        const __m128 four = _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
        const __m128 two = _mm_##op##_ps(four, _mm_movehl_ps(four, four));                                 \
        return _mm_cvtss_f32(_mm_##op##_ss(two, _mm_movehdup_ps(two)));                                    \
    }
QK_LANE_REDUCE(reduce_add, add)
QK_LANE_REDUCE(reduce_min, min)
QK_LANE_REDUCE(reduce_max, max)
#undef QK_LANE_REDUCE

inline void look_up_halves(const uint16_t* table, const uint8_t* codes, uint16_t* out) {
    const __m512i all = _mm512_castsi256_si512(load_256(table));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(load_256(codes)), all));
}

// What memory.h would otherwise write with the operations above.
#define QK_LANES_BLOCKS

inline __m512 halves(__m512 a, __m512 b, bool upper) {
    return upper ? _mm512_shuffle_f32x4(a, b, 0xee) : _mm512_shuffle_f32x4(a, b, 0x44);
}
inline __m512 quarters(__m512 a, __m512 b, bool odd) {
    return odd ? _mm512_shuffle_f32x4(a, b, 0xdd) : _mm512_shuffle_f32x4(a, b, 0x88);
}
inline __m512 singles(__m512 a, __m512 b, bool upper) {
    return upper ? _mm512_unpackhi_ps(a, b) : _mm512_unpacklo_ps(a, b);
}
inline __m512 pairs(__m512 a, __m512 b, bool upper) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(upper ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
}

// A tree that halves the lanes of a row with every step, and ends with row i in lane i.
inline Lanes max_of_each(const Lanes (&rows)[kLanes]) {
    const auto join = [](const Lanes& a, const Lanes& b, auto shuffle) {
        return max_bits({shuffle(a.v, b.v, false)}, {shuffle(a.v, b.v, true)});
    };
    Lanes four[4];
    for (int i = 0; i < 4; ++i) {
        four[i] = join(join(rows[i], rows[i + 4], halves), join(rows[i + 8], rows[i + 12], halves), quarters);
    }
    return join(join(four[0], four[1], singles), join(four[2], four[3], singles), pairs);
}

// Sixteenths are the last bits of a sum that is rounded down: they find the cell, which leaves one comparison.
inline __m512i rank_integers(const Codebook& book, const Lanes& x) {
    const Cells& cells = book.cells;
    // The smaller magnitude, with the sign of x: what lies outside goes to the first or last cell.
    const __m512 near = _mm512_range_ps(x.v, _mm512_set1_ps(0.99999994f), 0b0010);
    const __m512i cell = _mm512_castps_si512(
        _mm512_add_round_ps(near, _mm512_set1_ps(786432.0f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    const __m512 threshold =
        _mm512_permutex2var_ps(_mm512_loadu_ps(cells.threshold), cell, _mm512_loadu_ps(cells.threshold + 16));
    const __m512i below =
        _mm512_permutex2var_epi32(_mm512_loadu_si512(cells.below), cell, _mm512_loadu_si512(cells.below + 16));
    return _mm512_mask_add_epi32(below, _mm512_cmp_ps_mask(x.v, threshold, _CMP_GT_OQ), below, _mm512_set1_epi32(1));
}

inline Lanes rank(const Codebook& book, const Lanes& x) { return {_mm512_cvtepi32_ps(rank_integers(book, x))}; }

// 64 codes, one to a byte, to 2 * B words.
template <int B>
inline void store_bits(uint32_t* words, __m512i codes) {
    if constexpr (B == 8) {
        _mm512_storeu_si512(words, codes);
    } else {
        // Multiply and add joins neighbours: 2 * B bits in every 16.
        const __m512i two = _mm512_maddubs_epi16(codes, _mm512_set1_epi16(static_cast<int16_t>(1 | 256 << B)));
        if constexpr (B == 4) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtepi16_epi8(two));
        } else {
            const __m512i four = _mm512_madd_epi16(two, _mm512_set1_epi32(1 | 65536 << (2 * B)));
            if constexpr (B == 2) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm512_cvtepi32_epi8(four));
            } else {
                // 24 bits in every 64, of which three bytes stay.
                const __m512i eight = _mm512_or_si512(four, _mm512_srli_epi64(four, 20));
                const __m512i three = _mm512_broadcast_i32x4(
                    _mm_setr_epi8(0, 1, 2, 8, 9, 10, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
                const __m512i order = _mm512_castsi256_si512(
                    _mm256_setr_epi16(0, 1, 2, 8, 9, 10, 16, 17, 18, 24, 25, 26, 0, 0, 0, 0));
                const __m512i joined = _mm512_permutexvar_epi16(order, _mm512_shuffle_epi8(eight, three));
                _mm256_mask_storeu_epi32(words, 0x3f, _mm512_castsi512_si256(joined));
            }
        }
    }
}

// Four registers of integers, saturated to 0..255.
inline __m512i bytes_of(__m512i a, __m512i b, __m512i c, __m512i d) {
    // Quarters of four codes each: a0 b0 c0 d0 a1 b1 ..
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
}

inline void store_codes(uint8_t* p, const Lanes (&a)[4]) {
    _mm512_storeu_si512(p, bytes_of(_mm512_cvtps_epi32(a[0].v), _mm512_cvtps_epi32(a[1].v), _mm512_cvtps_epi32(a[2].v),
                                    _mm512_cvtps_epi32(a[3].v)));
}

template <int B>
inline void store_on_grid(uint32_t* words, const Lanes (&x)[4], const Lanes (&zero)[4]) {
    __m512i q[4];
    for (int i = 0; i < 4; ++i) {
        // The conversion rounds to even; it makes NaN and what is below all integers the lowest one, and must not get
        // what is above them. A NaN is the second operand and stays.
        const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(1073741824.0f), x[i].v);
        q[i] = _mm512_add_epi32(_mm512_cvtps_epi32(bounded), _mm512_cvtps_epi32(zero[i].v));
    }
    const __m512i top = _mm512_set1_epi8(static_cast<char>((1 << B) - 1));
    store_bits<B>(words, _mm512_min_epu8(bytes_of(q[0], q[1], q[2], q[3]), top));
}

inline void store_on_book(uint32_t* words, const Lanes (&x)[4], const Codebook& book) {
    const __m512i position = bytes_of(rank_integers(book, x[0]), rank_integers(book, x[1]), rank_integers(book, x[2]),
                                      rank_integers(book, x[3]));
    const __m128i codes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_loadu_ps(book.codes)));
    store_bits<4>(words, _mm512_shuffle_epi8(_mm512_broadcast_i32x4(codes), position));
}

}  // namespace

#include "qkern/lanes/memory.h"
