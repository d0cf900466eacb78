// The 512-bit vector of the tiers from avx512vnni on: 16 rows a register. vpdpbusd multiplies 64 code bytes by
// a quad of int8 activations that one broadcast load delivers, vpermps looks 16 small integers or codebook
// values up at once.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "qkern/kernels.h"

namespace {

struct Isa {
    static constexpr int kRows = 16;
    static constexpr int kVectors = 4;
    static constexpr int kDirectM = 4;
    static constexpr int kDirectRows = 16;
    static constexpr int kTileM = 6;  // 24 sums, 4 code vectors
    static constexpr int kFloatM = 4;
    static constexpr int kPairQuads = 0;
    static constexpr bool kSignedWide = false;

    using I = __m512i;
    using F = __m512;
    using Table = __m512;

    static I load(const uint8_t* at) { return _mm512_loadu_si512(at); }
    static I load_i(const int32_t* at) { return _mm512_loadu_si512(at); }
    static I load_bytes(const uint8_t* at) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    }
    static void store(uint8_t* at, I value) { _mm512_storeu_si512(at, value); }
    static I splat(int32_t value) { return _mm512_set1_epi32(value); }
    static I splat_byte(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
    static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
    static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
    static I or_and(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0xf8); }
    static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
    template <int SHIFT>
    static I shift_right(I a) {
        if constexpr (SHIFT == 0) return a;
        return _mm512_srli_epi16(a, SHIFT);
    }
    template <int SHIFT>
    static I shift_left(I a) {
        return _mm512_slli_epi16(a, SHIFT);
    }
    static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
    static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
    template <int BYTE>
    static I byte(I a) {
        if constexpr (BYTE == 3) return _mm512_srli_epi32(a, 24);
        return _mm512_and_si512(_mm512_srli_epi32(a, 8 * BYTE), _mm512_set1_epi32(255));
    }
    static I load_quad(const int8_t* at) {
        int32_t quad;
        memcpy(&quad, at, 4);
        return _mm512_set1_epi32(quad);
    }
    template <bool WIDE>
    static I dot4(I sum, I codes, I quad) {
        return _mm512_dpbusd_epi32(sum, codes, quad);
    }
    static I load_table(const uint8_t* bytes) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    }
    static I lookup_bytes(I table, I codes) { return _mm512_shuffle_epi8(table, codes); }

    static F load_f(const float* at) { return _mm512_loadu_ps(at); }
    static void store_f(float* at, F value) { _mm512_storeu_ps(at, value); }
    static F load_as_float(const uint8_t* at, qk::DType dtype) {
        if (dtype == qk::DType::f32) return _mm512_loadu_ps(at);
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        if (dtype == qk::DType::f16) return _mm512_cvtph_ps(halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static void store_as(void* at, qk::DType dtype, F value) {
        auto* halves = static_cast<__m256i*>(at);
        if (dtype == qk::DType::f32) {
            _mm512_storeu_ps(at, value);
        } else if (dtype == qk::DType::f16) {
            _mm256_storeu_si256(halves, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        } else {
            // Round to nearest even; a NaN keeps its upper half with the quiet bit set.
            const __m512i bits = _mm512_castps_si512(value);
            const __m512i upper = _mm512_srli_epi32(bits, 16);
            const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
            const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
            const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
            const __m512i quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
            _mm256_storeu_si256(halves, _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, quiet)));
        }
    }
    static F splat_f(float value) { return _mm512_set1_ps(value); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub_f(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul_f(F a, F b) { return _mm512_mul_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static Table load_float_table(const float* table) { return _mm512_loadu_ps(table); }
    template <int BYTE>
    static F lookup_floats(Table table, I codes) {
        // vpermps reads the low four bits of each lane only.
        return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * BYTE), table);
    }
};

}  // namespace
