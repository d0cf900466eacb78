// AVX2: 8 rows a register. vpmaddubsw would saturate (255 * 127 * 2 does not fit int16) and taking signs off -128
// is not exact, so codes and activations are multiplied as int16: the even and the odd columns of a quad each
// give one vpmaddwd, as many instructions as the 8-bit form needs to fix signs and widen its pairs.
#if defined(__GNUC__) && !defined(__clang__)
// See avx512vnni.cpp.
#pragma GCC optimize("no-tree-coalesce-vars")
#endif
#include "qkern/lanes/avx2.h"

namespace {

struct Isa {
    static constexpr int kRows = 8;
    static constexpr int kVectors = 4;
    static constexpr int kTileM = 2;  // 8 sums of 16 registers, 4 of activations, 2 of codes
    static constexpr int kBias = 0;

    using X = int16_t;  // a quad is (0, 2, 1, 3): two pairs that are each one broadcast
    using I = __m256i;
    struct Codes {
        __m256i even, odd;
    };
    struct Quad {
        __m256i even, odd;
    };

    static void place(const int8_t* codes, int64_t n, X* out) {
        for (int64_t i = 0; i < n; i += 4) {
            out[i] = codes[i];
            out[i + 1] = codes[i + 2];
            out[i + 2] = codes[i + 1];
            out[i + 3] = codes[i + 3];
        }
    }
    static I load(const int32_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
    static void store(int32_t* at, I value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value); }
    static I zero() { return _mm256_setzero_si256(); }
    static I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static Codes load_codes(const uint8_t* at) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        return {_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srli_epi16(codes, 8)};
    }
    static Quad load_quad(const X* at) {
        int32_t pairs[2];
        memcpy(pairs, at, 8);
        return {_mm256_set1_epi32(pairs[0]), _mm256_set1_epi32(pairs[1])};
    }
    static I dot(I sum, const Codes& codes, const Quad& quad) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes.even, quad.even));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(codes.odd, quad.odd));
    }
};

}  // namespace

#include "tiles.h"

extern "C" void qk_enter_int8_matmul_avx2(qk::KernelTable* table) {
    table->int8_prepare = &prepare_int8;
    table->int8_matmul = &multiply_int8;
    table->int8_bytes = sizeof(X);
}
