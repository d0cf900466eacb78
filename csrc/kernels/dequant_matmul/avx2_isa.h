// 8 rows a register. AVX2: codes of up to 4 bits go through vpmaddubsw, whose int16 pairs are added for eight
// quads of columns before they are widened (15 * 127 * 2 * 8 fits); 8-bit codes enter as signed bytes, |q - 128|
// times the activation with the sign of q - 128, where one pair fits: 2 * 128 * 127 = 32512.
// AVX-VNNI (QK_AVXVNNI): vpdpbusd takes both as unsigned bytes; all else is the same.
#pragma once
#if defined(__GNUC__) && !defined(__clang__)
// See avx512vnni.cpp: coalescing makes GCC carry the sums of a tile through the stack.
#pragma GCC optimize("no-tree-coalesce-vars")
#endif
#if !defined(QK_AVXVNNI)
#define QK_WORDS  // see words.h
#endif
#include <immintrin.h>

#include "prepare.h"

namespace {

struct Isa {
    static constexpr int kRows = 8;
    static constexpr int kVectors = 4;
    static constexpr int kDirectM = 2;
    static constexpr int kDirectRows = 6;
    static constexpr int kTileM = 2;  // 8 sums of 16 registers; the product needs three more
    static constexpr int kFloatM = 2;
#if defined(QK_AVXVNNI)
    static constexpr int kPairQuads = 0;
    static constexpr bool kSignedWide = false;
#else
    static constexpr int kPairQuads = 8;
    static constexpr bool kSignedWide = true;
#endif

    using I = __m256i;
    using F = __m256;
    struct Table {
        __m256 low, high;
    };

    static I load(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
    static I load_i(const int32_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
    static void store(uint8_t* at, I value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value); }
    static I splat(int32_t value) { return _mm256_set1_epi32(value); }
    static I splat_byte(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
    static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
    static I or_and(I a, I b, I c) { return _mm256_or_si256(a, _mm256_and_si256(b, c)); }
    static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
    template <int SHIFT>
    static I shift_right(I a) {
        if constexpr (SHIFT == 0) return a;
        return _mm256_srli_epi16(a, SHIFT);
    }
    template <int SHIFT>
    static I shift_left(I a) {
        return _mm256_slli_epi16(a, SHIFT);
    }
    static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
    template <int BYTE>
    static I byte(I a) {
        if constexpr (BYTE == 3) return _mm256_srli_epi32(a, 24);
        return _mm256_and_si256(_mm256_srli_epi32(a, 8 * BYTE), _mm256_set1_epi32(255));
    }
    static I load_quad(const int8_t* at) {
        int32_t quad;
        memcpy(&quad, at, 4);
        return _mm256_set1_epi32(quad);
    }
#if defined(QK_AVXVNNI)
    template <bool WIDE>
    static I dot4(I sum, I codes, I quad) {
        return _mm256_dpbusd_avx_epi32(sum, codes, quad);
    }
#else
    static I add_pairs(I sum, I pairs) { return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
    static I dot_pairs(I pairs, I codes, I quad) { return _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, quad)); }
    template <bool WIDE>
    static I dot4(I sum, I codes, I quad) {
        static_assert(WIDE, "narrow codes are summed in pairs");
        return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(quad, codes)));
    }
#endif
    static I load_table(const uint8_t* bytes) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    }
    static I lookup_bytes(I table, I codes) { return _mm256_shuffle_epi8(table, codes); }

    static F load_f(const float* at) { return _mm256_loadu_ps(at); }
    static void store_f(float* at, F value) { _mm256_storeu_ps(at, value); }
    static F load_as_float(const uint8_t* at, qk::DType dtype) {
        if (dtype == qk::DType::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        if (dtype == qk::DType::f16) return _mm256_cvtph_ps(halves);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    static void store_as(void* at, qk::DType dtype, F value) {
        auto* halves = static_cast<__m128i*>(at);
        if (dtype == qk::DType::f32) {
            _mm256_storeu_ps(static_cast<float*>(at), value);
        } else if (dtype == qk::DType::f16) {
            _mm_storeu_si128(halves, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        } else {
            // Round to nearest even; a NaN keeps its upper half with the quiet bit set.
            const __m256i bits = _mm256_castps_si256(value);
            const __m256i upper = _mm256_srli_epi32(bits, 16);
            const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
            const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
            const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
            const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
            const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
            const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
            _mm_storeu_si128(halves, _mm256_castsi256_si128(packed));
        }
    }
    static F splat_f(float value) { return _mm256_set1_ps(value); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub_f(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul_f(F a, F b) { return _mm256_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static Table load_float_table(const float* table) { return {_mm256_loadu_ps(table), _mm256_loadu_ps(table + 8)}; }
    template <int BYTE>
    static F lookup_floats(Table table, I codes) {
        // Each permutation reads three bits of the index; bit 3, moved to the sign, chooses between them.
        const __m256i index = _mm256_srli_epi32(codes, 8 * BYTE);
        const __m256 choice = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - 8 * BYTE));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                                choice);
    }
};

}  // namespace
