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
    int64_t M;           // rows of x
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
                      const F* scale, Isa::Table table, const Ahead& ahead, F* sums) {
    fetch<MT < 4 ? fetches(Isa::kRows * NV, BITS) : 1>(ahead, T);
    I codes[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) codes[v] = codes_of<BITS, T>(lines[v]);
    float_step<BITS, MODE, MT, NV, T, 0>(x, x_stride, quads, codes, zero, scale, table, sums);
    if constexpr (T + 1 < (BITS == 3 ? 8 : 8 / BITS)) {
        float_run<BITS, MODE, MT, NV, T + 1>(x, x_stride, quads, lines, zero, scale, table, ahead, sums);
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
    Ahead ahead = ahead_of(b.codes, r, Isa::kRows * NV, BITS, b.padded / 4, m0, MT, b.M);
    int64_t j = 0;
    do {  // a block is never empty
        const int64_t stop = j + kChain / (4 * superline_steps(BITS)) < quads ? j + kChain / (4 * superline_steps(BITS)) : quads;
        F sums[MT * NV];
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) sums[i] = Isa::splat_f(0.0f);
        do {
            I lines[NV][3];
            QK_UNROLL for (int v = 0; v < NV; ++v) load_lines<BITS>(codes + v * 4 * Isa::kRows, b.line, lines[v]);
            float_run<BITS, MODE, MT, NV, 0>(x + 4 * j, b.x_stride, quads, lines, zero, scale, table, ahead, sums);
            ahead.at += superline_steps(BITS) * ahead.step;
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
    if constexpr (Isa::kFloatM > 2) {
        for (; m + 2 <= M; m += 2) micro_rows_float<BITS, MODE, 2>(b, R, m);
    }
    for (; m < M; ++m) micro_rows_float<BITS, MODE, 1>(b, R, m);
}

template <int BITS, Mode MODE, int T, int BYTE>
QK_INLINE void expand_step(const I* lines, F zero, F scale, Isa::Table table, int64_t run, float* out) {
    F weight = weight_of<BITS, MODE, BYTE>(codes_of<BITS, T>(lines), zero, scale, table);
    if constexpr (MODE != Mode::affine) weight = Isa::mul_f(weight, scale);
    Isa::store_f(out + T * run + BYTE * qk::kPanelRows, weight);
    if constexpr (BYTE < 3) {
        expand_step<BITS, MODE, T, BYTE + 1>(lines, zero, scale, table, run, out);
    } else if constexpr (T + 1 < (BITS == 3 ? 8 : 8 / BITS)) {
        expand_step<BITS, MODE, T + 1, 0>(lines, zero, scale, table, run, out);
    }
}

// A block as floats, [padded][kPanelRows].
template <int BITS, Mode MODE>
inline void expand_floats(const BlockFloat& b, int64_t R, float* out) {
    const Isa::Table table = Isa::load_float_table(b.table);
    const int64_t quads = b.padded / (4 * superline_steps(BITS));
    for (int64_t j = 0; j < quads; ++j) {
        for (int64_t r = 0; r < R; r += Isa::kRows) {
            I lines[3];
            const uint8_t* codes = b.codes + j * kLines<BITS> * b.line + 4 * r;
            fetch_lines<BITS>(codes, b.line);
            load_lines<BITS>(codes, b.line, lines);
            expand_step<BITS, MODE, 0, 0>(lines, zero_of<MODE>(*b.head, r), Isa::load_f(b.head->scale + r), table,
                                          4 * quads * qk::kPanelRows, out + 4 * j * qk::kPanelRows + r);
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

struct RunExpand {
    const BlockFloat& b;
    int64_t R;
    float* out;
    template <int BITS, Mode MODE>
    void operator()() const {
        expand_floats<BITS, MODE>(b, R, out);
    }
};

// Above this many rows of x the weight is decoded once for all of them: kBlockColumns columns at a time, of as
// many groups as that takes, into a cache.
constexpr int64_t kDecodeRows = 16;
// Rows of x and vectors of the tile over decoded weights: with 32 registers 24 sums, with 16 registers 12.
constexpr int kWideM = Isa::kVectors == 1 ? 1 : 6;
constexpr int kWideV = Isa::kRows == 8 ? 2 : Isa::kVectors;

struct Decoded {
    alignas(64) float weights[qk::kBlockColumns * qk::kPanelRows];
    int64_t columns;
    const float* x;  // of the first column, row 0
    int64_t x_stride;
};

template <int MT, int NV>
QK_INLINE void micro_decoded(const Decoded& d, int64_t r, int64_t m0, float (*tile)[qk::kPanelRows]) {
    F sums[MT * NV];
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) sums[i] = Isa::splat_f(0.0f);
    const float* weights = d.weights + r;
    const float* x = d.x + m0 * d.x_stride;
    const float* const end = x + d.columns;
    do {
        F w[NV];
        QK_UNROLL for (int v = 0; v < NV; ++v) w[v] = Isa::load_f(weights + v * Isa::kRows);
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
            sums[i] = Isa::fma(w[i % NV], Isa::splat_f(x[i / NV * d.x_stride]), sums[i]);
        }
        weights += qk::kPanelRows;
    } while (++x < end);
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
        float* out = tile[m0 + i / NV] + r + i % NV * Isa::kRows;
        Isa::store_f(out, Isa::add(Isa::load_f(out), sums[i]));
    }
}

template <int NV>
inline void decoded_rows(const Decoded& d, int64_t r, int64_t M, float (*tile)[qk::kPanelRows]) {
    int64_t m = 0;
    for (; m + kWideM <= M; m += kWideM) micro_decoded<kWideM, NV>(d, r, m, tile);
    if constexpr (kWideM > 1) {
        for (; m + 2 <= M; m += 2) micro_decoded<2, NV>(d, r, m, tile);
        for (; m < M; ++m) micro_decoded<1, NV>(d, r, m, tile);
    }
}

inline void product_decoded(Decoded* d, int64_t R, int64_t M, float (*tile)[qk::kPanelRows]) {
    if (d->columns == 0) return;
    int64_t r = 0;
    for (; r + Isa::kRows * kWideV <= R; r += Isa::kRows * kWideV) decoded_rows<kWideV>(*d, r, M, tile);
    for (; r < R; r += Isa::kRows) decoded_rows<1>(*d, r, M, tile);
    d->columns = 0;
}

void run_float(const qk::MatmulArgs& args, int64_t panel, int64_t first_m, int64_t M) {
    const qk::PackedView& view = *args.view;
    const int64_t R = panel_rows(view, panel);
    alignas(64) float tile[qk::kMatmulRows][qk::kPanelRows];
    memset(tile, 0, static_cast<size_t>(M) * sizeof tile[0]);
    GroupHead head;
    float values[16];
    const float* table = table_of(view, values);
    Decoded decoded;
    decoded.columns = 0;
    decoded.x_stride = view.padded_K;
    for_each_block(view, panel, R, &head,
                   [&](int64_t, int64_t, int64_t, int64_t padded, int64_t packed, const uint8_t* codes) {
        const float* x = args.values + first_m * view.padded_K + packed;
        const BlockFloat b{codes, 4 * R, padded, x, view.padded_K, &head, table, M, tile};
        if (M <= kDecodeRows) return with_mode(view, RunFloat{b, R, M});
        if (decoded.columns + padded > qk::kBlockColumns) product_decoded(&decoded, R, M, tile);
        if (decoded.columns == 0) decoded.x = x;
        with_mode(view, RunExpand{b, R, decoded.weights + decoded.columns * qk::kPanelRows});
        decoded.columns += padded;
    });
    product_decoded(&decoded, R, M, tile);
    store_tile(args, panel, first_m, M, R, tile);
}

void decode_panels(const qk::DecodeArgs& args, int64_t begin, int64_t end) {
    const qk::PackedView& view = *args.view;
    GroupHead head;
    float values[16];
    const float* table = table_of(view, values);
    alignas(64) float weights[qk::kBlockColumns * qk::kPanelRows];
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t R = panel_rows(view, panel);
        const int64_t column = panel * qk::kPanelRows - args.first_row;
        for_each_block(view, panel, R, &head,
                       [&](int64_t, int64_t k, int64_t columns, int64_t padded, int64_t, const uint8_t* codes) {
            const BlockFloat b{codes, 4 * R, padded, nullptr, 0, &head, table, 1, nullptr};
            with_mode(view, RunExpand{b, R, weights});
            for (int64_t i = 0; i < columns; ++i) {
                const int64_t row = view.permutation ? view.permutation[k + i] : k + i;
                char* out = static_cast<char*>(args.out) + (row * args.out_stride + column) * dtype_size(args.dtype);
                for (int64_t r = 0; r < R; r += Isa::kRows) {
                    const F weight = Isa::load_f(weights + i * qk::kPanelRows + r);
                    Isa::store_as(out + r * dtype_size(args.dtype), args.dtype, weight);
                }
            }
        });
    }
}

}  // namespace
