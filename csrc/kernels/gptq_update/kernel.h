// gptq_update over Lanes: sixteen rows side by side. README.md beside this file has the formula and the
// blocking. A tier's file includes its lanes header, then this.
#pragma once
#include "qkern/codebooks.h"
#include "qkern/kernels.h"

namespace {

using namespace qk;

// Columns whose errors are applied together to the columns behind them.
constexpr int64_t kPanel = 16;

struct Panel {
    const GptqArgs& args;
    int64_t first_row, rows;  // rows 1..16 of this panel
    float* w;                 // [B][16]: column major, so that a column is one Lanes

    void read() const {
        for (int64_t r = 0; r < rows; ++r) {
            const float* from = args.weight + (first_row + r) * args.weight_stride;
            for (int64_t j = 0; j < args.B; ++j) w[j * kLanes + r] = from[j];
        }
        for (int64_t r = rows; r < kLanes; ++r) {
            for (int64_t j = 0; j < args.B; ++j) w[j * kLanes + r] = 0.0f;
        }
    }

    // Scales and zeros of a group; rows beyond the matrix get a harmless grid.
    void grid(int64_t g, Lanes& scale, Lanes& zero) const {
        alignas(64) float s[kLanes], z[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) {
            const int64_t at = (first_row + r) * args.groups + g;
            s[r] = r < rows ? args.scales[at] : 1.0f;
            z[r] = r < rows && args.zeros ? static_cast<float>(args.zeros[at]) : 0.0f;
        }
        scale = load(s);
        zero = load(z);
    }

    // w[k] -= e[j] * hinv[j, k] for the columns [first, last) of errors, in ascending order.
    template <int kColumns>
    void apply(const Lanes* errors, int64_t first, int64_t last, int64_t k) const {
        Lanes sums[kColumns];
        for (int c = 0; c < kColumns; ++c) sums[c] = load(w + (k + c) * kLanes);
        for (int64_t j = first; j < last; ++j) {
            const float* h = args.hinv + j * args.B + k;
            for (int c = 0; c < kColumns; ++c) sums[c] = sub(sums[c], mul(errors[j - first], splat(h[c])));
        }
        for (int c = 0; c < kColumns; ++c) store(w + (k + c) * kLanes, sums[c]);
    }

    void run() const {
        const Codebook& book = args.codebook == 2 ? kFp4 : kNf4;
        const Lanes top = splat(static_cast<float>((1 << args.bits) - 1));
        Lanes scale = splat(1.0f), zero = splat(0.0f);
        int64_t group = -1;
        read();
        for (int64_t first = 0; first < args.B; first += kPanel) {
            const int64_t last = first + kPanel < args.B ? first + kPanel : args.B;
            Lanes errors[kPanel];
            alignas(64) float error_rows[kPanel][kLanes];
            alignas(64) uint8_t code_rows[kPanel][kLanes];
            for (int64_t j = first; j < last; ++j) {
                if (args.group_index[j] != group) grid(group = args.group_index[j], scale, zero);
                const Lanes column = load(w + j * kLanes);
                const Lanes x = div(column, scale);
                Lanes code, level;
                if (args.codebook) {
                    const Lanes position = nearest(book, x);
                    code = lookup(book.codes, position);
                    level = lookup(book.sorted, position);
                } else {
                    code = clamp_codes(add(round_even(x), zero), top);
                    level = sub(code, zero);
                }
                const Lanes error = div(sub(column, mul(level, scale)), splat(args.hinv[j * args.B + j]));
                errors[j - first] = error;
                store(error_rows[j - first], error);
                store_codes(code_rows[j - first], code);
                for (int64_t k = j + 1; k < last; ++k) {
                    const Lanes product = mul(error, splat(args.hinv[j * args.B + k]));
                    store(w + k * kLanes, sub(load(w + k * kLanes), product));
                }
            }
            int64_t k = last;
            for (; k + 8 <= args.B; k += 8) apply<8>(errors, first, last, k);
            for (; k < args.B; ++k) apply<1>(errors, first, last, k);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = (first_row + r) * args.B;
                for (int64_t j = first; j < last; ++j) {
                    args.codes[at + j] = code_rows[j - first][r];
                    args.errors[at + j] = error_rows[j - first][r];
                }
            }
        }
    }

    static Lanes nearest(const Codebook& book, const Lanes& x) {
        Lanes position = splat(0.0f);
        for (int i = 0; i < 15; ++i) position = count_above(position, x, splat(book.thresholds[i]));
        return position;
    }
};

void update(const GptqArgs& args, int64_t begin, int64_t end) {
    alignas(64) float columns[kGptqMaxColumns * kLanes];
    for (int64_t n = begin; n < end; n += kLanes) {
        const Panel panel{args, n, end - n < kLanes ? end - n : kLanes, columns};
        panel.run();
    }
}

}  // namespace
