// quantize_groupwise over Lanes; README.md beside this file has the formulas and the order of the sums.
// A tier's file includes its lanes header, then this.
#pragma once
#include <math.h>

#include "qkern/bitstream.h"
#include "qkern/codebooks.h"
#include "qkern/kernels.h"
#include "qkern/lanes/columns.h"
#include "qkern/stream.h"

namespace {

using namespace qk;

// Scale candidates of the MSE search, as fractions of the min-max scale: first / unit, (first - 1) / unit, ...
// Shared with reference.py; README.md says how they were chosen.
struct Shrinks {
    int first, unit, count;
};
constexpr Shrinks kShrinks2 = {49, 32, 41}, kShrinks3 = {38, 32, 30}, kShrinks4 = {35, 32, 27};
constexpr Shrinks kShrinks8 = {259, 256, 26}, kShrinksBook = {48, 32, 36};
constexpr int kRefinements = 3;

struct Grid {
    float scale;
    float zero;
};

struct Range {
    float low, high;  // both include zero
};

// Grids of up to kLanes groups that follow one another, a group to a lane.
struct Grids {
    alignas(64) float low[kLanes], high[kLanes], scale[kLanes], zero[kLanes];
};

// Weighted squared error of a group on one grid, and its derivatives in the scale:
// with e = w - c * s, error = sum(i*e*e), slope = sum(i*e*c), curvature = sum(i*c*c).
struct Fit {
    float error, slope, curvature;
};

inline float clamp_zero(float zero, float top) { return zero < 0.0f ? 0.0f : zero > top ? top : zero; }

inline float round_scalar(float x) {
    const float magnitude = float_of(bits_of(x) & 0x7fffffffu);
    if (!(magnitude < 8388608.0f)) return x;
    const float rounded = (magnitude + 8388608.0f) - 8388608.0f;
    return x < 0.0f ? -rounded : rounded;
}

inline bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

inline Lanes round_scales(const Lanes& a, DType dtype) {
    alignas(64) char stored[kLanes * 4];
    store_floats(stored, dtype, 0, kLanes, a);
    return load_floats(stored, dtype, 0, kLanes);
}

template <DType D, bool kBook>
struct Quantizer {
    const QuantizeArgs& args;
    const Codebook& book;
    const char* row;
    const float* importance;

    static constexpr int64_t kSize = D == DType::f32 ? 4 : 2;

    Lanes weights(int64_t k, int64_t last) const { return load_some<D>(row, k, last - k); }

    // Calls f(k, count) for every kLanes columns of [first, last), and the rest.
    template <class F>
    static void each(int64_t first, int64_t last, F&& f) {
        for (; first + kLanes <= last; first += kLanes) f(first, int64_t{kLanes});
        if (first < last) f(first, last - first);
    }

    // Fits of grids whose scales differ in sign at most, so that they share the division.
    template <int kCount>
    void fit(int64_t first, int64_t last, const Grid (&grids)[kCount], Fit (&fits)[kCount]) const {
        const Lanes top = splat(static_cast<float>((1 << args.bits) - 1));
        const Lanes divisor = splat(grids[0].scale);
        Lanes error[kCount], slope[kCount], curvature[kCount];
        for (int g = 0; g < kCount; ++g) error[g] = slope[g] = curvature[g] = splat(0.0f);
        for (int64_t k = first; k < last; k += kLanes) {
            const Lanes w = weights(k, last);
            const Lanes ratio = kBook ? div(w, divisor) : round_even(div(w, divisor));
            const Lanes i = importance ? load_some<DType::f32>(importance, k, last - k) : splat(1.0f);
            for (int g = 0; g < kCount; ++g) {
                const Lanes zero = splat(grids[g].zero), sign = splat(grids[g].scale == grids[0].scale ? 1.0f : -1.0f);
                const Lanes x = g == 0 ? ratio : mul(ratio, sign);
                // What the code stands for, before the scale.
                const Lanes c = kBook ? lookup(book.sorted, rank(book, x)) : sub(clamp_codes(add(x, zero), top), zero);
                const Lanes e = sub(w, mul(c, splat(grids[g].scale)));
                const Lanes ie = importance ? mul(i, e) : e, ic = importance ? mul(i, c) : c;
                error[g] = add(error[g], mul(ie, e));
                slope[g] = add(slope[g], mul(ie, c));
                curvature[g] = add(curvature[g], mul(ic, c));
            }
        }
        for (int g = 0; g < kCount; ++g) fits[g] = {reduce_add(error[g]), reduce_add(slope[g]), reduce_add(curvature[g])};
    }

