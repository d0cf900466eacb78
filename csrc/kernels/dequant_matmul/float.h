// compute float: f32 products of the activations and the exact integers q - z (or the table's values, or
// q * s + m), summed over a block and then scaled; and the same weights written out as floats.
#pragma once
#include "panels.h"

namespace {

// difference: q - z, scaled after the block; affine: q * s + m; table: table[q], scaled after the block.
enum class Mode { difference, affine, table };

template <int BITS, Mode MODE, int BYTE>
QK_INLINE F weight_of(I codes, F zero, F scale, Isa::Table table) {
    if constexpr (MODE == Mode::table) return Isa::template lookup_floats<BYTE>(table, codes);
    const F q = Isa::to_float(Isa::template byte<BYTE>(codes));
    if constexpr (MODE == Mode::affine) return Isa::fma(q, scale, zero);
    return Isa::sub_f(q, zero);
}

// Products in one chain of f32 sums. The error of a sum grows with the root of its chain: 32, then 4 in a
// block, then the blocks keep it at the level of a library's dot product, which sums in many lanes.
constexpr int64_t kChain = 32;

struct BlockFloat {
    const uint8_t* codes;
    int64_t line;
    int64_t padded;
    const float* x;  // [M, x_stride]
    int64_t x_stride;
    const GroupHead* head;
    const float* table;  // [16]
    float (*tile)[qk::kPanelRows];
};

// The values of a code as a table of 16: the codebook, or q - midpoint, repeated below 4 bits. Looking a
// small integer up costs less than masking, converting and subtracting.
inline const float* table_of(const qk::PackedView& view, float (&values)[16]) {
    if (view.zero_kind == qk::ZeroKind::codebook) return view.table;
    const int levels = 1 << (view.bits < 4 ? view.bits : 4);
    for (int q = 0; q < 16; ++q) values[q] = static_cast<float>(q % levels - levels / 2);
    return values;
}

// The vector that weight_of subtracts or adds.
template <Mode MODE>
QK_INLINE F zero_of(const GroupHead& head, int64_t r) {
    if constexpr (MODE == Mode::affine) return Isa::load_f(head.offset + r);
    return Isa::to_float(Isa::load_i(head.zero + r));
}

template <int BITS, Mode MODE, int MT, int NV, int T, int BYTE>
QK_INLINE void float_step(const float* x, int64_t x_stride, int64_t quads, const I* codes, const F* zero,
                       const F* scale, Isa::Table table, F* sums) {
    F weight[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) weight[v] = weight_of<BITS, MODE, BYTE>(codes[v], zero[v], scale[v], table);
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
        sums[i] = Isa::fma(weight[i % NV], Isa::splat_f(x[i / NV * x_stride + 4 * T * quads + BYTE]), sums[i]);
    }
    if constexpr (BYTE < 3) {
        float_step<BITS, MODE, MT, NV, T, BYTE + 1>(x, x_stride, quads, codes, zero, scale, table, sums);
    }
}

template <int BITS, Mode MODE, int MT, int NV, int T>
QK_INLINE void float_run(const float* x, int64_t x_stride, int64_t quads, const I (*lines)[3], const F* zero,
                      const F* scale, Isa::Table table, F* sums) {
    I codes[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) codes[v] = codes_of<BITS, T>(lines[v]);
    float_step<BITS, MODE, MT, NV, T, 0>(x, x_stride, quads, codes, zero, scale, table, sums);
    if constexpr (T + 1 < (BITS == 3 ? 8 : 8 / BITS)) {
        float_run<BITS, MODE, MT, NV, T + 1>(x, x_stride, quads, lines, zero, scale, table, sums);
    }
}

