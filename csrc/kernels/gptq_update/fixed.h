// Products in 16-bit fixed point for GPTQ: out = base + a @ b to about 1e-4 of its terms. README.md beside this file
// has the arithmetic. AVX512-VNNI only: it multiplies two 16-bit numbers where FMA multiplies one float.
#pragma once
#include "qkern/kernels.h"
#include "qkern/unroll.h"

namespace {
namespace fixed {

using namespace qk;

constexpr int64_t kDepth = kProductDepth;
constexpr int kTall = 14, kWide = 2;  // 28 sums
constexpr int64_t kWidth = kWide * 16;
// What has one unit: the shorter, the finer it is.
constexpr int64_t kSegment = 64;
constexpr int64_t kSegments = kDepth / kSegment;
// Rows for which a slice of b is fetched once.
constexpr int64_t kChunk = 64 * kTall;
// No sum leaves 32 bits: it is at most the product of both vectors' lengths, 46000 each and 4 more by rounding.
constexpr float kLength = 46000.0f;
constexpr float kTop = 32760.0f;
// Below this 1 / x may overflow: what is so small counts as zero.
constexpr float kLeast = 1e-30f;

// A slice of b, 32 columns of it: two rows in each lane.
struct Panel {
    __m512i pairs[kDepth / 2][kWide];
    __m512 unit[kSegments][kWide];
};

QK_INLINE __m512i magnitude(__m512 x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

// The unit in which a segment becomes 16-bit numbers, by its largest magnitude (the bits of it) and the sum of its
// squares, and the unit's inverse. What has an Inf or a NaN has a unit that is one.
QK_INLINE __m512 unit_of(__m512i largest, __m512 squares, __m512* inverse) {
    const __m512 most = _mm512_castsi512_ps(largest);
    // Squares that overflow or vanish: eight times the largest is the length's bound.
    const __mmask16 precise = _mm512_cmp_ps_mask(squares, _mm512_set1_ps(1e-30f), _CMP_GT_OQ) &
                              _mm512_cmp_ps_mask(squares, _mm512_set1_ps(1e38f), _CMP_LT_OQ);
    const __m512 bound = _mm512_mul_ps(most, _mm512_set1_ps(8.0f / kLength)), per = _mm512_set1_ps(1.0f / kLength);
    const __m512 by_length = _mm512_mask_mul_ps(bound, precise, _mm512_sqrt_ps(squares), per);
    // max returns its second operand if one is NaN.
    const __m512 unit = _mm512_max_ps(by_length, _mm512_mul_ps(most, _mm512_set1_ps(1.0f / kTop)));
    const __mmask16 usable = _mm512_cmp_ps_mask(unit, _mm512_set1_ps(kLeast), _CMP_GE_OQ);
    *inverse = _mm512_maskz_div_ps(usable, _mm512_set1_ps(1.0f), unit);
    return _mm512_maskz_mov_ps(usable | _mm512_cmp_ps_mask(unit, unit, _CMP_UNORD_Q), unit);
}

QK_INLINE __m512i rounded(__m512 x, __m512 inverse) { return _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse)); }

QK_INLINE __m512 gather(__mmask16 mask, __m512i lanes, const float* from, int64_t stride) {
    const __m256 zero = _mm256_setzero_ps();
    const __m256 low = _mm512_mask_i64gather_ps(zero, static_cast<__mmask8>(mask), lanes, from, 4);
    const __m256 high = _mm512_mask_i64gather_ps(zero, static_cast<__mmask8>(mask >> 8), lanes, from + 8 * stride, 4);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

void pack(const ProductPackArgs& args, int64_t begin, int64_t end) {
    const int64_t panels = (args.columns + kWidth - 1) / kWidth;
    const __m512i lanes =
        _mm512_mullo_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64(args.column_stride));
    __m512 copy[kSegment];
    for (int64_t slice = begin; slice < end && slice * kDepth < args.K; ++slice) {
        const int64_t first = slice * kDepth;
        const int64_t depth = args.K - first < kDepth ? args.K - first : kDepth;
        for (int64_t i = 0; i < panels * kWide; ++i) {
            Panel* to = static_cast<Panel*>(args.panels) + slice * panels + i / kWide;
            const int64_t column = 16 * i, left = args.columns - column, v = i % kWide;
            const __mmask16 mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
            const float* from = args.b + first * args.row_stride + column * args.column_stride;
            for (int64_t segment = 0; segment < depth; segment += kSegment) {
                const int64_t count = depth - segment < kSegment ? depth - segment : kSegment;
                __m512i largest = _mm512_setzero_si512();
                __m512 squares = _mm512_setzero_ps();
                for (int64_t k = 0; k < count; ++k, from += args.row_stride) {
                    copy[k] = args.column_stride == 1 ? _mm512_maskz_loadu_ps(mask, from)
                                                      : gather(mask, lanes, from, args.column_stride);
                    largest = _mm512_max_epu32(largest, magnitude(copy[k]));
                    squares = _mm512_fmadd_ps(copy[k], copy[k], squares);
                }
                if (count % 2) copy[count] = _mm512_setzero_ps();
                __m512 inverse;
                to->unit[segment / kSegment][v] = unit_of(largest, squares, &inverse);
                for (int64_t k = 0; k < count; k += 2) {
                    const __m512i even = rounded(copy[k], inverse), odd = rounded(copy[k + 1], inverse);
                    to->pairs[(segment + k) / 2][v] =
                        _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
                }
            }
        }
    }
}

// Rows of a in their units.
struct Left {
    alignas(64) int16_t rows[kTall][kDepth];
    float unit[kSegments][kTall];