    // `scale` as stored, or the fallback where it is not usable.
    float stored(float scale, float fallback) const {
        scale = round_to(scale, args.scale_dtype);
        return scale == 0.0f || !is_finite(scale) ? fallback : scale;
    }

    template <bool kBoth>
    Lanes extremes_of(int64_t k, int64_t count, Lanes (&up)[kLanes], Lanes (&down)[kLanes]) const {
        const int64_t size = args.K % args.group_size == 0 ? args.group_size : 0;
        switch (size) {
            case 32: return extremes<D, kBoth, 32>(row, k, args.K, size, count, up, down);
            case 64: return extremes<D, kBoth, 64>(row, k, args.K, size, count, up, down);
            case 128: return extremes<D, kBoth, 128>(row, k, args.K, size, count, up, down);
            default: return extremes<D, kBoth>(row, k, args.K, args.group_size, count, up, down);
        }
    }

    // Min-max grids of groups [first, first + count), count at most kLanes.
    Status min_max(int64_t first, int64_t count, Grids& grids) const {
        const bool both = args.asymmetric || args.search_mse;
        Lanes up[kLanes], down[kLanes];
        const int64_t k = first * args.group_size;
        const Lanes largest = both ? extremes_of<true>(k, count, up, down) : extremes_of<false>(k, count, up, down);
        if (!all_finite(largest)) return Status::non_finite;
        const int levels = 1 << args.bits;
        const Lanes high = largest_of_each<D>(up), drop = both ? largest_of_each<D>(down) : splat(0.0f);
        const Lanes reach = splat(args.asymmetric ? static_cast<float>(levels - 1)
                                  : kBook         ? 1.0f
                                                  : static_cast<float>(levels / 2) - 0.5f);
        const Lanes span = args.asymmetric ? add(high, drop) : max(high, drop);
        const Lanes scale = one_for_zero(round_scales(div(span, reach), args.scale_dtype));
        if (!all_finite(scale)) return Status::scale_overflow;
        store(grids.scale, scale);
        store(grids.low, flip_sign(drop));
        store(grids.high, high);
        store(grids.zero, args.asymmetric ? clamp_codes(round_even(div(drop, scale)), reach)
                                          : splat(kBook ? 0.0f : static_cast<float>(levels / 2)));
        return Status::ok;
    }

    struct Search {
        Grid best;         // smallest error among grids with a stored scale
        float best_error;
        Grid pick;         // grid whose unrounded optimal scale promises the smallest error
        float pick_error;
    };

    // In order: the first of equals stays.
    template <int kCount>
    void consider(Search& search, int64_t first, int64_t last, const Grid (&grids)[kCount]) const {
        Fit fits[kCount];
        fit(first, last, grids, fits);
        for (int g = 0; g < kCount; ++g) {
            const Fit& f = fits[g];
            if (f.error < search.best_error) search.best = grids[g], search.best_error = f.error;
            // For fixed codes the error is a parabola in the scale: this is the step to its minimum.
            const float step = f.curvature > 0.0f ? f.slope / f.curvature : 0.0f;
            const float promise = f.error - f.slope * step;
            if (promise < search.pick_error) {
                search.pick = {grids[g].scale + step, grids[g].zero};
                search.pick_error = promise;
            }
        }
    }

