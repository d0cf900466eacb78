// int8_matmul, the same on every tier: exact int32 sums of a panel of 64 output columns by up to kMatmulRows
// rows of x, then one scaling. Isa, defined by the including file, is the tier's integer vector:
//
//   kRows      rows of the weight in a vector (32-bit lanes)
//   kVectors   vectors of a register tile: kRows * kVectors output columns
//   kTileM     rows of x of a register tile
//   kBias      what load_codes takes off a code
//   X          a prepared activation; place() writes quads of them
//   I, Codes, Quad   sums, codes of one quad of columns, four activations in every lane; dot() multiplies,
//              zero() and add() are of sums
#pragma once
#include "../quantize_activations/chunk.h"
#include "qkern/kernels.h"
#include "qkern/packed_weight.h"
#include "qkern/unroll.h"

namespace {

using I = Isa::I;
using X = Isa::X;

// Columns between two visits of the sums in memory: their codes, 64 KB, stay in the second-level cache while
// every row of x passes, however long K is.
constexpr int64_t kStep = 1024;

// ---- activations --------------------------------------------------------------------------------------

void prepare_int8(const qk::Int8PrepareArgs& args, int64_t begin, int64_t end) {
    const int64_t segments = (args.K + args.segment - 1) / args.segment;
    float values[kChunk];
    int8_t codes[kChunk];
    for (int64_t row = begin; row < end; ++row) {
        const int64_t start = row * args.row_stride;
        X* quads = reinterpret_cast<X*>(args.quads + row * args.quads_stride);
        float scale = 0.0f;
        if (args.scales) {
            int32_t largest = 0;
            for (int64_t k = 0; k < args.K; k += kChunk) {
                const int64_t n = args.K - k < kChunk ? args.K - k : kChunk;
                load_chunk(args.x, args.dtype, start + k, n, values);
                largest = amax_bits(values, n, largest);
            }
            scale = activation_scale(largest);
            args.scales[row] = scale;
        }
        int32_t sum = 0;
        for (int64_t k = 0; k < args.K; k += kChunk) {
            const int64_t n = args.K - k < kChunk ? args.K - k : kChunk;
            const int8_t* from = codes;
            if (args.scales) {
                load_chunk(args.x, args.dtype, start + k, n, values);
                sum += quantize_chunk(values, n, scale, codes);
            } else if (args.codes) {
                from = args.codes + start + k;
                for (int64_t i = 0; i < n; ++i) sum += from[i];
                if (n % 4 != 0) from = static_cast<const int8_t*>(memcpy(codes, from, static_cast<size_t>(n)));
            } else {
                memset(codes, 1, sizeof codes);
            }
            for (int64_t i = n; i < round_up(n, 4); ++i) codes[i] = 0;
            Isa::place(from, round_up(n, 4), quads + k);
            if (args.sums && (k + n == args.K || (k + kChunk) % args.segment == 0)) {
                args.sums[row * segments + k / args.segment] = sum;
                sum = 0;
            }
        }
    }
}

// ---- sums ---------------------------------------------------------------------------------------------

// Sums are [rows of x][kPanelRows]; where vector i of a tile is in them.
template <int NV>
constexpr int64_t tile_at(int i) {
    return i / NV * qk::kPanelRows + i % NV * Isa::kRows;
}

// sums += codes * x over some quads of columns: MT rows of x by NV vectors of rows of the weight, PARTS equal parts
// of the columns side by side, each with sums of its own.
template <int MT, int PARTS, int NV>
QK_INLINE void micro(const uint8_t* codes, int64_t line, int64_t quads, const char* x, int64_t x_stride,
                     int32_t* sums) {
    constexpr int kTile = MT * NV;
    int64_t left = quads / PARTS;
    const int64_t codes_part = left * line, x_part = left * 4 * static_cast<int64_t>(sizeof(X));
    I tile[PARTS * kTile];
    QK_UNROLL for (int i = 0; i < PARTS * kTile; ++i) {
        tile[i] = i < kTile ? Isa::load(sums + tile_at<NV>(i)) : Isa::zero();
    }
    do {
        QK_UNROLL for (int p = 0; p < PARTS; ++p) {
            typename Isa::Quad quad_of[MT];
            QK_UNROLL for (int m = 0; m < MT; ++m) {
                quad_of[m] = Isa::load_quad(reinterpret_cast<const X*>(x + p * x_part + m * x_stride));
            }
            QK_UNROLL for (int v = 0; v < NV; ++v) {
                const typename Isa::Codes w = Isa::load_codes(codes + p * codes_part + v * 4 * Isa::kRows);
                QK_UNROLL for (int m = 0; m < MT; ++m) {
                    I& sum = tile[p * kTile + m * NV + v];
                    sum = Isa::dot(sum, w, quad_of[m]);
                }
            }
        }
        codes += line;
        x += 4 * sizeof(X);
    } while (--left > 0);
    QK_UNROLL for (int i = 0; i < kTile; ++i) {
        QK_UNROLL for (int p = 1; p < PARTS; ++p) tile[i] = Isa::add(tile[i], tile[p * kTile + i]);
        Isa::store(sums + tile_at<NV>(i), tile[i]);
    }
}

// MT rows of x by a panel.
template <int MT, int PARTS>
inline void add_tile(const uint8_t* codes, int64_t R, int64_t quads, const char* x, int64_t x_stride, int32_t* sums) {
    constexpr int kNarrow = 1, kWide = Isa::kVectors;
    const int64_t whole = quads - quads % PARTS;
    if (whole > 0) {
        int64_t r = 0;
        for (; r + Isa::kRows * kWide <= R; r += Isa::kRows * kWide) {
            micro<MT, PARTS, kWide>(codes + 4 * r, 4 * R, whole, x, x_stride, sums + r);
        }
        for (; r < R; r += Isa::kRows) {
            micro<MT, PARTS, kNarrow>(codes + 4 * r, 4 * R, whole, x, x_stride, sums + r);
        }
    }
    if constexpr (PARTS > 1) {
        if (whole < quads) {
            add_tile<MT, 1>(codes + whole * 4 * R, R, quads - whole, x + whole * 4 * sizeof(X), x_stride, sums);
        }
    }
}

template <int MT>
inline void add_rows(const uint8_t* codes, int64_t R, int64_t quads, const char* x, int64_t x_stride, int64_t M,
                     int32_t* sums) {
    for (; M >= MT; M -= MT) {
        add_tile<MT, 1>(codes, R, quads, x, x_stride, sums);
        x += MT * x_stride;
        sums += MT * qk::kPanelRows;
    }
    if constexpr (MT > 1) {
        if (M > 0) add_rows<MT - 1>(codes, R, quads, x, x_stride, M, sums);
    }
}

// Few rows of x wait for memory, which delivers more to several sequences than to one.
constexpr int64_t kFewRows = Isa::kTileM / 2 < 3 ? Isa::kTileM / 2 : 3;

template <int MT>
inline void add_few(const uint8_t* codes, int64_t R, int64_t quads, const char* x, int64_t x_stride, int64_t M,
                    int32_t* sums) {
    if constexpr (MT <= kFewRows) {
        if (M == MT) return add_tile<MT, Isa::kTileM / MT>(codes, R, quads, x, x_stride, sums);
        add_few<MT + 1>(codes, R, quads, x, x_stride, M, sums);
    }
}

// ---- a tile -------------------------------------------------------------------------------------------

// What a panel's rows have of their own.
struct PanelHead {
    float scale[qk::kPanelRows];
    float offset[qk::kPanelRows];  // ZeroKind::offsets
    uint32_t zero[qk::kPanelRows]; // less kBias; modulo 2^32 as all sums
    float bias[qk::kPanelRows];
};

inline void load_as_floats(const uint8_t* from, qk::DType dtype, int64_t R, float* to) {
    for (int64_t r = 0; r < R; r += kLanes) {
        if (dtype == qk::DType::f32) {
            store(to + r, load_lanes<qk::DType::f32>(from, r));
        } else if (dtype == qk::DType::f16) {
            store(to + r, load_lanes<qk::DType::f16>(from, r));
        } else {
            store(to + r, load_lanes<qk::DType::bf16>(from, r));
        }
    }
}

// Returns the address of the panel's codes.
inline const uint8_t* load_panel(const qk::Int8MatmulArgs& args, int64_t panel, int64_t R, PanelHead* head) {
    const qk::PackedView& view = *args.view;
    const uint8_t* at = view.panels + panel * qk::kPanelRows * view.row_bytes;
    load_as_floats(at, view.scale_dtype, R, head->scale);
    at += R * scale_bytes(view.scale_dtype);
    const uint32_t zero = (view.zero_kind == qk::ZeroKind::midpoint ? 128u : 0u) - static_cast<uint32_t>(Isa::kBias);
    for (int64_t r = 0; r < R; ++r) head->zero[r] = zero;
    if (view.zero_kind == qk::ZeroKind::uint8) {
        for (int64_t r = 0; r < R; ++r) head->zero[r] += at[r];
        at += R;
    } else if (view.zero_kind == qk::ZeroKind::offsets) {
        load_as_floats(at, view.scale_dtype, R, head->offset);
        at += R * scale_bytes(view.scale_dtype);
    }
    const int64_t column = panel * qk::kPanelRows;
    for (int64_t r = 0; r < R; ++r) {
        const bool real = args.bias && column + r < view.N;
        head->bias[r] = real ? load_float(args.bias, args.bias_dtype, column + r) : 0.0f;
    }
    return at;
}

template <qk::DType D>
inline void store_row(const qk::Int8MatmulArgs& args, const PanelHead& head, int64_t m, float shift, int64_t column,
                      int64_t N, const float* totals) {
    const Lanes x_scale = splat(args.scales[m]);
    for (int64_t r = 0; r < N; r += kLanes) {
        Lanes y = mul(load(totals + r), mul(load(head.scale + r), x_scale));
        if (args.view->zero_kind == qk::ZeroKind::offsets) {
            y = add(y, mul(mul(load(head.offset + r), x_scale), splat(shift)));
        }
        if (args.bias) y = add(y, load(head.bias + r));
        store_some<D>(args.out, m * args.out_stride + column + r, N - r, y);
    }
}

void multiply_tile(const qk::Int8MatmulArgs& args, int64_t panel, int64_t first_m, int64_t M) {
    const qk::PackedView& view = *args.view;
    const int64_t R = panel_rows(view, panel), K = view.K, column = panel * qk::kPanelRows;
    const int64_t N = view.N - column < R ? view.N - column : R;
    const int64_t segments = (K + args.segment - 1) / args.segment;
    alignas(64) int32_t sums[qk::kMatmulRows + 1][qk::kPanelRows];  // row M: sums of the codes themselves
    alignas(64) float totals[qk::kMatmulRows][qk::kPanelRows];
    PanelHead head;
    const uint8_t* codes = load_panel(args, panel, R, &head);
    const char* x = args.quads + first_m * args.quads_stride;
    // K = 0 has a segment of no columns, whose sums are 0.
    for (int64_t s = 0; s < segments || s == 0; ++s) {
        const int64_t first = s * args.segment;
        const int64_t last = K - first < args.segment ? K : first + args.segment;
        const auto columns = static_cast<uint32_t>(last - first);
        // sum (q - z) (a - x_zero), term by term and all modulo 2^32: the result fits, what comes before need not.
        for (int64_t m = 0; m < M; ++m) {
            const auto x_sum = K > 0 ? static_cast<uint32_t>(args.sums[(first_m + m) * segments + s]) : 0u;
            const auto x_zero = args.zeros ? static_cast<uint32_t>(args.zeros[first_m + m]) : 0u;
            const uint32_t factor = x_zero * columns - x_sum;
            for (int64_t r = 0; r < R; ++r) sums[m][r] = static_cast<int32_t>(head.zero[r] * factor);
        }
        if (args.zeros) memset(sums[M], 0, sizeof sums[M]);
        // The row of ones follows the last row of x.
        const bool joined = args.zeros && x + M * args.quads_stride == args.ones;
        const int64_t rows = joined ? M + 1 : M;
        const int64_t step = rows <= kFewRows ? last - first : kStep;
        for (int64_t k = first; k < last; k += step) {
            const int64_t quads = ((last - k < step ? last - k : step) + 3) / 4;
            const int64_t at = k * static_cast<int64_t>(sizeof(X));
            if (rows <= kFewRows) {
                add_few<1>(codes + k * R, R, quads, x + at, args.quads_stride, rows, sums[0]);
            } else {
                add_rows<Isa::kTileM>(codes + k * R, R, quads, x + at, args.quads_stride, rows, sums[0]);
            }
            if (args.zeros && !joined) add_tile<1, 1>(codes + k * R, R, quads, args.ones + at, 0, sums[M]);
        }
        for (int64_t m = 0; m < M; ++m) {
            if (args.zeros) {
                const auto x_zero = static_cast<uint32_t>(args.zeros[first_m + m]);
                for (int64_t r = 0; r < R; ++r) {
                    const uint32_t product = x_zero * static_cast<uint32_t>(sums[M][r]);
                    sums[m][r] = static_cast<int32_t>(static_cast<uint32_t>(sums[m][r]) - product);
                }
            }
            if (s == 0) {
                for (int64_t r = 0; r < R; ++r) totals[m][r] = static_cast<float>(sums[m][r]);
            } else {
                for (int64_t r = 0; r < R; ++r) totals[m][r] += static_cast<float>(sums[m][r]);
            }
        }
    }
    for (int64_t m = 0; m < M; ++m) {
        const int64_t row = first_m + m;
        if (args.int_out) {
            memcpy(args.int_out + row * args.out_stride + column, sums[m], static_cast<size_t>(4 * N));
            continue;
        }
        float shift = 0.0f;
        if (view.zero_kind == qk::ZeroKind::offsets) {
            int64_t total = args.zeros ? -K * args.zeros[row] : 0;
            for (int64_t s = 0; s < segments; ++s) total += args.sums[row * segments + s];
            shift = static_cast<float>(total);
        }
        switch (args.out_dtype) {
            case qk::DType::f32: store_row<qk::DType::f32>(args, head, row, shift, column, N, totals[m]); break;
            case qk::DType::f16: store_row<qk::DType::f16>(args, head, row, shift, column, N, totals[m]); break;
            case qk::DType::bf16: store_row<qk::DType::bf16>(args, head, row, shift, column, N, totals[m]); break;
        }
    }
}

void multiply_int8(const qk::Int8MatmulArgs& args, int64_t begin, int64_t end) {
    const int64_t panels = args.view->panel_count, chunk = qk::matmul_chunk_rows(args.M);
    for (int64_t t = begin; t < end; ++t) {
        const int64_t first_m = t / panels * chunk;
        const int64_t M = args.M - first_m < chunk ? args.M - first_m : chunk;
        multiply_tile(args, t % panels, first_m, M);
    }
}

}  // namespace