    void read(int r, const float* row, int64_t depth) {
        for (int64_t segment = 0; segment < depth; segment += kSegment) {
            const int64_t last = depth - segment < kSegment ? depth : segment + kSegment;
            __m512i largest = _mm512_setzero_si512();
            __m512 squares = _mm512_setzero_ps();
            for (int64_t k = segment; k < last; k += 16) {
                const __m512 x = _mm512_maskz_loadu_ps(rest(last - k), row + k);
                largest = _mm512_max_epu32(largest, magnitude(x));
                squares = _mm512_fmadd_ps(x, x, squares);
            }
            __m512 inverse;
            const __m512 of = unit_of(_mm512_set1_epi32(_mm512_reduce_max_epu32(largest)),
                                      _mm512_set1_ps(_mm512_reduce_add_ps(squares)), &inverse);
            unit[segment / kSegment][r] = _mm512_cvtss_f32(of);
            for (int64_t k = segment; k < last; k += 16) {
                const __m512i numbers = rounded(_mm512_maskz_loadu_ps(rest(last - k), row + k), inverse);
                _mm256_store_si256(reinterpret_cast<__m256i*>(rows[r] + k), _mm512_cvtepi32_epi16(numbers));
            }
        }
    }

    static __mmask16 rest(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1); }
};

QK_INLINE __m512i broadcast(const int16_t* at) {
    int32_t pair;
    memcpy(&pair, at, 4);
    return _mm512_set1_epi32(pair);
}

// The rows that come next, in shares: `lines` of each while one panel is done.
struct Ahead {
    const float* rows;  // or null
    int64_t stride;
    int64_t lines;
};