    Grid least_squares(Range r, Grid start, int64_t first, int64_t last) const {
        const float top = static_cast<float>((1 << args.bits) - 1);
        const float none = float_of(0x7f800000u);
        const Grid starts[1] = {start};
        Fit fits[1];
        fit(first, last, starts, fits);
        Search search{start, fits[0].error, start, none};
        const Shrinks shrinks = kBook            ? kShrinksBook
                                : args.bits == 2 ? kShrinks2
                                : args.bits == 3 ? kShrinks3
                                : args.bits == 4 ? kShrinks4
                                                 : kShrinks8;
        const float absmax = r.high > -r.low ? r.high : -r.low;
        const float reach = kBook ? 1.0f : static_cast<float>(1 << (args.bits - 1)) - 0.5f;
        for (int i = 0; i < shrinks.count; ++i) {
            const float shrink = static_cast<float>(shrinks.first - i) / static_cast<float>(shrinks.unit);
            if (args.asymmetric) {
                const float scale = stored((r.high - r.low) / top * shrink, start.scale);
                // The range shrinks at both ends, at the top only, at the bottom only.
                const float both = clamp_zero(round_scalar(-(r.low * shrink) / scale), top);
                const float above = clamp_zero(round_scalar(-r.low / scale), top);
                const float below = clamp_zero(round_scalar(top - r.high / scale), top);
                const Grid grids[3] = {{scale, both}, {scale, above}, {scale, below}};
                consider(search, first, last, grids);
            } else {
                const float scale = absmax / reach * shrink;
                const Grid grids[2] = {{stored(scale, start.scale), start.zero},
                                       {stored(-scale, start.scale), start.zero}};
                consider(search, first, last, grids);
            }
        }
        for (int i = 0; i < kRefinements; ++i) {
            const Grid refined[1] = {{stored(search.pick.scale, start.scale), search.pick.zero}};
            search.pick_error = none;
            consider(search, first, last, refined);
        }
        return search.best;
    }

    Status choose(int64_t n) const {
        Grids grids;
        const bool at_once = encodes_groups();
        for (int64_t g = 0; g < args.groups; g += kLanes) {
            const int64_t count = args.groups - g < kLanes ? args.groups - g : kLanes;
            const Status status = min_max(g, count, grids);
            if (status != Status::ok) return status;
            for (int64_t i = 0; args.search_mse && i < count; ++i) {
                const int64_t first = (g + i) * args.group_size;
                const int64_t last = first + args.group_size < args.K ? first + args.group_size : args.K;
                const Grid start = {grids.scale[i], grids.zero[i]};
                const Grid best = least_squares({grids.low[i], grids.high[i]}, start, first, last);
                grids.scale[i] = best.scale;
                grids.zero[i] = best.zero;
            }
            store_floats(args.scales, args.scale_dtype, n * args.groups + g, count, load(grids.scale));
            if (at_once) {
                with_bits([&](auto bits) {
                    args.group_size < 4 * kLanes ? encode_groups<bits.value, 2>(n, g, count, grids)
                                                 : encode_groups<bits.value, 4>(n, g, count, grids);
                });
            }
            if (!args.zeros) continue;
            uint8_t zeros[kLanes];
            store_codes(zeros, load(grids.zero));
            memcpy(args.zeros + n * args.groups + g, zeros, static_cast<size_t>(count));
        }
        return Status::ok;
    }

    template <int B>
    void store_codes_of(uint32_t* words, const Lanes (&x)[4], const Lanes (&zeros)[4]) const {
        if constexpr (kBook) {
            store_on_book(words, x, book);
        } else {
            store_on_grid<B>(words, x, zeros);
        }
    }

    // Codes of columns [k, k + 4 * kLanes), whose scales and zero points stand every kStep columns.
    template <int B, int kStep>
    void encode_whole(const char* from, int64_t k, const float* scale, const float* zero, uint32_t* words) const {
        const auto of = [](const float* values) { return kStep == 1 ? load(values) : splat(*values); };
        Lanes x[4], zeros[4];
        for (int i = 0; i < 4; ++i) {
            x[i] = div(load_lanes<D>(from, k + kLanes * i), of(scale + kLanes / kStep * i));
            zeros[i] = of(zero + kLanes / kStep * i);
        }
        store_codes_of<B>(words, x, zeros);
    }