template <int BITS, Mode MODE, int MT, int NV>
QK_INLINE void micro_float(const BlockFloat& b, int64_t r, int64_t m0) {
    F totals[MT * NV], zero[NV], scale[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) {
        zero[v] = zero_of<MODE>(*b.head, r + v * Isa::kRows);
        scale[v] = Isa::load_f(b.head->scale + r + v * Isa::kRows);
    }
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) totals[i] = Isa::splat_f(0.0f);
    const Isa::Table table = Isa::load_float_table(b.table);
    const int64_t quads = b.padded / (4 * superline_steps(BITS));
    const uint8_t* codes = b.codes + 4 * r;
    const float* x = b.x + m0 * b.x_stride;
    int64_t j = 0;
    do {  // a block is never empty
        const int64_t stop = j + kChain / (4 * superline_steps(BITS)) < quads ? j + kChain / (4 * superline_steps(BITS)) : quads;
        F sums[MT * NV];
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) sums[i] = Isa::splat_f(0.0f);
        do {
            I lines[NV][3];
            QK_UNROLL for (int v = 0; v < NV; ++v) load_lines<BITS>(codes + v * 4 * Isa::kRows, b.line, lines[v]);
            float_run<BITS, MODE, MT, NV, 0>(x + 4 * j, b.x_stride, quads, lines, zero, scale, table, sums);
            codes += kLines<BITS> * b.line;
        } while (++j < stop);
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) totals[i] = Isa::add(totals[i], sums[i]);
    } while (j < quads);
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
        float* out = b.tile[m0 + i / NV] + r + i % NV * Isa::kRows;
        const F before = Isa::load_f(out);
        Isa::store_f(out, MODE == Mode::affine ? Isa::add(before, totals[i]) : Isa::fma(totals[i], scale[i % NV], before));
    }
}

template <int BITS, Mode MODE, int MT>
inline void micro_rows_float(const BlockFloat& b, int64_t R, int64_t m0) {
    int64_t r = 0;
    constexpr int64_t kStep = Isa::kRows * Isa::kVectors;
    for (; r + kStep <= R; r += kStep) micro_float<BITS, MODE, MT, Isa::kVectors>(b, r, m0);
    for (; r < R; r += Isa::kRows) micro_float<BITS, MODE, MT, 1>(b, r, m0);
}

template <int BITS, Mode MODE>
inline void product_float(const BlockFloat& b, int64_t R, int64_t M) {
    int64_t m = 0;
    for (; m + Isa::kFloatM <= M; m += Isa::kFloatM) micro_rows_float<BITS, MODE, Isa::kFloatM>(b, R, m);
    for (; m < M; ++m) micro_rows_float<BITS, MODE, 1>(b, R, m);
}

template <int BITS, Mode MODE, int T, int BYTE>
QK_INLINE void decode_step(const qk::DecodeArgs& args, int64_t quads, int64_t j, const I* lines, F zero, F scale,
                        Isa::Table table, int64_t k, int64_t columns, int64_t column) {
    const int64_t i = 4 * (T * quads + j) + BYTE;
    if (i < columns) {
        F weight = weight_of<BITS, MODE, BYTE>(codes_of<BITS, T>(lines), zero, scale, table);
        if (MODE != Mode::affine) weight = Isa::mul_f(weight, scale);
        const int64_t row = args.view->permutation ? args.view->permutation[k + i] : k + i;
        char* out = static_cast<char*>(args.out) + (row * args.out_stride + column) * dtype_size(args.dtype);
        Isa::store_as(out, args.dtype, weight);
    }
    if constexpr (BYTE < 3) {
        decode_step<BITS, MODE, T, BYTE + 1>(args, quads, j, lines, zero, scale, table, k, columns, column);
    } else if constexpr (T + 1 < (BITS == 3 ? 8 : 8 / BITS)) {
        decode_step<BITS, MODE, T + 1, 0>(args, quads, j, lines, zero, scale, table, k, columns, column);
    }
}

