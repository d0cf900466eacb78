// Blocks of 16 x 16 words, transposed in registers.
#pragma once
#include "qkern/stream.h"

namespace {

constexpr int64_t kBlock = 16;

#if defined(__AVX512F__)
inline void transpose_whole(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride, bool streamed) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * in_stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    // a[4i + j]: rows 4i .. 4i + 3 of columns j, j + 4, j + 8 and j + 12.
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
        a[i + 12] = _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
    }
    for (int i = 0; i < 16; ++i) {
        if (streamed) {
            _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i * out_stride), a[i]);
        } else {
            _mm512_storeu_si512(out + i * out_stride, a[i]);
        }
    }
}
#else
#if defined(__AVX2__)
inline void transpose_quarter(const uint32_t* in, int64_t in_stride, uint32_t* out) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i * in_stride));
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m256i low = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
        const __m256i high = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + i * kBlock), low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + (i + 4) * kBlock), high);
    }
}
#endif

inline void transpose_whole(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t out_stride, bool streamed) {
    alignas(64) uint32_t block[kBlock * kBlock];
#if defined(__AVX2__)
    for (int64_t i = 0; i < kBlock; i += 8) {
        for (int64_t j = 0; j < kBlock; j += 8) transpose_quarter(in + i * in_stride + j, in_stride, block + j * kBlock + i);
    }
#else
    for (int64_t i = 0; i < kBlock; ++i) {
        for (int64_t j = 0; j < kBlock; ++j) block[j * kBlock + i] = in[i * in_stride + j];
    }
#endif
    for (int64_t j = 0; j < kBlock; ++j) copy_out(out + j * out_stride, block + j * kBlock, kBlock * 4, streamed);
}
#endif

// out[j][i] = in[i][j] for `rows` by `columns` words, in whole lines where there are any.
inline void transpose(const uint32_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint32_t* out,
                      int64_t out_stride, bool streamed) {
    streamed = streamed && whole_lines(out) && out_stride % kBlock == 0;
    for (int64_t j = 0; j < columns; j += kBlock) {
        for (int64_t i = 0; i < rows; i += kBlock) {
            const uint32_t* from = in + i * in_stride + j;
            uint32_t* to = out + j * out_stride + i;
            if (rows - i >= kBlock && columns - j >= kBlock) {
                transpose_whole(from, in_stride, to, out_stride, streamed);
                continue;
            }
            const int64_t height = rows - i < kBlock ? rows - i : kBlock;
            const int64_t width = columns - j < kBlock ? columns - j : kBlock;
            for (int64_t y = 0; y < width; ++y) {
                for (int64_t x = 0; x < height; ++x) to[y * out_stride + x] = from[x * in_stride + y];
            }
        }
    }
}

}  // namespace
