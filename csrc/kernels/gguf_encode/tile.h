// Sixteen blocks side by side, and the fits of a scale (and offset) to a run of their weights. Lane c of
// weight i is weight i of block c; candidates are tried one after another, in all blocks at once. No lane
// ever looks at another, so that a block's bytes do not depend on its neighbours, and nothing is summed or
// compared across lanes.
//
// A candidate fixes the codes l of a run. All that has to be known about them are a few sums: the error of
// any scale and offset with these codes is a quadratic in the two, with its minimum at the least-squares fit.
#pragma once
#include "search.h"

namespace {

constexpr float kEven = 1.0f / 256;

// `length` weights of sixteen blocks, in runs of `group`. In each run the importance is relative to its
// largest, which is `share` of the block's largest. A run without any counts evenly, and a little.
template <int length, int group> struct Tile {
    static constexpr int kRuns = length / group;
    Lanes x[length], w[length], share[kRuns];
    bool even;

    const Lanes* weights(int run) const { return even ? nullptr : w + run * group; }

    // Block c begins at x[c * length], its importance at importance[(first + c) % period * length].
    void load(const float* from, const float* importance, int64_t first, int64_t period, int count) {
        gather(x, from, 0, count, count);
        even = !importance;
        if (even) {
            for (int r = 0; r < kRuns; ++r) share[r] = splat(kEven);
            return;
        }
        gather(w, importance, first, period, count);
        Lanes peak{};
        for (int r = 0; r < kRuns; ++r) {
            Lanes* run = w + r * group;
            Lanes most = run[0];
            for (int i = 1; i < group; ++i) most = greater(most, run[i]);
            for (int i = 0; i < group; ++i) run[i] = select_less(Lanes{}, most, run[i] / most, splat(1.0f));
            share[r] = most;
            peak = greater(peak, most);
        }
        for (int r = 0; r < kRuns; ++r) {
            share[r] = select_less(Lanes{}, share[r], share[r] / peak, splat(kEven));
        }
    }

  private:
    // Lanes beyond `count` repeat the last block.
    static void gather(Lanes* to, const float* from, int64_t first, int64_t period, int count) {
        if (count == kLanes && first % period + kLanes <= period) {
            const float* blocks = from + first % period * length;
            for (int i = 0; i < length; i += kLanes) transpose(blocks + i, length, to + i);
            return;
        }
        for (int c = 0; c < kLanes; ++c) {
            const float* block = from + (first + (c < count ? c : count - 1)) % period * length;
            float* lane = reinterpret_cast<float*>(to) + c;
            for (int i = 0; i < length; ++i) lane[i * kLanes] = block[i];
        }
    }
};

// 1 / scale, and 0 for scales that fp16 cannot hold.
inline Lanes code_units(const Lanes& scale) {
    return select_less(splat(kTiny), greater(scale, -scale), 1.0f / scale, Lanes{});
}

// The same stretch of sixteen blocks; no `w` if all count alike.
struct Run {
    const Lanes *x, *w;
    int n;
};

inline Lanes weigh(const Run& run, int i, const Lanes& value) { return run.w ? run.w[i] * value : value; }

// The value of largest magnitude, with its sign.
inline Lanes extreme_of(const Run& run) {
    Lanes low = run.x[0], high = run.x[0];
    for (int i = 1; i < run.n; ++i) {
        low = lesser(low, run.x[i]);
        high = greater(high, run.x[i]);
    }
    return select_less(high, -low, low, high);
}

// The error of a scale and offset as they are stored. Nothing cancels, as it does in the fits where they leave
// next to nothing.
inline Lanes stored_error(const Run& run, const Lanes& scale, const Lanes& offset, float low, float high) {
    const Lanes inverse = inverse_or_zero(scale);
    Lanes error{};
    for (int i = 0; i < run.n; ++i) {
        const Lanes shifted = run.x[i] - offset;
        const Lanes r = shifted - snap(shifted * inverse, low, high) * scale;
        error += weigh(run, i, r) * r;
    }
    return error;
}

// x ~ scale * l ---------------------------------------------------------------------------------------------

// With these codes a scale s leaves error + ll * (s - scale)^2.
struct Ray {
    Lanes error, scale, ll;
};

// The codes are the nearest of low..high at `inverse` code units per unit of weight.
inline Ray fit_ray(const Run& run, const Lanes& xx, const Lanes& inverse, float low, float high) {
    Lanes ll{}, xl{};
    for (int i = 0; i < run.n; ++i) {
        const Lanes l = snap(run.x[i] * inverse, low, high);
        const Lanes wl = weigh(run, i, l);
        ll += wl * l;
        xl += wl * run.x[i];
    }
    const Lanes scale = xl * inverse_or_zero(ll);
    return {greater(xx - scale * xl, Lanes{}), scale, ll};
}

inline void keep_better(const Ray& ray, Ray* best) {
    const Lanes least = best->error;
    best->error = select_less(ray.error, least, ray.error, least);
    best->scale = select_less(ray.error, least, ray.scale, best->scale);
    best->ll = select_less(ray.error, least, ray.ll, best->ll);
}

inline Lanes weight_of(const Run& run) {
    Lanes sum{};
    for (int i = 0; i < run.n; ++i) sum += weigh(run, i, splat(1.0f));
    return sum;
}

inline Lanes squares(const Run& run) {
    Lanes xx{};
    for (int i = 0; i < run.n; ++i) xx += weigh(run, i, run.x[i]) * run.x[i];
    return xx;
}

// x ~ scale * l + offset ------------------------------------------------------------------------------------

// With these codes an offset o asks for the scale s(o) = scale - slope * (o - offset), and any scale s leaves
// error + stiff * (o - offset)^2 + ll * (s - s(o))^2.
struct Line {
    Lanes error, scale, offset, slope, stiff, ll;
};

// A run, its weights x less their mean: sums of small numbers lose less.
struct Centered {
    Run run;
    Lanes mean, inverse_weight, weight, xx;
    Lanes low, high;
};

inline Centered center(Lanes* x, const Lanes* w, int n) {
    Centered run{{x, w, n}, Lanes{}, Lanes{}, Lanes{}, Lanes{}, x[0], x[0]};
    Lanes sum{};
    for (int i = 0; i < n; ++i) {
        run.weight += weigh(run.run, i, splat(1.0f));
        sum += weigh(run.run, i, x[i]);
        run.low = lesser(run.low, x[i]);
        run.high = greater(run.high, x[i]);
    }
    run.inverse_weight = 1.0f / run.weight;
    run.mean = sum * run.inverse_weight;
    run.low = run.low - run.mean;
    run.high = run.high - run.mean;
    for (int i = 0; i < n; ++i) {
        x[i] = x[i] - run.mean;
        run.xx += weigh(run.run, i, x[i]) * x[i];
    }
    return run;
}

// The map of weights (less their mean) to code units: x * inverse + shift.
struct Map {
    Lanes inverse, shift;
};

inline Map map_of(const Centered& run, const Lanes& scale, const Lanes& offset) {
    const Lanes inverse = code_units(scale);
    return {inverse, (run.mean - offset) * inverse};
}

inline Line fit_line(const Centered& run, const Map& map, float top) {
    Lanes l1{}, ll{}, xl{};
    for (int i = 0; i < run.run.n; ++i) {
        const Lanes x = run.run.x[i];
        const Lanes l = snap(x * map.inverse + map.shift, 0.0f, top);
        const Lanes wl = weigh(run.run, i, l);
        l1 += wl;
        ll += wl * l;
        xl += wl * x;
    }
    const Lanes center = l1 * run.inverse_weight, inverse_ll = inverse_or_zero(ll);
    // Where all codes are alike the spread is rounding noise, and only the offset can move.
    const Lanes noisy = ll - l1 * center;
    const Lanes spread = select_less(noisy, 1e-5f * ll, Lanes{}, noisy);
    Line line;
    line.scale = xl * inverse_or_zero(spread);
    line.offset = run.mean - line.scale * center;
    line.error = greater(run.xx - line.scale * xl, Lanes{});
    line.slope = l1 * inverse_ll;
    line.stiff = select_less(Lanes{}, ll, run.weight * spread * inverse_ll, run.weight);
    line.ll = ll;
    return line;
}

// Code units by which a candidate's ends lie inside the range that another one maps to 0..top: the end that is
// farther from the mean, where an outlier is, and the nearer one.
struct Inset {
    float far, near;
};

inline Map inset(const Centered& run, const Map& map, const Inset& ends, float top) {
    const float stretch = top / (top - ends.far - ends.near);
    const Lanes low = select_less(-run.low, run.high, splat(ends.near), splat(ends.far));
    return {map.inverse * stretch, (map.shift - low) * stretch};
}

// Candidates of 16 and of 32 codes, by greedy choice: each entry is the one that lowers the error of Gaussian,
// heavy-tailed and outlier-ridden runs most, with and without importance, given those before it. The first
// are against the range of the run, the fine ones around the best so far.
constexpr int kCoarse = 48, kFine = 10, kFiner = 6, kNarrow = 4, kLater = kNarrow + kFine + kFiner;
constexpr Inset kCoarseEnds[2][kCoarse] = {
    {{0.25f, 0.25f}, {0.5f, -0.25f}, {0.0f, 0.5f}, {0.25f, 0.0f}, {0.0f, -1.0f}, {2.0f, 0.0f}, {1.25f, 0.25f},
     {-0.25f, 0.0f}, {0.0f, 0.75f}, {-2.25f, -1.0f}, {1.0f, 0.5f}, {0.0f, -2.25f}, {3.0f, 0.0f}, {1.5f, 0.0f},
     {0.25f, 1.25f}, {-1.25f, 0.25f}, {2.75f, 0.25f}, {0.25f, 1.75f}, {0.0f, -0.25f}, {0.25f, -1.0f},
     {0.0f, 0.25f}, {0.75f, 1.0f}, {3.0f, -0.25f}, {1.0f, 2.5f}, {3.0f, 0.5f}, {0.75f, 0.0f}, {0.75f, 0.75f},
     {-1.0f, -0.75f}, {2.0f, -0.25f}, {0.25f, 1.5f}, {0.75f, 0.25f}, {0.0f, 0.0f}, {0.0f, -0.5f},
     {-2.5f, -1.5f}, {-2.0f, -2.25f}, {2.0f, 0.5f}, {0.0f, 2.75f}, {-1.0f, -0.25f}, {0.25f, 0.5f},
     {2.25f, 1.25f}, {-0.5f, 0.25f}, {2.75f, 1.0f}, {-1.0f, 0.25f}, {-2.5f, -0.75f}, {0.25f, 2.25f},
     {1.25f, 0.0f}, {0.25f, -0.25f}, {-0.25f, 0.75f}},
    {{0.0f, 0.0f}, {0.25f, -0.75f}, {0.25f, -0.25f}, {0.0f, 0.5f}, {0.0f, -2.0f}, {0.0f, -1.25f},
     {0.75f, 0.25f}, {-1.25f, -2.0f}, {2.0f, 0.0f}, {0.25f, -2.25f}, {1.0f, 0.0f}, {0.0f, 0.25f},
     {-2.25f, -2.25f}, {-1.25f, -2.5f}, {3.0f, 0.0f}, {0.0f, -0.75f}, {0.0f, 0.75f}, {-0.75f, -0.25f},
     {0.0f, 1.5f}, {0.0f, -0.25f}, {3.0f, 0.5f}, {-2.5f, 0.25f}, {0.5f, 2.25f}, {1.75f, 0.25f},
     {-0.25f, -1.25f}, {-1.75f, -2.25f}, {3.0f, 2.0f}, {-2.0f, -1.0f}, {-0.25f, 0.0f}, {0.0f, -0.5f},
     {0.5f, 1.0f}, {0.25f, 0.0f}, {0.5f, 0.5f}, {1.25f, -0.25f}, {-1.0f, -1.5f}, {0.75f, 0.0f}, {-2.0f, -1.5f},
     {0.25f, -2.0f}, {-2.25f, -2.0f}, {-0.25f, 0.25f}, {0.5f, 1.25f}, {-0.5f, -1.0f}, {0.5f, 3.0f},
     {1.0f, 2.5f}, {3.0f, 0.25f}, {2.0f, 0.5f}, {2.75f, 1.0f}, {3.0f, -0.25f}}};
constexpr Inset kFineEnds[2][kFine] = {
    {{0.0f, 0.0f}, {0.9f, 0.0f}, {1.2f, -0.75f}, {0.15f, 0.0f}, {-0.3f, -0.15f}, {1.8f, 0.9f}, {0.15f, 0.15f},
     {1.5f, -0.15f}, {-0.45f, 1.05f}, {1.05f, 1.8f}},
    {{0.0f, 0.0f}, {-1.65f, -0.3f}, {0.15f, 0.0f}, {0.0f, 0.15f}, {-0.3f, -0.15f}, {-0.45f, 1.05f},
     {1.2f, -0.75f}, {-0.9f, 1.05f}, {-1.5f, -1.5f}, {0.3f, 0.15f}}};
constexpr Inset kFinerEnds[2][kFiner] = {
    {{0.2f, 0.1f}, {-0.1f, 0.0f}, {1.0f, -1.0f}, {-0.1f, -0.2f}, {-1.0f, -0.2f}, {0.4f, 0.4f}},
    {{-0.1f, -0.1f}, {0.1f, 0.1f}, {-0.7f, 1.0f}, {1.0f, -1.0f}, {-1.0f, -0.9f}, {-0.2f, -1.0f}}};

// Where a few weights have nearly all of the importance the range says little. Four steps, in equal ratios, lead
// from it to so many standard deviations on either side of the mean; `whole` is the ratio of the two.
constexpr float kDeviations = 2.2f;

struct Narrowing {
    Lanes factors[kNarrow];