template <int BITS, Mode MODE>
inline void decode_block(const qk::DecodeArgs& args, const BlockFloat& b, int64_t R, int64_t k, int64_t columns,
                         int64_t column) {
    const Isa::Table table = Isa::load_float_table(b.table);
    const int64_t quads = b.padded / (4 * superline_steps(BITS));
    for (int64_t j = 0; j < quads; ++j) {
        for (int64_t r = 0; r < R; r += Isa::kRows) {
            I lines[3];
            load_lines<BITS>(b.codes + j * kLines<BITS> * b.line + 4 * r, b.line, lines);
            decode_step<BITS, MODE, 0, 0>(args, quads, j, lines, zero_of<MODE>(*b.head, r),
                                          Isa::load_f(b.head->scale + r), table, k, columns, column + r);
        }
    }
}

// Calls action with the compile-time bits and mode of the weight.
template <class Action>
inline void with_mode(const qk::PackedView& view, Action&& action) {
    if (view.zero_kind == qk::ZeroKind::codebook || (view.zero_kind == qk::ZeroKind::midpoint && view.bits < 8)) {
        switch (view.bits) {
            case 2: return action.template operator()<2, Mode::table>();
            case 3: return action.template operator()<3, Mode::table>();
            default: return action.template operator()<4, Mode::table>();
        }
    }
    if (view.zero_kind == qk::ZeroKind::offsets) {
        switch (view.bits) {
            case 2: return action.template operator()<2, Mode::affine>();
            case 3: return action.template operator()<3, Mode::affine>();
            case 4: return action.template operator()<4, Mode::affine>();
            default: return action.template operator()<8, Mode::affine>();
        }
    }
    switch (view.bits) {
        case 2: return action.template operator()<2, Mode::difference>();
        case 3: return action.template operator()<3, Mode::difference>();
        case 4: return action.template operator()<4, Mode::difference>();
        default: return action.template operator()<8, Mode::difference>();
    }
}

struct RunFloat {
    const BlockFloat& b;
    int64_t R, M;
    template <int BITS, Mode MODE>
    void operator()() const {
        product_float<BITS, MODE>(b, R, M);
    }
};

struct RunDecode {
    const qk::DecodeArgs& args;
    const BlockFloat& b;
    int64_t R, k, columns, column;
    template <int BITS, Mode MODE>
    void operator()() const {
        decode_block<BITS, MODE>(args, b, R, k, columns, column);
    }
};

void run_float(const qk::MatmulArgs& args, int64_t panel, int64_t first_m, int64_t M) {
    const qk::PackedView& view = *args.view;
    const int64_t R = panel_rows(view, panel);
    alignas(64) float tile[qk::kMatmulRows][qk::kPanelRows];
    memset(tile, 0, static_cast<size_t>(M) * sizeof tile[0]);
    GroupHead head;
    float values[16];
    const float* table = table_of(view, values);
    for_each_block(view, panel, R, &head,
                   [&](int64_t, int64_t, int64_t, int64_t padded, int64_t packed, const uint8_t* codes) {
        const BlockFloat b{codes, 4 * R, padded, args.values + first_m * view.padded_K + packed, view.padded_K,
                           &head, table, tile};
        with_mode(view, RunFloat{b, R, M});
    });
    store_tile(args, panel, first_m, M, R, tile);
}

void decode_panels(const qk::DecodeArgs& args, int64_t begin, int64_t end) {
    const qk::PackedView& view = *args.view;
    GroupHead head;
    float values[16];
    const float* table = table_of(view, values);
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t R = panel_rows(view, panel);
        const int64_t column = panel * qk::kPanelRows - args.first_row;
        for_each_block(view, panel, R, &head,
                       [&](int64_t, int64_t k, int64_t columns, int64_t padded, int64_t, const uint8_t* codes) {
            const BlockFloat b{codes, 4 * R, padded, nullptr, 0, &head, table, nullptr};
            with_mode(view, RunDecode{args, b, R, k, columns, column});
        });
    }
}

}  // namespace