    // kStep: 1, or kLanes where groups are whole Lanes.
    template <int B, int kStep>
    void encode(int64_t n) const {
        const int64_t grid = n / args.rows_per_grid * args.groups;
        const char* scales = static_cast<const char*>(args.scales) + grid * dtype_size(args.scale_dtype);
        Groups groups{scales, args.scale_dtype, args.zeros ? args.zeros + grid : nullptr, nullptr, args.groups,
                      args.group_size};
        Columns of;
        Groups::fill(of.zero, 0, kColumns / kStep, static_cast<float>(1 << (B - 1)));
        uint32_t* words = args.codes + n * args.code_words;
        const bool streamed = args.streamed && whole_lines(words);
        alignas(64) uint32_t chunk[kColumns * B / 32];
        const char* next_row = row + args.row_stride * kSize;  // fetched while this one is divided
        constexpr int64_t kWhole = 4 * kLanes;
        for (int64_t begin = 0; begin < args.K; begin += kColumns) {
            const int64_t end = begin + kColumns < args.K ? begin + kColumns : args.K;
            groups.template expand<kStep>(begin, end, of);
            uint32_t* const to = streamed ? chunk : words + begin * B / 32;
            int64_t k = begin;
            for (; k + kWhole <= end; k += kWhole) {
                for (int64_t i = 0; i < kWhole * kSize; i += 64) __builtin_prefetch(next_row + k * kSize + i);
                const int64_t at = (k - begin) / kStep;
                encode_whole<B, kStep>(row, k, of.scale + at, of.zero + at, to + (k - begin) * B / 32);
            }
            if (k < end) {
                // The rest among zeros, whose codes are then cleared.
                alignas(64) char weights[kWhole * kSize] = {};
                alignas(64) float scale[kWhole], zero[kWhole];
                Groups::fill(scale, 0, kWhole, 1.0f);
                Groups::fill(zero, 0, kWhole, 0.0f);
                const int64_t count = end - k, at = (k - begin) / kStep;
                const size_t steps = static_cast<size_t>((count + kStep - 1) / kStep);
                memcpy(weights, row + k * kSize, static_cast<size_t>(count * kSize));
                memcpy(scale, of.scale + at, steps * sizeof(float));
                memcpy(zero, of.zero + at, steps * sizeof(float));
                uint32_t last[kWhole * B / 32];
                encode_whole<B, kStep>(weights, 0, scale, zero, last);
                const int64_t bits = count * B, whole = (bits + 31) / 32;
                if (bits % 32 != 0) last[whole - 1] &= (1u << (bits % 32)) - 1;
                memcpy(to + (k - begin) * B / 32, last, static_cast<size_t>(whole) * 4);
            }
            if (streamed) copy_out(words + begin * B / 32, chunk, ((end - begin) * B + 31) / 32 * 4, true);
        }
    }

    // Whether each batch of groups is encoded as soon as its grids are known: sizes that divide evenly.
    bool encodes_groups() const {
        return args.codes && args.group_size >= 2 * kLanes && (args.group_size & (args.group_size - 1)) == 0 &&
               args.K % args.group_size == 0 && args.K % (4 * kLanes) == 0;
    }

    // Codes of columns [from, last): calls f(weights, k, words) for every 64 of them.
    template <int B, class F>
    void each_block(int64_t n, int64_t from, int64_t last, F&& f) const {
        uint32_t* const words = args.codes + n * args.code_words;
        const bool streamed = args.streamed && whole_lines(words);
        alignas(64) uint32_t chunk[kColumns * B / 32];
        const int64_t to_next = args.row_stride * kSize;  // the next row is fetched while this one is encoded
        constexpr int64_t kWhole = 4 * kLanes;
        for (int64_t begin = from; begin < last; begin += kColumns) {
            const int64_t end = begin + kColumns < last ? begin + kColumns : last;
            uint32_t* to = streamed ? chunk : words + begin * B / 32;
            const char* weights = row + begin * kSize;
            for (int64_t k = begin; k < end; k += kWhole, weights += kWhole * kSize, to += kWhole * B / 32) {
                for (int64_t i = 0; i < kWhole * kSize; i += 64) __builtin_prefetch(weights + to_next + i);
                f(weights, k, to);
            }
            if (streamed) copy_out(words + begin * B / 32, chunk, (end - begin) * B / 8, true);
        }
    }

