// compute int8 of up to kStreamRows rows of x, on tiers whose tile spans a panel: one pass over whole panels, in
// which the sums of all groups stay in registers and nothing about a block is written down.
#pragma once
#include "planes.h"

namespace {

constexpr int kStreamRows = 4;
constexpr bool kStreams = Isa::kRows * Isa::kVectors == qk::kPanelRows;

// Sums for every row of x and vector: a second set for a codebook's low plane, or where one chain would wait for
// itself.
template <Codes KIND, int MT>
constexpr int kSets = planes(KIND) == 2 || (MT == 1 && runs(KIND) > 1) ? 2 : 1;

template <Codes KIND, int MT>
QK_INLINE void add_products(const I* factors, const int8_t* x, int64_t x_stride, I* sums) {
    QK_UNROLL for (int m = 0; m < MT; ++m) {
        const I quad = Isa::load_quad(x + m * x_stride);
        QK_UNROLL for (int v = 0; v < Isa::kVectors; ++v) {
            I& sum = sums[m * Isa::kVectors + v];
            sum = Isa::template dot4<is_wide(KIND)>(sum, factors[v], quad);
        }
    }
}

// Run T of a superline and the following ones.
template <Codes KIND, int MT, int T>
QK_INLINE void stream_runs(const I (*lines)[3], const int8_t* x, int64_t x_stride, int64_t run, const I* tables, I* sums) {
    constexpr int NV = Isa::kVectors, kSums = MT * NV;
    I codes[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) codes[v] = codes_of<stored_bits(KIND), T>(lines[v]);
    if constexpr (planes(KIND) == 2) {
        I high[NV], low[NV];
        QK_UNROLL for (int v = 0; v < NV; ++v) high[v] = Isa::lookup_bytes(tables[0], codes[v]);
        QK_UNROLL for (int v = 0; v < NV; ++v) low[v] = Isa::lookup_bytes(tables[1], codes[v]);
        add_products<KIND, MT>(high, x + T * run, x_stride, sums);
        add_products<KIND, MT>(low, x + T * run, x_stride, sums + kSums);
    } else {
        add_products<KIND, MT>(codes, x + T * run, x_stride, sums + T % kSets<KIND, MT> * kSums);
    }
    if constexpr (T + 1 < runs(KIND)) stream_runs<KIND, MT, T + 1>(lines, x, x_stride, run, tables, sums);
}

// Vector: Isa, as a parameter because not every tier streams.
template <Codes KIND, int MT, class Vector = Isa>
void stream_panel(const qk::MatmulArgs& args, const Planes& planes_, int64_t panel, int64_t first_m,
                  float (*tile)[qk::kPanelRows]) {
    constexpr int NV = Isa::kVectors, kSums = MT * NV, kBits = stored_bits(KIND);
    constexpr int64_t kLine = 4 * qk::kPanelRows;
    const qk::PackedView& view = *args.view;
    const int64_t x_stride = view.padded_K, scale_step = Isa::kRows * scale_bytes(view.scale_dtype);
    const uint8_t* at = view.panels + panel * qk::kPanelRows * view.row_bytes;
    const int8_t* x = args.codes + first_m * x_stride;
    const float* x_scale = args.scales + first_m * view.blocks;
    const int32_t* x_sum = args.sums + first_m * view.blocks;
    const float factor = planes(KIND) == 2 ? 1.0f / 32767.0f : 1.0f;
    const I tables[2] = {Isa::load_table(planes_.bytes[0]), Isa::load_table(planes_.bytes[1])};
    F totals[kSums];
    QK_UNROLL for (int i = 0; i < kSums; ++i) totals[i] = Isa::splat_f(0.0f);
    for (int64_t g = 0; g < view.groups; ++g) {
        F scale[NV];
        QK_UNROLL for (int v = 0; v < NV; ++v) scale[v] = Isa::load_as_float(at + v * scale_step, view.scale_dtype);
        at += NV * scale_step;
        const uint8_t* const zeros = at;
        if (view.zero_kind == qk::ZeroKind::uint8) at += qk::kPanelRows;
        for (int64_t k = view.group_start[g]; k < view.group_start[g + 1]; k += qk::kBlockColumns) {
            const int64_t left = view.group_start[g + 1] - k;
            const int64_t padded = padded_columns(left < qk::kBlockColumns ? left : qk::kBlockColumns, kBits);
            I sums[kSets<KIND, MT> * kSums];
            QK_UNROLL for (int i = 0; i < kSets<KIND, MT> * kSums; ++i) sums[i] = Isa::splat(0);
            if (view.zero_kind == qk::ZeroKind::uint8) {
                QK_UNROLL for (int i = 0; i < kSums; ++i) {
                    const I zero = Vector::load_bytes(zeros + i % NV * Isa::kRows);
                    sums[i] = Isa::mul(zero, Isa::splat(-x_sum[i / NV * view.blocks]));
                }
            } else {
                constexpr int32_t kMidpoint = planes(KIND) == 2 ? 128 : 1 << (kBits - 1);
                QK_UNROLL for (int i = 0; i < kSums; ++i) sums[i] = Isa::splat(-kMidpoint * x_sum[i / NV * view.blocks]);
            }
            const int64_t count = padded / (4 * runs(KIND));
            for (int64_t j = 0; j < count; ++j, at += kLines<kBits> * kLine) {
                I lines[NV][3];
                QK_UNROLL for (int v = 0; v < NV; ++v) load_lines<kBits>(at + v * 4 * Isa::kRows, kLine, lines[v]);
                fetch<kLines<kBits> * NV>({at, kLines<kBits> * kLine}, 0);
                stream_runs<KIND, MT, 0>(lines, x + 4 * j, x_stride, 4 * count, tables, sums);
            }
            QK_UNROLL for (int i = 0; i < kSums; ++i) {
                if (planes(KIND) == 2) sums[i] = Isa::mul(sums[i], Isa::splat(256));
                if (kSets<KIND, MT> == 2) sums[i] = Vector::add_i(sums[i], sums[kSums + i]);
                const F both = Isa::mul_f(scale[i % NV], Isa::splat_f(x_scale[i / NV * view.blocks] * factor));
                totals[i] = Isa::fma(Isa::to_float(sums[i]), both, totals[i]);
            }
            x += padded;
            ++x_scale;
            ++x_sum;
        }
    }
    QK_UNROLL for (int i = 0; i < kSums; ++i) Isa::store_f(tile[i / NV] + i % NV * Isa::kRows, totals[i]);
}

template <Codes KIND>
void stream_rows(const qk::MatmulArgs& args, const Planes& planes_, int64_t panel, int64_t first_m, int64_t M,
                 float (*tile)[qk::kPanelRows]) {
    switch (M) {
        case 1: return stream_panel<KIND, 1>(args, planes_, panel, first_m, tile);
        case 2: return stream_panel<KIND, 2>(args, planes_, panel, first_m, tile);
        case 3: return stream_panel<KIND, 3>(args, planes_, panel, first_m, tile);
        default: return stream_panel<KIND, 4>(args, planes_, panel, first_m, tile);
    }
}

}  // namespace
