// gptq_update over Lanes: rows side by side. README.md beside this file has the formulas and the blocking. A
// tier's file includes its lanes header, defines kSide (Lanes of rows that go together), then includes this.
#pragma once
#include "qkern/codebooks.h"
#include "qkern/kernels.h"
#include "qkern/unroll.h"

namespace {

using namespace qk;

// Columns whose errors are applied together to the columns behind them.
constexpr int64_t kPanel = 16;
constexpr int64_t kRows = kSide * kLanes;

#define QK_EACH_SIDE QK_UNROLL for (int s = 0; s < kSide; ++s)

struct Rows {
    Lanes v[kSide];
};

QK_INLINE Rows load_rows(const float* p) {
    Rows rows;
    QK_EACH_SIDE rows.v[s] = load(p + s * kLanes);
    return rows;
}

QK_INLINE void store_rows(float* p, const Rows& rows) { QK_EACH_SIDE store(p + s * kLanes, rows.v[s]); }

QK_INLINE Rows rows_of(float x) {
    Rows rows;
    QK_EACH_SIDE rows.v[s] = splat(x);
    return rows;
}

struct Grid {
    Rows scale, zero;
};

// Up to kRows rows of a block. Matrices are held column by column, [B][kRows], so that a column is one Rows.
struct Panel {
    const GptqArgs& args;
    int64_t first_row, rows;
    const Codebook& book;

    // Rows beyond the matrix are zero.
    void read(const float* matrix, int64_t stride, float* to) const {
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = matrix + (first_row + r) * stride;
            for (int64_t j = 0; j < args.B; ++j) to[j * kRows + r] = from[j];
        }
        for (int64_t r = rows; r < kRows; ++r) {
            for (int64_t j = 0; j < args.B; ++j) to[j * kRows + r] = 0.0f;
        }
    }

    Grid grid(int64_t g) const {
        alignas(64) float scale[kRows], zero[kRows];
        for (int64_t r = 0; r < kRows; ++r) {
            const int64_t at = (first_row + r) * args.groups + g;
            scale[r] = r < rows ? args.scales[at] : 1.0f;
            zero[r] = r < rows && args.zeros ? static_cast<float>(args.zeros[at]) : 0.0f;
        }
        return {load_rows(scale), load_rows(zero)};
    }

    // A weight is held as its mark: the code, or of a codebook the position among its sorted entries.
    QK_INLINE Lanes mark(const Lanes& x, const Lanes& zero, const Lanes& top) const {
        if (!args.codebook) return clamp_codes(add(round_even(x), zero), top);
        return rank(book, max(x, splat(-1.0f)));  // a NaN counts as the lowest value
    }

    QK_INLINE Lanes level(const Lanes& mark, const Lanes& zero) const {
        return args.codebook ? lookup(book.sorted, mark) : sub(mark, zero);
    }

    // w[k] -= w[j] * hinv[j, k] for the columns [first, last) of errors, in ascending order.
    template <int kColumns>
    void apply(float* w, int64_t first, int64_t last, int64_t k) const {
        Rows sums[kColumns];
        QK_UNROLL for (int c = 0; c < kColumns; ++c) sums[c] = load_rows(w + (k + c) * kRows);
        for (int64_t j = first; j < last; ++j) {
            const float* h = args.hinv + j * args.B + k;
            const Rows error = load_rows(w + j * kRows);
            QK_UNROLL for (int c = 0; c < kColumns; ++c) {
                const Lanes factor = splat(h[c]);
                QK_EACH_SIDE sums[c].v[s] = sub(sums[c].v[s], mul(error.v[s], factor));
            }
        }
        QK_UNROLL for (int c = 0; c < kColumns; ++c) store_rows(w + (k + c) * kRows, sums[c]);
    }

