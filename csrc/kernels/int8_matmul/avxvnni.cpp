// AVX-VNNI: the 256-bit form of vpdpbusd that chips without AVX-512 have; exact as avx512vnni.cpp's.
#if defined(__GNUC__) && !defined(__clang__)
// See avx512vnni.cpp.
#pragma GCC optimize("no-tree-coalesce-vars")
#endif
#include "qkern/lanes/avx2.h"

namespace {

struct Isa {
    static constexpr int kRows = 8;
    static constexpr int kVectors = 4;
    static constexpr int kTileM = 3;  // 12 sums of 16 registers, 3 of activations, 1 of codes
    static constexpr int kBias = 0;

    using X = int8_t;
    using I = __m256i;
    using Codes = __m256i;
    using Quad = __m256i;

    static void place(const int8_t* codes, int64_t n, X* out) { memcpy(out, codes, static_cast<size_t>(n)); }
    static I load(const int32_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
    static void store(int32_t* at, I value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value); }
    static I zero() { return _mm256_setzero_si256(); }
    static I add(I a, I b) { return _mm256_add_epi32(a, b); }
    static Codes load_codes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
    static Quad load_quad(const X* at) {
        int32_t quad;
        memcpy(&quad, at, 4);
        return _mm256_set1_epi32(quad);
    }
    static I dot(I sum, Codes codes, Quad quad) { return _mm256_dpbusd_avx_epi32(sum, codes, quad); }
};

}  // namespace

#include "tiles.h"

extern "C" void qk_enter_int8_matmul_avxvnni(qk::KernelTable* table) {
    table->int8_prepare = &prepare_int8;
    table->int8_matmul = &multiply_int8;
    table->int8_bytes = sizeof(X);
}
