// Sixteen floats in two AVX2 registers. Same operations and order as lanes/scalar.h.
#pragma once
#include <immintrin.h>

#include "qkern/scalar_float.h"

namespace {

constexpr int kLanes = 16;

struct Lanes {
    __m256 lo, hi;
};

inline Lanes splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, const Lanes& a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}

inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store_128(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }

inline Lanes load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))};
}

inline __m256 widen_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
}

inline Lanes load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }

inline Lanes load_codes(const uint8_t* p) {
    const __m128i codes = load_128(p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(codes, 8)))};
}

inline void store_f16(uint16_t* p, const Lanes& a) {
    store_128(p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    store_128(p + 8, _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

// Round to nearest even in the upper 16 bits; a NaN keeps its upper payload and becomes quiet.
inline __m256i narrow_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}

inline void store_bf16(uint16_t* p, const Lanes& a) {
    const __m256i packed = _mm256_packus_epi32(narrow_bf16(a.lo), narrow_bf16(a.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

inline void store_codes(uint8_t* p, const Lanes& a) {
    const __m256i words = _mm256_packus_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    store_128(p, _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}

inline Lanes add(const Lanes& a, const Lanes& b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Lanes sub(const Lanes& a, const Lanes& b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Lanes mul(const Lanes& a, const Lanes& b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Lanes div(const Lanes& a, const Lanes& b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
// Rounded once: never where results are compared with lanes/scalar.h.
inline Lanes mul_add(const Lanes& a, const Lanes& b, const Lanes& sum) {
    return {_mm256_fmadd_ps(a.lo, b.lo, sum.lo), _mm256_fmadd_ps(a.hi, b.hi, sum.hi)};
}
inline Lanes min(const Lanes& a, const Lanes& b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Lanes max(const Lanes& a, const Lanes& b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }

inline Lanes or_bits(const Lanes& a, const Lanes& b) { return {_mm256_or_ps(a.lo, b.lo), _mm256_or_ps(a.hi, b.hi)}; }

inline Lanes magnitude(const Lanes& a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}

inline Lanes flip_sign(const Lanes& a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}

inline __m256 max_bits_8(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

inline Lanes max_bits(const Lanes& a, const Lanes& b) { return {max_bits_8(a.lo, b.lo), max_bits_8(a.hi, b.hi)}; }

inline Lanes magnitude_halves(const Lanes& a) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi16(0x7fff));
    return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}

inline Lanes flip_sign_halves(const Lanes& a) {
    const __m256 signs = _mm256_castsi256_ps(_mm256_set1_epi16(-0x8000));
    return {_mm256_xor_ps(a.lo, signs), _mm256_xor_ps(a.hi, signs)};
}

inline __m256 max_halves_16(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi16(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}

inline Lanes max_halves(const Lanes& a, const Lanes& b) {
    return {max_halves_16(a.lo, b.lo), max_halves_16(a.hi, b.hi)};
}

inline __m256 upper_of_pairs_8(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i larger = _mm256_max_epi16(bits, _mm256_slli_epi32(bits, 16));
    return _mm256_castsi256_ps(_mm256_and_si256(larger, _mm256_set1_epi32(-0x10000)));
}

inline Lanes upper_of_pairs(const Lanes& a) { return {upper_of_pairs_8(a.lo), upper_of_pairs_8(a.hi)}; }

inline bool any_bit(const Lanes& a) {
    const __m256i all = _mm256_castps_si256(_mm256_or_ps(a.lo, a.hi));
    return !_mm256_testz_si256(all, all);
}

inline Lanes round_even(const Lanes& a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}

inline __m256 one_where_above(__m256 x, __m256 threshold) {
    return _mm256_and_ps(_mm256_cmp_ps(x, threshold, _CMP_GT_OQ), _mm256_set1_ps(1.0f));
}

inline Lanes count_above(const Lanes& count, const Lanes& x, const Lanes& threshold) {
    return {_mm256_add_ps(count.lo, one_where_above(x.lo, threshold.lo)),
            _mm256_add_ps(count.hi, one_where_above(x.hi, threshold.hi))};
}

inline Lanes where_above(const Lanes& x, const Lanes& threshold, const Lanes& a, const Lanes& b) {
    return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, threshold.lo, _CMP_GT_OQ)),
            _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, threshold.hi, _CMP_GT_OQ))};
}

inline __m256 lookup_8(__m256 table_lo, __m256 table_hi, __m256 position) {
    const __m256i index = _mm256_cvtps_epi32(position);  // the permutation reads its low three bits
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 to the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table_lo, index), _mm256_permutevar8x32_ps(table_hi, index),
                            upper);
}

inline Lanes lookup(const float* table, const Lanes& index) {
    const __m256 lo = _mm256_loadu_ps(table), hi = _mm256_loadu_ps(table + 8);
    return {lookup_8(lo, hi, index.lo), lookup_8(lo, hi, index.hi)};
}

// Byte tables of the lower and the upper halves.
inline void look_up_halves(const uint16_t* table, const uint8_t* codes, uint16_t* out) {
    const __m128i low_bytes = _mm_set1_epi16(0xff), first = load_128(table), second = load_128(table + 8);
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_packus_epi16(_mm_and_si128(first, low_bytes), _mm_and_si128(second, low_bytes)));
    const __m256i high =
        _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
    // Quarters 0, 2, 1, 3: the two interleaved registers are then in order.
    const __m256i at = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), 0xd8);
    const __m256i x = _mm256_shuffle_epi8(low, at), y = _mm256_shuffle_epi8(high, at);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_unpacklo_epi8(x, y));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_unpackhi_epi8(x, y));
}

#define QK_LANE_REDUCE(name, op)                                                                        \
    inline float name(const Lanes& a) {                                                                 \
        const __m256 eight = _mm256_##op##_ps(a.lo, a.hi);                                              \
        const __m128 four = _mm_##op##_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)); \
        const __m128 two = _mm_##op##_ps(four, _mm_movehl_ps(four, four));                              \
        return _mm_cvtss_f32(_mm_##op##_ss(two, _mm_movehdup_ps(two)));                                 \
    }
QK_LANE_REDUCE(reduce_add, add)
QK_LANE_REDUCE(reduce_min, min)
QK_LANE_REDUCE(reduce_max, max)
#undef QK_LANE_REDUCE

}  // namespace

#include "qkern/lanes/memory.h"
