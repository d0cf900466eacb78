// fp32 products for GPTQ: out = base + a @ b. README.md beside this file has the blocking. A tier's file includes
// its lanes header, defines kTall (rows of a tile) and kWide (Lanes side by side), then includes this.
#pragma once
#include "qkern/kernels.h"
#include "qkern/unroll.h"

namespace {

using namespace qk;

constexpr int64_t kDepth = kProductDepth;
constexpr int64_t kWidth = kWide * kLanes;
// Of the next tile's rows, while one panel is done: all of their kDepth by the time that 128 columns are.
constexpr int64_t kAhead = 2 * kWidth;
// Rows for which a slice of b is fetched once. Their results may leave L2 while the depth advances; b costs more.
constexpr int64_t kChunk = 64 * kTall;

// Slices [begin, end) of kDepth rows of b each: panels of kWidth columns, [panel][k][kWidth], filled with zeros.
void pack_product(const ProductPackArgs& args, int64_t begin, int64_t end) {
    const int64_t padded = (args.columns + kWidth - 1) / kWidth * kWidth;
    for (int64_t first = begin * kDepth; first < end * kDepth && first < args.K; first += kDepth) {
        const int64_t depth = args.K - first < kDepth ? args.K - first : kDepth;
        float* to = static_cast<float*>(args.panels) + first * padded;
        const float* from = args.b + first * args.row_stride;
        for (int64_t column = 0; column < padded; column += kWidth, to += depth * kWidth) {
            const int64_t width = args.columns - column < kWidth ? args.columns - column : kWidth;
            const float* corner = from + column * args.column_stride;
            if (width < kWidth) {
                for (int64_t i = 0; i < depth * kWidth; ++i) to[i] = 0.0f;
            }
            if (args.column_stride == 1 && width == kWidth) {
                for (int64_t k = 0; k < depth; ++k) {
                    for (int64_t i = 0; i < kWidth; i += kLanes) {
                        store(to + k * kWidth + i, load(corner + k * args.row_stride + i));
                    }
                }
            } else {
                for (int64_t j = 0; j < width; ++j) {
                    const float* column_of = corner + j * args.column_stride;
                    for (int64_t k = 0; k < depth; ++k) to[k * kWidth + j] = column_of[k * args.row_stride];
                }
            }
        }
    }
}

QK_INLINE void prefetch(const float* at) {
#if !defined(_MSC_VER)
    __builtin_prefetch(at);
#else
    (void)at;
#endif
}

// One tile: `from` (or zero) plus a [kTall][kDepth] @ b [depth][kWidth]. What comes next has the time of this tile
// to come from memory: the old results, and the rows at `next` (or null).
QK_INLINE void tile(const float* a, const float* b, int64_t depth, const float* from, int64_t from_stride, float* out,
                    int64_t out_stride, int64_t rows, int64_t columns, const float* next, int64_t next_stride) {
    Lanes sums[kTall][kWide];
    QK_UNROLL for (int r = 0; r < kTall; ++r) {
        QK_UNROLL for (int v = 0; v < kWide; ++v) sums[r][v] = splat(0.0f);
    }
    for (int64_t strip = 0; strip < depth; strip += kLanes) {
        const int64_t row = strip / kLanes;
        if (row < kTall) {
            for (int64_t i = 0; next && i < kAhead; i += kLanes) prefetch(next + row * next_stride + i);
            for (int64_t i = 0; from && i < kWidth; i += kLanes) prefetch(from + row * from_stride + i);
        }
        const int64_t last = depth - strip < kLanes ? depth : strip + kLanes;
        for (int64_t k = strip; k < last; ++k) {
            Lanes right[kWide];
            QK_UNROLL for (int v = 0; v < kWide; ++v) right[v] = load(b + k * kWidth + v * kLanes);
            QK_UNROLL for (int r = 0; r < kTall; ++r) {
                const Lanes left = splat(a[r * kDepth + k]);
                QK_UNROLL for (int v = 0; v < kWide; ++v) sums[r][v] = mul_add(left, right[v], sums[r][v]);
            }
        }
    }
    QK_UNROLL for (int r = 0; r < kTall; ++r) {
        if (r >= rows) break;
        QK_UNROLL for (int v = 0; v < kWide; ++v) {
            const int64_t column = v * kLanes;
            const int64_t count = columns - column;
            if (count <= 0) break;
            const Lanes before =
                from ? load_some<DType::f32>(from, r * from_stride + column, count) : splat(0.0f);
            store_some<DType::f32>(out, r * out_stride + column, count, add(before, sums[r][v]));
        }
    }
}

void product(const ProductArgs& args, int64_t begin, int64_t end) {
    const int64_t padded = (args.columns + kWidth - 1) / kWidth * kWidth;
    alignas(64) float left[kTall * kDepth];
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
        const int64_t last = chunk + kChunk < end ? chunk + kChunk : end;
        for (int64_t first = 0; first < args.K || first == 0; first += kDepth) {
            const int64_t depth = args.K - first < kDepth ? args.K - first : kDepth;
            const float* panels = static_cast<const float*>(args.panels) + first * padded;
            for (int64_t n = chunk; n < last; n += kTall) {
                const int64_t rows = last - n < kTall ? last - n : kTall;
                for (int64_t r = 0; r < kTall; ++r) {
                    // A row beyond the matrix repeats the last one; its sums are not stored.
                    const float* row = args.a + (n + (r < rows ? r : rows - 1)) * args.a_stride + first;
                    int64_t k = 0;
                    for (; k + kLanes <= depth; k += kLanes) store(left + r * kDepth + k, load(row + k));
                    for (; k < depth; ++k) left[r * kDepth + k] = row[k];
                }
                float* out = args.out + n * args.out_stride;
                const float* from = first ? out : args.base ? args.base + n * args.base_stride : nullptr;
                const int64_t stride = first ? args.out_stride : args.base_stride;
                for (int64_t column = 0; column < args.columns; column += kWidth) {
                    const int64_t ahead = (n + kTall) * args.a_stride + first + 2 * column;
                    tile(left, panels + column * depth, depth, from ? from + column : nullptr, stride, out + column,
                         args.out_stride, rows, args.columns - column,
                         n + 2 * kTall <= last && 2 * column + kAhead <= depth ? args.a + ahead : nullptr,
                         args.a_stride);
                }
            }
        }
    }
}

void enter_product(qk::KernelTable* table) {
    const int64_t bytes = kDepth * kWidth * static_cast<int64_t>(sizeof(float));
    table->product = {&pack_product, &product, static_cast<int>(kWidth), kTall, bytes};
}

}  // namespace
