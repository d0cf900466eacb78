// Scales and codes of one group by their loss, built on kernel.h: README.md beside this file.
#pragma once
#include "kernel.h"

namespace {

Rows read_scales(const Panel& panel, const float* scales) {
    alignas(64) float part[kRows];
    for (int64_t r = 0; r < kRows; ++r) part[r] = r < panel.rows ? scales[panel.first_row + r] : 1.0f;
    return load_rows(part);
}

void copy_columns(float* to, const float* from, int64_t B) {
    for (int64_t i = 0; i < B * kRows; i += kLanes) store(to + i, load(from + i));
}

void set_scales(const GptqArgs& args, const Panel& panel, const Rows& scale) {
    alignas(64) float part[kRows];
    store_rows(part, scale);
    for (int64_t r = 0; r < panel.rows; ++r) {
        args.scales[(panel.first_row + r) * args.groups + args.group_index[0]] = part[r];
    }
}

// Runs the block once with each candidate, keeps in each row the first scale of the least loss.
void search(const GptqArgs& args, int64_t begin, int64_t end) {
    alignas(64) float w[kGptqMaxColumns * kRows], target[kGptqMaxColumns * kRows];
    alignas(64) uint8_t marks[kGptqMaxColumns * kRows];
    for (int64_t n = begin; n < end; n += kRows) {
        const Panel panel{args, n, end - n < kRows ? end - n : kRows, args.codebook == 2 ? kFp4 : kNf4};
        panel.read(args.weight, args.weight_stride, target);
        Grid grid = panel.grid(args.group_index[0]);
        Rows scale{}, loss{};
        for (int64_t c = 0; c < args.candidates; ++c) {
            grid.scale = read_scales(panel, args.candidate_scales + c * args.candidate_stride);
            copy_columns(w, target, args.B);
            const Rows trial = panel.run(w, &grid, marks);
            QK_EACH_SIDE {
                scale.v[s] = c ? where_above(loss.v[s], trial.v[s], grid.scale.v[s], scale.v[s]) : grid.scale.v[s];
                loss.v[s] = c ? where_above(loss.v[s], trial.v[s], trial.v[s], loss.v[s]) : trial.v[s];
            }
        }
        grid.scale = scale;
        set_scales(args, panel, scale);
        panel.put(args.losses, panel.run(target, &grid, marks));
        panel.emit(target, &grid, marks, nullptr);
    }
}

// x becomes x @ local, from the last column to the first. Returns its squared sum, and its inner product with
// `other` where there is one.
struct Sums {
    Rows squares, products;
};

template <int kColumns>
QK_INLINE void through_columns(const GptqArgs& args, float* x, int64_t j, const float* other, Sums& sums) {
    Rows columns[kColumns];
    QK_UNROLL for (int c = 0; c < kColumns; ++c) columns[c] = rows_of(0.0f);
    for (int64_t k = 0; k < j + kColumns; ++k) {
        const Rows left = load_rows(x + k * kRows);
        QK_UNROLL for (int c = 0; c < kColumns; ++c) {
            const Lanes factor = splat(args.local[k * args.B + j + c]);
            QK_EACH_SIDE columns[c].v[s] = add(columns[c].v[s], mul(left.v[s], factor));
        }
    }
    QK_UNROLL for (int c = kColumns - 1; c >= 0; --c) {
        store_rows(x + (j + c) * kRows, columns[c]);
        QK_EACH_SIDE sums.squares.v[s] = add(sums.squares.v[s], mul(columns[c].v[s], columns[c].v[s]));
        if (!other) continue;
        const Rows right = load_rows(other + (j + c) * kRows);
        QK_EACH_SIDE sums.products.v[s] = add(sums.products.v[s], mul(columns[c].v[s], right.v[s]));
    }
}

Sums through(const GptqArgs& args, float* x, const float* other) {
    Sums sums{rows_of(0.0f), rows_of(0.0f)};
    int64_t j = args.B;
    while (j % kApply) through_columns<1>(args, x, --j, other, sums);
    while (j > 0) through_columns<kApply>(args, x, j -= kApply, other, sums);
    return sums;
}

QK_INLINE Lanes stored(const GptqArgs& args, const Lanes& scale) {
    if (args.scale_dtype == DType::f32) return scale;
    alignas(64) uint16_t half[kLanes];
    if (args.scale_dtype == DType::f16) {
        store_f16(half, scale);
        return load_f16(half);
    }
    store_bf16(half, scale);
    return load_bf16(half);
}

// `scale` where it is finite and not 0, else `other`.
QK_INLINE Lanes usable(const Lanes& scale, const Lanes& other) {
    const Lanes zero = splat(0.0f);
    const Lanes finite = where_above(splat(1.0f), sub(scale, scale), scale, zero);
    return where_above(max(finite, sub(zero, finite)), zero, finite, other);
}

// A block while all other columns stay: the best that is known of it.
struct Best {
    Grid grid;
    Rows loss, changed;  // changed: 1 in the rows that are no longer what they were
    uint8_t* marks;

