// compute float of a few rows of x on the int8 dot product. Every block of x is cut into int8 digits,
//
//   x = 2^e * (d_0 + 256 * d_1 + ...),   4 digits of f32, 3 of f16 and bf16,
//
// each digit is a row of int8 activations for run_int8, whose sums are exact, and the rows are added. Values
// within 2^-7 of the largest of their block (f16: 2^-12, bf16: 2^-15) are held exactly, smaller ones to 2^-31
// of it (2^-23): far below what f32 sums of such products round. Codebooks are not integers and are not for here.
#pragma once
#include "int8.h"
#include "../quantize_activations/chunk.h"

namespace {

// One block: n values, zero up to `padded`. Digits of row d go to codes + d * stride.
inline void split_block(float* x, int64_t n, int64_t padded, int digits, int8_t* codes, int64_t stride, float* scales,
                        int32_t* sums, int64_t blocks) {
    for (int64_t i = n; i < round_up(padded, Isa::kRows); ++i) x[i] = 0.0f;
    const int32_t largest = amax_bits(x, n, 0);
    if (largest >= 0x7f800000) {  // Inf or NaN: the scale carries it to every output of the row
        for (int d = 0; d < digits; ++d) {
            memset(codes + d * stride, 0, static_cast<size_t>(padded));
            scales[d * blocks] = 0.0f;
            sums[d * blocks] = 0;
        }
        scales[0] = float_of(static_cast<uint32_t>(largest));
        sums[0] = quantize_chunk(x, n, scales[0], codes);
        return;
    }
    // |x| < 2^exponent, and |x| * 2^(top - exponent) fits the digits. What is below 2^-127 counts as zero.
    const int top = 8 * digits - 2;
    int exponent = (largest >> 23) - 126;
    exponent = exponent < top - 126 ? top - 126 : exponent;  // the smallest scale is a normal number
    const F factor = Isa::splat_f(float_of(static_cast<uint32_t>(127 + top - exponent) << 23));
    I total[4] = {Isa::splat(0), Isa::splat(0), Isa::splat(0), Isa::splat(0)};
    for (int64_t i = 0; i < padded; i += Isa::kRows) {
        const __mmask16 inside = static_cast<__mmask16>(padded - i < Isa::kRows ? (1 << (padded - i)) - 1 : 0xffff);
        I q = _mm512_cvtps_epi32(Isa::mul_f(Isa::load_f(x + i), factor));
        for (int d = 0; d < digits; ++d) {
            const I rest = _mm512_srai_epi32(_mm512_add_epi32(q, Isa::splat(128)), 8);
            _mm512_mask_cvtepi32_storeu_epi8(codes + d * stride + i, inside, q);
            total[d] = _mm512_add_epi32(total[d], Isa::sub(q, _mm512_slli_epi32(rest, 8)));
            q = rest;
        }
    }
    for (int d = 0; d < digits; ++d) {
        scales[d * blocks] = float_of(static_cast<uint32_t>(127 + exponent - top + 8 * d) << 23);
        sums[d * blocks] = _mm512_reduce_add_epi32(total[d]);
    }
}

// args.codes, scales and sums hold args.digits rows for every row of x.
void prepare_digits(const qk::PrepareArgs& args, int64_t begin, int64_t end) {
    const qk::PackedView& view = *args.view;
    alignas(64) float chunk[kChunk + Isa::kRows];
    for (int64_t row = begin; row < end; ++row) {
        const void* x = static_cast<const char*>(args.x) + row * args.row_stride * dtype_size(args.dtype);
        int8_t* codes = args.codes + row * args.digits * view.padded_K;
        int64_t block = row * args.digits * view.blocks;
        for (int64_t g = 0; g < view.groups; ++g) {
            const int64_t last = view.group_start[g + 1];
            for (int64_t k = view.group_start[g]; k < last; k += kChunk, ++block) {
                const int64_t n = last - k < kChunk ? last - k : kChunk;
                const int64_t padded = padded_columns(n, view.bits);
                if (view.permutation) {
                    gather_chunk(x, args.dtype, view.permutation + k, n, chunk);
                } else {
                    load_chunk(x, args.dtype, k, n, chunk);
                }
                split_block(chunk, n, padded, args.digits, codes, view.padded_K, args.scales + block, args.sums + block,
                            view.blocks);
                codes += padded;
            }
        }
    }
}

// One tile a panel: args.M * args.digits is at most kMatmulRows.
void run_digits(const qk::MatmulArgs& args, int64_t begin, int64_t end) {
    alignas(64) float rows[qk::kMatmulRows][qk::kPanelRows];
    qk::PackedView panel_view = *args.view;
    qk::MatmulArgs int8 = args;
    int8.view = &panel_view;
    int8.M = args.M * args.digits;
    int8.out = rows;
    int8.out_dtype = qk::DType::f32;
    int8.out_stride = qk::kPanelRows;
    int8.bias = nullptr;
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t R = panel_rows(*args.view, panel);
        panel_view.panels = args.view->panels + panel * qk::kPanelRows * args.view->row_bytes;
        panel_view.N = R;
        run_int8(int8, 0, 0, int8.M);
        for (int64_t m = 0; m < args.M; ++m) {
            for (int64_t r = 0; r < R; r += Isa::kRows) {
                F sum = Isa::load_f(rows[m * args.digits] + r);
                for (int64_t d = 1; d < args.digits; ++d) sum = Isa::add(sum, Isa::load_f(rows[m * args.digits + d] + r));
                Isa::store_f(rows[m] + r, sum);
            }
        }
        store_tile(args, panel, 0, args.M, R, rows);
    }
}

}  // namespace
