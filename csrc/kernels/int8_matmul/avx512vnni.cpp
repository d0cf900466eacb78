// AVX512-VNNI: 16 rows a register; vpdpbusd adds four products of an unsigned code and a signed activation to
// each int32 and never saturates, so every pair of bytes is exact.
#if defined(__GNUC__) && !defined(__clang__)
// Coalescing makes GCC 12 carry every sum of a tile through the stack: half the speed with 24 sums.
#pragma GCC optimize("no-tree-coalesce-vars")
#endif
#include "qkern/lanes/avx512.h"

namespace {

struct Isa {
    static constexpr int kRows = 16;
    static constexpr int kVectors = 4;
    static constexpr int kTileM = 6;  // 24 sums, 6 registers of activations, 1 of codes
    static constexpr int kBias = 0;

    using X = int8_t;
    using I = __m512i;
    using Codes = __m512i;
    using Quad = __m512i;

    static void place(const int8_t* codes, int64_t n, X* out) { memcpy(out, codes, static_cast<size_t>(n)); }
    static I load(const int32_t* at) { return _mm512_loadu_si512(at); }
    static void store(int32_t* at, I value) { _mm512_storeu_si512(at, value); }
    static I zero() { return _mm512_setzero_si512(); }
    static I add(I a, I b) { return _mm512_add_epi32(a, b); }
    static Codes load_codes(const uint8_t* at) { return _mm512_loadu_si512(at); }
    static Quad load_quad(const X* at) {
        int32_t quad;
        memcpy(&quad, at, 4);
        return _mm512_set1_epi32(quad);
    }
    static I dot(I sum, Codes codes, Quad quad) { return _mm512_dpbusd_epi32(sum, codes, quad); }
};

}  // namespace

#include "tiles.h"

extern "C" void qk_enter_int8_matmul_avx512vnni(qk::KernelTable* table) {
    table->int8_prepare = &prepare_int8;
    table->int8_matmul = &multiply_int8;
    table->int8_bytes = sizeof(X);
}