    // Quantize the columns of w one by one; w becomes the errors, and their squared sum is returned.
    Rows run(float* w, const Grid* fixed, uint8_t* marks) const {
        const Lanes top = splat(static_cast<float>((1 << args.bits) - 1));
        Grid grid_of_group{};
        int64_t group = -1;
        if (fixed) grid_of_group = *fixed;
        Rows loss = rows_of(0.0f);
        for (int64_t first = 0; first < args.B; first += kPanel) {
            const int64_t last = first + kPanel < args.B ? first + kPanel : args.B;
            for (int64_t j = first; j < last; ++j) {
                if (!fixed && args.group_index[j] != group) grid_of_group = grid(group = args.group_index[j]);
                const float* h = args.hinv + j * args.B;
                Rows error = load_rows(w + j * kRows);
                QK_EACH_SIDE {
                    const Lanes scale = grid_of_group.scale.v[s], zero = grid_of_group.zero.v[s];
                    const Lanes code = mark(div(error.v[s], scale), zero, top);
                    store_codes(marks + j * kRows + s * kLanes, code);
                    error.v[s] = div(sub(error.v[s], mul(level(code, zero), scale)), splat(h[j]));
                    loss.v[s] = add(loss.v[s], mul(error.v[s], error.v[s]));
                }
                store_rows(w + j * kRows, error);
                for (int64_t k = j + 1; k < last; ++k) {
                    const Lanes factor = splat(h[k]);
                    Rows column = load_rows(w + k * kRows);
                    QK_EACH_SIDE column.v[s] = sub(column.v[s], mul(error.v[s], factor));
                    store_rows(w + k * kRows, column);
                }
            }
            int64_t k = last;
            for (; k + kApply <= args.B; k += kApply) apply<kApply>(w, first, last, k);
            for (; k < args.B; ++k) apply<1>(w, first, last, k);
        }
        return loss;
    }

    // Codes, and what the weights lose by them, of the rows in which `chosen` is not 0 (null: of all). w is
    // overwritten.
    void emit(float* w, const Grid* fixed, const uint8_t* marks, const float* chosen) const {
        Grid grid_of_group{};
        int64_t group = -1;
        if (fixed) grid_of_group = *fixed;
        for (int64_t j = 0; args.origin && j < args.B; ++j) {
            if (!fixed && args.group_index[j] != group) grid_of_group = grid(group = args.group_index[j]);
            QK_EACH_SIDE {
                const Lanes steps = level(load_codes(marks + j * kRows + s * kLanes), grid_of_group.zero.v[s]);
                store(w + j * kRows + s * kLanes, mul(steps, grid_of_group.scale.v[s]));
            }
        }
        for (int64_t r = 0; r < rows; ++r) {
            if (chosen && chosen[r] == 0.0f) continue;
            const int64_t row = first_row + r;
            uint8_t* codes = args.codes + row * args.codes_stride;
            for (int64_t j = 0; j < args.B; ++j) {
                const uint8_t code = marks[j * kRows + r];
                codes[j] = args.codebook ? static_cast<uint8_t>(book.codes[code]) : code;
            }
            if (!args.origin) continue;
            const float* origin = args.origin + row * args.origin_stride;
            float* change = args.change + row * args.change_stride;
            for (int64_t j = 0; j < args.B; ++j) change[j] = origin[j] - w[j * kRows + r];
        }
    }

    void put(float* out, const Rows& values) const {
        alignas(64) float part[kRows];
        store_rows(part, values);
        for (int64_t r = 0; r < rows; ++r) out[first_row + r] = part[r];
    }
};

void update(const GptqArgs& args, int64_t begin, int64_t end) {
    alignas(64) float w[kGptqMaxColumns * kRows];
    alignas(64) uint8_t marks[kGptqMaxColumns * kRows];
    for (int64_t n = begin; n < end; n += kRows) {
        const Panel panel{args, n, end - n < kRows ? end - n : kRows, args.codebook == 2 ? kFp4 : kNf4};
        panel.read(args.weight, args.weight_stride, w);
        const Rows loss = panel.run(w, nullptr, marks);
        if (args.losses) panel.put(args.losses, loss);
        for (int64_t r = 0; args.errors && r < panel.rows; ++r) {
            float* errors = args.errors + (n + r) * args.B;
            for (int64_t j = 0; j < args.B; ++j) errors[j] = w[j * kRows + r];
        }
        panel.emit(w, nullptr, marks, nullptr);
    }
}

}  // namespace