    explicit Narrowing(const Lanes& whole) {
        const Lanes half = root(whole);
        factors[0] = root(half);
        factors[1] = half;
        factors[2] = half * factors[0];
        factors[3] = whole;
    }
};

// The best fit so far, and what it says about its codes. With `below_zero` the offset is at most 0 (K-quants
// subtract a minimum that is at least 0).
struct Best {
    Lanes error, scale, offset;
    Line line;
};

inline void keep_better(const Line& line, bool below_zero, Best* best) {
    Lanes error = line.error, scale = line.scale, offset = line.offset;
    if (below_zero) {
        const Lanes above = greater(offset, Lanes{});
        error += line.stiff * above * above;
        scale += line.slope * above;
        offset = offset - above;
    }
    const Lanes least = best->error;
    best->error = select_less(error, least, error, least);
    best->scale = select_less(error, least, scale, best->scale);
    best->offset = select_less(error, least, offset, best->offset);
    best->line.error = select_less(error, least, line.error, best->line.error);
    best->line.scale = select_less(error, least, line.scale, best->line.scale);
    best->line.offset = select_less(error, least, line.offset, best->line.offset);
    best->line.slope = select_less(error, least, line.slope, best->line.slope);
    best->line.stiff = select_less(error, least, line.stiff, best->line.stiff);
    best->line.ll = select_less(error, least, line.ll, best->line.ll);
}

// Searches a run with the first `coarse` of the candidates and all later ones; leaves them in `lines`, if given.
inline Best fit_lines(const Centered& run, float top, bool k_quant, int coarse, Line* lines) {
    const int levels = top > 15.0f;
    const Lanes low = k_quant ? lesser(run.low, -run.mean) : run.low;
    const Lanes span = run.high - low;
    const Lanes step = select_less(splat(kTiny), span, span * (1.0f / top), Lanes{});
    Best best{splat(kNoFit), Lanes{}, low + run.mean, {}};
    Line line;
    const auto consider = [&](const Map& map) {
        line = fit_line(run, map, top);
        keep_better(line, k_quant, &best);
        if (lines) *lines++ = line;
    };
    const auto try_around = [&](const Map& map, const Inset* ends, int count) {
        for (int k = 0; k < count; ++k) consider(inset(run, map, ends[k], top));
    };
    const Map range = map_of(run, step, low + run.mean);
    try_around(range, kCoarseEnds[levels], coarse);
    const Lanes deviation = root(run.xx * run.inverse_weight);
    for (const Lanes& factor : Narrowing(span * inverse_or_zero(2.0f * kDeviations * deviation)).factors) {
        consider({range.inverse * factor, range.shift});
    }
    try_around(map_of(run, best.scale, best.offset), kFineEnds[levels], kFine);
    try_around(map_of(run, best.scale, best.offset), kFinerEnds[levels], kFiner);
    return best;
}

// The lanes of `chosen` that are positive cost nothing more, the others too much for any candidate.
inline Lanes closed_but(const Lanes& chosen) { return select_less(Lanes{}, chosen, Lanes{}, splat(kNoFit)); }

// Searches a K-quant's run that alone makes for much of the error: its range takes 1.25 to 0.67 times as many codes as
// there are, in equal ratios, each from four places between two codes. `closed` is added to every error.
constexpr int kRungs = 24, kPlaces = 4;
constexpr float kFirstRung = 0.8f, kNextRung = 1.0265f;

QK_RARE void fit_lines_closely(const Centered& run, float top, const Lanes& closed, Best* best) {
    const Lanes low = lesser(run.low, -run.mean), span = run.high - low;
    const Lanes step = select_less(splat(kTiny), span, span * (1.0f / top), Lanes{});
    const Map range = map_of(run, step, low + run.mean);
    const auto consider = [&](const Map& map) {
        Line line = fit_line(run, map, top);
        line.error += closed;
        keep_better(line, true, best);
    };
    float rung = kFirstRung;
    for (int k = 0; k < kRungs; ++k, rung *= kNextRung) {
        const Lanes shift = round(range.shift * rung);
        for (int p = 0; p < kPlaces; ++p) {
            consider({range.inverse * rung, shift + static_cast<float>(p) * (1.0f / kPlaces)});
        }
    }
    for (int k = 0; k < 2; ++k) consider(map_of(run, best->scale, best->offset));
}

}  // namespace