    // Codes of groups [first, first + count), whose grids are at hand. kShared: how many Lanes in a row of four have
    // the same grid.
    template <int B, int kShared>
    __attribute__((noinline)) void encode_groups(int64_t n, int64_t first, int64_t count, const Grids& grids) const {
        int shift = 0;
        while (int64_t{kLanes} << shift < args.group_size) ++shift;
        const int64_t from = first * args.group_size, last = from + count * args.group_size;
#if defined(QK_TWO_BITS)
        if constexpr (B == 2 && D != DType::f32) {
            Thresholds thresholds;
            if (args.scale_dtype != DType::f32 && thresholds_of<D>(grids.scale, grids.zero, &thresholds)) {
                return each_block<B>(n, from, last, [&](const char* weights, int64_t k, uint32_t* to) {
                    const int64_t at = (k - from) / kLanes;
                    store_two_bits(to, weights, thresholds, at >> shift);
                    store_two_bits(to + 2, weights + 64, thresholds, (at + 2) >> shift);
                });
            }
        }
#endif
        each_block<B>(n, from, last, [&](const char* weights, int64_t k, uint32_t* to) {
            Lanes x[4], zeros[4];
            for (int i = 0; i < 4; ++i) {
                const int64_t g = ((k - from) / kLanes + i / kShared * kShared) >> shift;
                x[i] = div(load_lanes<D>(weights, i * kLanes), splat(grids.scale[g]));
                zeros[i] = splat(grids.zero[g]);
            }
            store_codes_of<B>(to, x, zeros);
        });
    }

    template <int B>
    struct Bits {
        static constexpr int value = B;
    };

    template <class Action>
    void with_bits(Action&& action) const {
        if constexpr (kBook) {
            action(Bits<4>{});
        } else {
            switch (args.bits) {
                case 2: return action(Bits<2>{});
                case 3: return action(Bits<3>{});
                case 4: return action(Bits<4>{});
                default: return action(Bits<8>{});
            }
        }
    }

    void encode_row(int64_t n) const {
        with_bits([&](auto bits) {
            args.group_size % kLanes == 0 ? encode<bits.value, kLanes>(n) : encode<bits.value, 1>(n);
        });
    }
};

template <DType D, bool kBook>
Status quantize_rows(const QuantizeArgs& args, int64_t begin, int64_t end) {
    const Codebook& book = args.codebook == 2 ? kFp4 : kNf4;
    for (int64_t n = begin; n < end; ++n) {
        const char* row = static_cast<const char*>(args.weight) + n * args.row_stride * (D == DType::f32 ? 4 : 2);
        const float* importance = args.importance ? args.importance + n * args.importance_stride : nullptr;
        const Quantizer<D, kBook> quantizer{args, book, row, importance};
        if (!args.grid_given) {
            const Status status = quantizer.choose(n);
            if (status != Status::ok) return status;
        }
        if (args.codes && (args.grid_given || !quantizer.encodes_groups())) quantizer.encode_row(n);
    }
    end_stream();
    return Status::ok;
}

template <DType D>
Status quantize_typed(const QuantizeArgs& args, int64_t begin, int64_t end) {
    return args.codebook ? quantize_rows<D, true>(args, begin, end) : quantize_rows<D, false>(args, begin, end);
}

Status quantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
        case DType::f32: return quantize_typed<DType::f32>(args, begin, end);
        case DType::f16: return quantize_typed<DType::f16>(args, begin, end);
        default: return quantize_typed<DType::bf16>(args, begin, end);
    }
}

}  // namespace