    // Take what has less loss. `others` null: the scale alone is new.
    void consider(const Rows& trial, const Rows& scale, const uint8_t* others, int64_t B) {
        const Lanes zero = splat(0.0f), one = splat(1.0f);
        Rows wins;
        QK_EACH_SIDE {
            wins.v[s] = where_above(loss.v[s], trial.v[s], one, zero);
            changed.v[s] = max(changed.v[s], wins.v[s]);
            grid.scale.v[s] = where_above(wins.v[s], zero, scale.v[s], grid.scale.v[s]);
            loss.v[s] = where_above(wins.v[s], zero, trial.v[s], loss.v[s]);
        }
        for (int64_t j = 0; others && j < B; ++j) {
            QK_EACH_SIDE {
                const int64_t at = j * kRows + s * kLanes;
                const Lanes kept = where_above(wins.v[s], zero, load_codes(others + at), load_codes(marks + at));
                store_codes(marks + at, kept);
            }
        }
    }
};

// Takes better codes in each row that has them and, args.fits times, the scale that suits the codes best.
void improve(const GptqArgs& args, int64_t begin, int64_t end) {
    alignas(64) float w[kGptqMaxColumns * kRows], target[kGptqMaxColumns * kRows], aim[kGptqMaxColumns * kRows];
    alignas(64) uint8_t marks[kGptqMaxColumns * kRows], trial_marks[kGptqMaxColumns * kRows];
    const int64_t B = args.B;
    const Codebook& book = args.codebook == 2 ? kFp4 : kNf4;
    uint8_t mark_of[256];
    for (int i = 0; i < 256; ++i) mark_of[i] = static_cast<uint8_t>(i);
    // Backwards: what is unused at the end of a codebook gives way.
    for (int i = 15; args.codebook && i >= 0; --i) mark_of[static_cast<int>(book.codes[i])] = static_cast<uint8_t>(i);
    for (int64_t n = begin; n < end; n += kRows) {
        const Panel panel{args, n, end - n < kRows ? end - n : kRows, book};
        panel.read(args.weight, args.weight_stride, target);
        for (int64_t i = 0; i < B * kRows; ++i) {
            w[i] = 0.0f;
            marks[i] = 0;
        }
        for (int64_t r = 0; r < panel.rows; ++r) {
            const float* origin = args.origin + (n + r) * args.origin_stride;
            const float* change = args.change + (n + r) * args.change_stride;
            const uint8_t* codes = args.codes + (n + r) * args.codes_stride;
            for (int64_t j = 0; j < B; ++j) {
                w[j * kRows + r] = target[j * kRows + r] - (origin[j] - change[j]);
                marks[j * kRows + r] = mark_of[codes[j]];
            }
        }
        const Rows before = through(args, w, nullptr).squares;
        Best best{panel.grid(args.group_index[0]), before, rows_of(0.0f), marks};
        const Grid* fixed = args.fits > 0 ? &best.grid : nullptr;
        copy_columns(w, target, B);
        best.consider(panel.run(w, fixed, trial_marks), best.grid.scale, trial_marks, B);
        if (fixed) {
            copy_columns(aim, target, B);
            through(args, aim, nullptr);
        }
        for (int fit = 0; fit < args.fits; ++fit) {
            for (int64_t j = 0; j < B; ++j) {
                QK_EACH_SIDE {
                    const int64_t at = j * kRows + s * kLanes;
                    store(w + at, panel.level(load_codes(marks + at), best.grid.zero.v[s]));
                }
            }
            // For fixed codes the loss is a parabola in the scale.
            const Sums sums = through(args, w, aim);
            Grid fitted = best.grid;
            QK_EACH_SIDE {
                const Lanes scale = stored(args, div(sums.products.v[s], sums.squares.v[s]));
                fitted.scale.v[s] = usable(scale, best.grid.scale.v[s]);
            }
            Rows loss = rows_of(0.0f);
            for (int64_t j = 0; j < B; ++j) {
                QK_EACH_SIDE {
                    const int64_t at = j * kRows + s * kLanes;
                    const Lanes rest = sub(load(aim + at), mul(load(w + at), fitted.scale.v[s]));
                    loss.v[s] = add(loss.v[s], mul(rest, rest));
                }
            }
            best.consider(loss, fitted.scale, nullptr, B);
            copy_columns(w, target, B);
            const Rows trial = panel.run(w, &fitted, trial_marks);
            best.consider(trial, fitted.scale, trial_marks, B);
        }
        if (fixed) set_scales(args, panel, best.grid.scale);
        alignas(64) float changed[kRows];
        store_rows(changed, best.changed);
        panel.emit(w, fixed, marks, changed);
        Rows gain;
        QK_EACH_SIDE gain.v[s] = sub(before.v[s], best.loss.v[s]);
        panel.put(args.losses, gain);
    }
}

void enter_search(qk::KernelTable* table) {
    table->gptq_update = &update;
    table->gptq_search = &search;
    table->gptq_improve = &improve;
}

}  // namespace