QK_INLINE void tile(const Left& left, const Panel& panel, int64_t pairs, const float* from, int64_t from_stride,
                    float* out, int64_t out_stride, int64_t rows, int64_t columns, const Ahead& ahead) {
    __m512 totals[kTall][kWide];
    QK_UNROLL for (int r = 0; r < kTall; ++r) {
        QK_UNROLL for (int v = 0; v < kWide; ++v) totals[r][v] = _mm512_setzero_ps();
    }
    int64_t k = 0;
    for (int64_t segment = 0; k < pairs; ++segment) {
        __m512i sums[kTall][kWide];
        QK_UNROLL for (int r = 0; r < kTall; ++r) {
            QK_UNROLL for (int v = 0; v < kWide; ++v) sums[r][v] = _mm512_setzero_si512();
        }
        const int64_t last = pairs - k < kSegment / 2 ? pairs : k + kSegment / 2;
        while (k < last) {
            const int64_t row = k / 8;
            if (row < kTall) {
                for (int64_t i = 0; ahead.rows && i < ahead.lines; ++i) {
                    __builtin_prefetch(ahead.rows + row * ahead.stride + 16 * i);
                }
                for (int64_t i = 0; from && i < kWidth; i += 16) __builtin_prefetch(from + row * from_stride + i);
            }
            for (const int64_t stop = last - k < 8 ? last : k + 8; k < stop; ++k) {
                __m512i right[kWide];
                QK_UNROLL for (int v = 0; v < kWide; ++v) right[v] = panel.pairs[k][v];
                QK_UNROLL for (int r = 0; r < kTall; ++r) {
                    const __m512i pair = broadcast(left.rows[r] + 2 * k);
                    QK_UNROLL for (int v = 0; v < kWide; ++v) {
                        sums[r][v] = _mm512_dpwssd_epi32(sums[r][v], right[v], pair);
                    }
                }
            }
        }
        QK_UNROLL for (int r = 0; r < kTall; ++r) {
            const __m512 unit = _mm512_set1_ps(left.unit[segment][r]);
            QK_UNROLL for (int v = 0; v < kWide; ++v) {
                // One unit after the other: their product may be too small for a float.
                const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][v]), unit);
                totals[r][v] = _mm512_fmadd_ps(sum, panel.unit[segment][v], totals[r][v]);
            }
        }
    }
    QK_UNROLL for (int v = 0; v < kWide; ++v) {
        const int64_t count = columns - v * 16;
        if (count <= 0) break;
        const __mmask16 mask = Left::rest(count);
        QK_UNROLL for (int r = 0; r < kTall; ++r) {
            if (r >= rows) break;
            __m512 before = _mm512_setzero_ps();
            if (from) before = _mm512_maskz_loadu_ps(mask, from + r * from_stride + v * 16);
            _mm512_mask_storeu_ps(out + r * out_stride + v * 16, mask, _mm512_add_ps(before, totals[r][v]));
        }
    }
}

void product(const ProductArgs& args, int64_t begin, int64_t end) {
    const int64_t panels = (args.columns + kWidth - 1) / kWidth;
    Left left{};
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
        const int64_t last = chunk + kChunk < end ? chunk + kChunk : end;
        for (int64_t first = 0; first < args.K || first == 0; first += kDepth) {
            const int64_t depth = args.K - first < kDepth ? args.K - first : kDepth;
            const Panel* slice = static_cast<const Panel*>(args.panels) + first / kDepth * panels;
            const int64_t lines = (depth / 16 + panels - 1) / (panels ? panels : 1);
            for (int64_t n = chunk; n < last; n += kTall) {
                const int64_t rows = last - n < kTall ? last - n : kTall;
                // A row beyond the matrix repeats the last one; its sums are not stored.
                for (int r = 0; r < kTall; ++r) {
                    left.read(r, args.a + (n + (r < rows ? r : rows - 1)) * args.a_stride + first, depth);
                }
                float* out = args.out + n * args.out_stride;
                const float* from = first ? out : args.base ? args.base + n * args.base_stride : nullptr;
                const int64_t stride = first ? args.out_stride : args.base_stride;
                for (int64_t p = 0; p < panels; ++p) {
                    const int64_t column = p * kWidth;
                    const bool more = n + 2 * kTall <= last && 16 * lines * (p + 1) <= depth;
                    const Ahead ahead{more ? args.a + (n + kTall) * args.a_stride + first + 16 * lines * p : nullptr,
                                      args.a_stride, lines};
                    tile(left, slice[p], (depth + 1) / 2, from ? from + column : nullptr, stride, out + column,
                         args.out_stride, rows, args.columns - column, ahead);
                }
            }
        }
    }
}

}  // namespace fixed
}  // namespace
