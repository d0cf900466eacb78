// Two-bit codes of 16-bit weights by three comparisons instead of a division. README.md beside this file says why
// they are the same codes.
#pragma once
#include "qkern/kernels.h"

namespace {

// Codes j + 1 and above belong to the weights whose bits, in order of value, are above threshold[j].
struct Thresholds {
    alignas(64) int16_t above[3][kLanes];
};

// Floats in order of value as integers; -0 is one below 0.
inline __m512i ordered(__m512i bits) {
    return _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
}

inline __m512i ordered_halves(__m512i bits) {
    return _mm512_xor_si512(bits, _mm512_srli_epi16(_mm512_srai_epi16(bits, 15), 1));
}

// The greatest integer of 16 bits whose float is not above the float of `order`.
template <qk::DType D>
inline __m256i floor_of(__m512i order) {
    if constexpr (D == qk::DType::bf16) {
        // Sixteen zeros follow a bf16; below zero these are ones in the order.
        const __m512i ones = _mm512_and_si512(_mm512_srai_epi32(order, 31), _mm512_set1_epi32(0xffff));
        return _mm512_cvtepi32_epi16(_mm512_srai_epi32(_mm512_sub_epi32(order, ones), 16));
    } else {
        const __m512 value = _mm512_castsi512_ps(ordered(order));
        const __m256i half = _mm512_cvt_roundps_ph(value, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        return _mm512_castsi512_si256(ordered_halves(_mm512_castsi256_si512(half)));
    }
}

// Of sixteen groups; false if a scale is not positive. Scales have 16 bits, so that their products here are exact.
template <qk::DType D>
inline bool thresholds_of(const float* scale, const float* zero, Thresholds* to) {
    const __m512 scales = _mm512_load_ps(scale), zeros = _mm512_load_ps(zero);
    if (_mm512_cmp_ps_mask(scales, _mm512_setzero_ps(), _CMP_LE_OQ)) return false;
    for (int j = 0; j < 3; ++j) {
        // w / s rounds to this level or above from half a level below it, at that point only if the level is even.
        const __m512 level = _mm512_sub_ps(_mm512_set1_ps(static_cast<float>(j + 1)), zeros);
        const __m512 edge = _mm512_mul_ps(_mm512_sub_ps(level, _mm512_set1_ps(0.5f)), scales);
        const __mmask16 odd = _mm512_test_epi32_mask(_mm512_cvtps_epi32(level), _mm512_set1_epi32(1));
        __m512i order = ordered(_mm512_castps_si512(edge));
        order = _mm512_mask_sub_epi32(order, static_cast<__mmask16>(~odd), order, _mm512_set1_epi32(1));
        _mm256_store_si256(reinterpret_cast<__m256i*>(to->above[j]), floor_of<D>(order));
    }
    return true;
}

// Codes of 32 weights of group g.
inline void store_two_bits(uint32_t* words, const char* weights, const Thresholds& of, int64_t g) {
    const __m512i order = ordered_halves(_mm512_loadu_si512(weights));
    uint32_t above[3];
    for (int j = 0; j < 3; ++j) above[j] = _mm512_cmpgt_epi16_mask(order, _mm512_set1_epi16(of.above[j][g]));
    const uint64_t low = _pdep_u64(above[0] ^ above[1] ^ above[2], 0x5555555555555555u);
    const uint64_t codes = low | _pdep_u64(above[1], 0xaaaaaaaaaaaaaaaau);
    memcpy(words, &codes, sizeof codes);
}

}  // namespace
