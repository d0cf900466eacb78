// Q2_K and Q3_K: sixteen sub-blocks of sixteen weights. A lane is a sub-block here, and the candidates come one
// after another: a pass over the weights serves every sub-block at once, and each lane keeps its own best.
//
// With few bits the codes matter more than the scales, and many choices of codes have to be looked at. Codes l
// leave sums (of l, l l, x l) from which the error of any scale and minimum follows without another pass:
//   E(s, p) = S(x x) - 2 s S(x l) + s s S(l l) + 2 p S(x) - 2 s p S(l) + p p S(1)     for x ~ s l - p.
// So the search alternates between codes (a pass) and the integers, d and dmin (sums alone).
#pragma once
#include "columns.h"
#include "qkern/gguf_blocks.h"

namespace {

using namespace qk;

// Q2_K --------------------------------------------------------------------------------------------------

constexpr float kTop2 = 3.0f, kTop4 = 15.0f;

// Weighted sums over a sub-block that a choice of codes l leaves.
struct Sums2 {
    Lanes l, ll, xl;
};

// x ~ scale * l - p; p is `low` or more, as minima are 0 or more.
struct Affine {
    Lanes scale, p;
};

// What a super-block of Q2_K stores, the sums of its codes and the error they leave.
struct Grid2 {
    float d, dmin;
    Lanes scale, minimum;
    Sums2 sums;
    Lanes error;
    float total;
};

// Codes clamp(rint(x * inverse + shift)).
template <bool kEven> inline Sums2 choose2(const Columns& t, const Lanes& inverse, const Lanes& shift) {
    Sums2 sums{};
    for (int i = 0; i < kRun; ++i) {
        const Lanes l = code_of(t.x[i] * inverse + shift, 0.0f, kTop2);
        const Lanes wl = kEven ? l : l * t.w[i];
        sums.l += wl;
        sums.ll += wl * l;
        sums.xl += (kEven ? t.x[i] : t.wx[i]) * l;
    }
    return sums;
}

inline Lanes error_of(const Columns& t, const Sums2& sums, const Lanes& s, const Lanes& p) {
    return (t.xx + p * (p * t.w1 + 2.0f * (t.x1 - s * sums.l))) + s * (s * sums.ll - 2.0f * sums.xl);
}

// The least-squares fit of codes, and where its minimum would be negative the best one without minimum.
inline Affine fit_of(const Columns& t, const Sums2& sums) {
    const Lanes squares = t.w1 * sums.ll, difference = squares - sums.l * sums.l;
    // Where all codes are alike this is rounding noise, and only the minimum can move.
    const Lanes determinant = select_less(difference, 1e-5f * squares, Lanes{}, difference);
    const Lanes scale = (t.w1 * sums.xl - sums.l * t.x1) * inverse_or_zero(determinant);
    const Lanes p = (scale * sums.l - t.x1) * t.inverse_w1;
    const Lanes edge = (sums.xl + t.low * sums.l) * inverse_or_zero(sums.ll);
    return {select_less(p, t.low, edge, scale), most(t.low, p)};
}

// The codes of stored integers, and what they leave.
template <bool kEven> inline void recode(const Columns& t, Grid2* grid) {
    const Lanes s = grid->scale * grid->d, p = grid->minimum * grid->dmin + t.low;
    const Lanes inverse = inverse_or_zero(s);
    grid->sums = choose2<kEven>(t, inverse, p * inverse);
    grid->error = error_of(t, grid->sums, s, p);
}

// In each lane the better of two.
inline void keep_better(const Grid2& next, Grid2* grid) {
    grid->sums.l = select_less(next.error, grid->error, next.sums.l, grid->sums.l);
    grid->sums.ll = select_less(next.error, grid->error, next.sums.ll, grid->sums.ll);
    grid->sums.xl = select_less(next.error, grid->error, next.sums.xl, grid->sums.xl);
    grid->scale = select_less(next.error, grid->error, next.scale, grid->scale);
    grid->minimum = select_less(next.error, grid->error, next.minimum, grid->minimum);
    grid->error = least(next.error, grid->error);
}

// Moves every sub-block to the best of its neighbours, whose codes are chosen anew.
const float kPairSteps[][2] = {{1, 0}, {-1, 0}, {0, 1}, {0, -1}, {1, 1}, {-1, -1}, {1, -1}, {-1, 1}};

template <bool kEven> inline void descend(const Columns& t, Grid2* grid, int steps) {
    Grid2 next = *grid;
    const Lanes scale = grid->scale, minimum = grid->minimum;
    for (int k = 0; k < steps; ++k) {
        next.scale = within(scale + kPairSteps[k][0], 0.0f, kTop4);
        next.minimum = within(minimum + kPairSteps[k][1], 0.0f, kTop4);
        recode<kEven>(t, &next);
        keep_better(next, grid);
    }
    grid->total = sum(grid->error);
}

// The integers that suit the codes of a fit: of the scales next to it, each with its best minimum.
inline void choose_integers(const Columns& t, const Sums2& sums, const Lanes& scale, Grid2* grid) {
    const Lanes nearest = code_of(scale * inverse_or_zero(grid->d), 0.0f, kTop4);
    const float inverse_dmin = inverse_or_zero(grid->dmin);
    grid->error = splat(kNoFit);
    for (int k = 0; k < 3; ++k) {
        // The nearest first, so that it wins ties.
        const Lanes a = within(nearest + (k == 2 ? -1.0f : static_cast<float>(k)), 0.0f, kTop4);
        const Lanes s = a * grid->d;
        const Lanes p = (s * sums.l - t.x1) * t.inverse_w1;
        const Lanes b = code_of((p - t.low) * inverse_dmin, 0.0f, kTop4);
        const Lanes error = error_of(t, sums, s, b * grid->dmin + t.low);
        grid->scale = select_less(error, grid->error, a, grid->scale);
        grid->minimum = select_less(error, grid->error, b, grid->minimum);
        grid->error = least(error, grid->error);
    }
}

// The d and dmin that suit the codes and integers best; false if there are none.
inline bool refit(const Columns& t, const Grid2& grid, float* d, float* dmin) {
    const Lanes al = grid.scale * grid.sums.l;
    const float aa = sum(grid.scale * (grid.scale * grid.sums.ll));
    const float ab = sum(grid.minimum * al);
    const float bb = sum(grid.minimum * (grid.minimum * t.w1));
    const float ax = sum(grid.scale * grid.sums.xl + t.low * al);
    const float bx = -sum(grid.minimum * (t.x1 + t.low * t.w1));
    const float determinant = aa * bb - ab * ab;
    float new_d, new_dmin = 0.0f;
    if (determinant > 1e-5f * (aa * bb)) {
        new_d = (ax * bb + bx * ab) / determinant;
        new_dmin = (bx * aa + ax * ab) / determinant;
    } else if (aa > 0.0f) {
        new_d = ax / aa;
    } else {
        return false;
    }
    if (!(new_d > 0.0f && new_dmin >= 0.0f && new_d < 65504.0f && new_dmin < 65504.0f)) return false;
    *d = unit_f16(new_d);
    *dmin = unit_f16(new_dmin);
    return true;
}

// Ends of the codes, in steps of the range from its own ends inwards. Codes beyond the range serve weights that lie at
// both ends and the middle; with importance it may be the outlier that does not count.
const float kInsets2[][2] = {{0.0f, 0.0f},  {0.25f, 0.0f},  {0.5f, 0.0f},  {0.75f, 0.0f},   //
                             {0.0f, 0.25f}, {0.25f, 0.25f}, {0.5f, 0.25f}, {0.75f, 0.25f},  //
                             {0.0f, 0.5f},  {0.25f, 0.5f},  {0.5f, 0.5f},  {0.75f, 0.5f},   //
                             {0.0f, 0.75f}, {0.25f, 0.75f}, {0.5f, 0.75f}, {0.75f, 0.75f},  //
                             {0.0f, -1.0f}, {-1.0f, 0.0f},  {0.0f, -0.5f}, {-0.5f, 0.0f},   //
                             {1.0f, 0.0f},  {0.0f, 1.0f}};
const float kInsetsWeighted2[][2] = {{1.5f, 0.0f}, {0.0f, 1.5f}, {1.0f, 1.0f}, {1.5f, 0.5f}, {0.5f, 1.5f}};
// d and dmin times these are the widest scale and the deepest minimum.
const float kWidest2[] = {15.0f, 14.0f, 14.5f, 15.5f, 16.0f, 16.5f, 17.0f, 17.5f, 18.0f, 19.0f, 20.0f};
const float kDeepest2[] = {14.0f, 14.5f, 15.5f, 16.0f, 17.0f, 18.0f, 19.0f};
// Where the rounding to integers multiplies the error by more than kCoarse2, true errors choose among these integers.
constexpr float kCoarse2 = 1.1f;
constexpr int kWidestCoarse2 = 15, kNarrowestCoarse2 = 10;
const float kDeepestCoarse2[] = {14.0f, 13.0f, 12.0f, 11.0f, 10.0f, 16.5f, 18.0f, 20.0f};
// With importance some minima lie much too deep.
const float kDeepestWeighted2[] = {18.0f, 22.0f, 27.0f, 34.0f};

// Each sub-block alone: the best of the codes that start from `insets`; beyond the range only with `penalty`.
template <bool kEven, int kCount>
inline void fit_codes(const Columns& t, const Lanes& inverse, const float (&insets)[kCount][2], const Lanes& penalty,
                      Affine* fit, Lanes* error) {
    for (const auto& inset : insets) {
        const float stretch = kTop2 / (kTop2 - inset[0] - inset[1]);
        const Sums2 sums = choose2<kEven>(t, inverse * stretch, splat(-inset[0] * stretch));
        const Affine fitted = fit_of(t, sums);
        Lanes left = error_of(t, sums, fitted.scale, fitted.p);
        if (inset[0] < 0.0f || inset[1] < 0.0f) left = left * penalty;
        fit->scale = select_less(left, *error, fitted.scale, fit->scale);
        fit->p = select_less(left, *error, fitted.p, fit->p);
        *error = least(left, *error);
    }
}

// What codes leave, and the scale that suits them.
struct Start2 {
    Sums2 sums;
    Lanes scale;
};

// Integers for a d and dmin of which the codes of the fits may know little: those of the start that is best with true
// codes, d and dmin of their own, the neighbours. Replaces `best` if better.
template <bool kEven>
inline void try_grid(const Columns& t, const Start2* starts, int count, float d, float dmin, Grid2* best) {
    Grid2 grid{}, next{};
    grid.d = next.d = unit_f16(d);
    grid.dmin = next.dmin = unit_f16(dmin);
    grid.error = splat(kNoFit);
    for (int k = 0; k < count; ++k) {
        choose_integers(t, starts[k].sums, starts[k].scale, &next);
        recode<kEven>(t, &next);
        keep_better(next, &grid);
    }
    if (!kEven) descend<kEven>(t, &grid, 4);  // with importance more sub-blocks are far from their best
    if (refit(t, grid, &grid.d, &grid.dmin)) recode<kEven>(t, &grid);
    descend<kEven>(t, &grid, 8);
    if (grid.total < best->total) *best = grid;
}

// A super-block of which one sub-block is much wider than others: a few steps of d and of dmin are all that the others
// have, and the wide one decides on them. Usually a single weight makes it wide. Then codes from 0 to 3, 2 or 1 fit it
// about equally well, with ever larger scales; d is one of these scales over an integer, and dmin its minimum over one.
template <bool kEven>
QK_RARE void fit_coarse(const Columns& t, const Lanes& inverse, const Start2& fit, Grid2* best) {
    constexpr int kStarts = 4;
    Start2 starts[kStarts] = {fit};
    for (int top = 1; top < kStarts; ++top) {
        starts[top].sums = choose2<kEven>(t, inverse * (static_cast<float>(top) / kTop2), Lanes{});
        starts[top].scale = fit_of(t, starts[top].sums).scale;
    }
    const float deepest = largest(-t.low);
    for (int top = kStarts - 1; top > 0; --top) {
        const float widest = largest(starts[top].scale);
        for (int a = kWidestCoarse2; a >= kNarrowestCoarse2; --a) {
            try_grid<kEven>(t, starts, kStarts, widest / static_cast<float>(a), deepest / kTop4, best);
        }
    }
    for (const float b : kDeepestCoarse2) try_grid<kEven>(t, starts, kStarts, best->d, deepest / b, best);
}

template <bool kEven> inline void encode_q2(const float* x, const float* w, BlockQ2_K* block) {
    Columns t;
    transpose(x, kRun, t.x);
    if (!kEven) transpose(w, kRun, t.w);
    t.low = Lanes{};
    Lanes high = t.x[0];
    for (int i = 0; i < kRun; ++i) {
        t.low = least(t.x[i], t.low);
        high = most(t.x[i], high);
    }
    for (int i = 0; i < kRun; ++i) t.x[i] = t.x[i] - t.low;
    high = high - t.low;
    add_up<kEven>(&t);

    const Lanes inverse = select_less(splat(kTiny), high, kTop2 / high, Lanes{});
    Affine fit{Lanes{}, Lanes{}};
    Lanes error = splat(kNoFit);
    // A sub-block much wider than the others makes their integers small; codes beyond its range must be worth it.
    const Lanes penalty = select_less(splat(sum(high) * (1.5f / kRun)), high, splat(1.25f), splat(1.0f));
    fit_codes<kEven>(t, inverse, kInsets2, penalty, &fit, &error);
    if (!kEven) fit_codes<kEven>(t, inverse, kInsetsWeighted2, penalty, &fit, &error);
    Sums2 sums{};
    for (int r = 0; r < 2; ++r) {
        const Lanes unit = inverse_or_zero(fit.scale);
        sums = choose2<kEven>(t, unit, fit.p * unit);
        fit = fit_of(t, sums);
    }

    // d and dmin by these codes; the largest of the integers need not reach 15, nor stay below it.
    const float widest = largest(fit.scale), deepest = largest(fit.p - t.low);
    Grid2 best{}, next{};
    best.total = kNoFit;
    next.dmin = unit_f16(deepest / kTop4);
    for (const float top : kWidest2) {
        next.d = unit_f16(widest / top);
        choose_integers(t, sums, fit.scale, &next);
        next.total = sum(next.error);
        if (next.total < best.total) best = next;
    }
    next.d = best.d;
    for (const float top : kDeepest2) {
        next.dmin = unit_f16(deepest / top);
        choose_integers(t, sums, fit.scale, &next);
        next.total = sum(next.error);
        if (next.total < best.total) best = next;
    }
    const bool coarse = best.total > kCoarse2 * sum(error_of(t, sums, fit.scale, fit.p));
    // True codes for the stored integers, their neighbours, and d and dmin again.
    recode<kEven>(t, &best);
    descend<kEven>(t, &best, 8);
    const Start2 start{sums, fit.scale};
    if (coarse) {
        fit_coarse<kEven>(t, inverse, start, &best);
    } else if (!kEven) {
        for (const float b : kDeepestWeighted2) try_grid<kEven>(t, &start, 1, best.d, deepest / b, &best);
    }
    for (int r = 0; r < 2; ++r) {
        next = best;
        if (!refit(t, best, &next.d, &next.dmin)) break;
        recode<kEven>(t, &next);
        descend<kEven>(t, &next, 8);
        if (!(next.total < best.total)) break;
        best = next;
    }

    Lanes codes[kRun];
    const Lanes unit = inverse_or_zero(best.scale * best.d), shift = (best.minimum * best.dmin + t.low) * unit;
    for (int i = 0; i < kRun; ++i) codes[i] = code_of(t.x[i] * unit + shift, 0.0f, kTop2);
    uint8_t bytes[kSuper];
    bytes_of(codes, bytes);
    pack_quads(bytes, block->qs);
    float scales[kLanes];
    const Lanes both = best.scale + 16.0f * best.minimum;
    memcpy(scales, &both, sizeof(scales));
    for (int j = 0; j < kRun; ++j) block->scales[j] = static_cast<uint8_t>(static_cast<int32_t>(scales[j]));
    block->d = to_f16(best.d);
    block->dmin = to_f16(best.dmin);
}

inline void encode_block(const float* x, const float* w, BlockQ2_K* block) {
    return is_even(w) ? encode_q2<true>(x, w, block) : encode_q2<false>(x, w, block);
}

// Q3_K --------------------------------------------------------------------------------------------------

constexpr float kLow3 = -4.0f, kHigh3 = 3.0f;

// Weighted sums over a sub-block that a choice of codes l leaves.
struct Sums3 {
    Lanes ll, xl;
};

// What a super-block of Q3_K stores, the sums of its codes and the error they leave.
struct Grid3 {
    float d;
    Lanes scale;
    Sums3 sums;
    Lanes error;
    float total;
};

template <bool kEven> inline Sums3 choose3(const Columns& t, const Lanes& inverse) {
    Sums3 sums{};
    for (int i = 0; i < kRun; ++i) {
        const Lanes l = code_of(t.x[i] * inverse, kLow3, kHigh3);
        sums.ll += kEven ? l * l : (l * t.w[i]) * l;
        sums.xl += (kEven ? t.x[i] : t.wx[i]) * l;
    }
    return sums;
}

// Of codes for scale and -scale; those of the latter negated, so that both belong to `scale`.
template <bool kEven> inline void choose_both(const Columns& t, const Lanes& inverse, Sums3* down, Sums3* up) {
    *down = *up = Sums3{};
    for (int i = 0; i < kRun; ++i) {
        const Lanes whole = round(within(t.x[i] * inverse, kLow3, -kLow3));
        const Lanes l = least(splat(kHigh3), whole), m = most(splat(-kHigh3), whole);
        const Lanes wx = kEven ? t.x[i] : t.wx[i];
        down->ll += kEven ? l * l : (l * t.w[i]) * l;
        down->xl += wx * l;
        up->ll += kEven ? m * m : (m * t.w[i]) * m;
        up->xl += wx * m;
    }
}

template <bool kEven> inline void recode(const Columns& t, Grid3* grid) {
    const Lanes s = grid->scale * grid->d;
    grid->sums = choose3<kEven>(t, inverse_or_zero(s));
    grid->error = t.xx + s * (s * grid->sums.ll - 2.0f * grid->sums.xl);
}

// In each lane the better of two.
inline void keep_better(const Grid3& next, Grid3* grid) {
    grid->sums.ll = select_less(next.error, grid->error, next.sums.ll, grid->sums.ll);
    grid->sums.xl = select_less(next.error, grid->error, next.sums.xl, grid->sums.xl);
    grid->scale = select_less(next.error, grid->error, next.scale, grid->scale);
    grid->error = least(next.error, grid->error);
}

// Moves every sub-block to the best of the scales within `reach`, whose codes are chosen anew.
template <bool kEven> inline void descend(const Columns& t, Grid3* grid, int reach) {
    const Lanes scale = grid->scale;
    Grid3 next = *grid;
    for (int k = 1; k <= 2 * reach; ++k) {
        const int step = k % 2 ? (k + 1) / 2 : -k / 2;
        next.scale = within(scale + static_cast<float>(step), kLowScale, kHighScale);
        recode<kEven>(t, &next);
        keep_better(next, grid);
    }
    grid->total = sum(grid->error);
}

// Codes that the weight of largest magnitude is mapped to, over -4; both signs are tried. Importance may lie on the
// other weights, so that more of them are worth a look.
const float kReach3[] = {0.70f, 0.78f, 0.84f, 0.89f, 0.94f, 0.98f, 1.02f, 1.07f, 1.12f, 1.20f};
const float kReachWeighted3[] = {0.65f, 0.70f, 0.74f,  0.78f, 0.81f, 0.84f, 0.865f, 0.89f, 0.915f, 0.94f, 0.96f,
                                 0.98f, 1.00f, 1.02f, 1.045f, 1.07f, 1.095f, 1.12f, 1.15f, 1.20f,  1.25f, 1.30f};
// The same for the weight that counts most.
const float kReachAnchor3[] = {1.0f, 0.87f, 0.75f, 0.62f, 0.5f, 0.37f, 0.25f};

// The d that suits the codes and integers best.
inline float refit(const Grid3& grid) {
    const float squares = sum(grid.scale * (grid.scale * grid.sums.ll));
    return unit_f16(sum(grid.scale * grid.sums.xl) * inverse_or_zero(squares));
}

// The best scales so far, and by how much they are better than nothing.
struct Best3 {
    Lanes scale, gain;
};

template <bool kEven, int kCount>
inline void fit_scales(const Columns& t, const Lanes& inverse, const float (&reaches)[kCount], Best3* best) {
    for (const float reach : reaches) {
        Sums3 down, up;
        choose_both<kEven>(t, inverse * reach, &down, &up);
        const Lanes scale = down.xl * inverse_or_zero(down.ll), gain = scale * down.xl;
        best->scale = select_less(best->gain, gain, scale, best->scale);
        best->gain = most(gain, best->gain);
        const Lanes other = up.xl * inverse_or_zero(up.ll), other_gain = other * up.xl;
        best->scale = select_less(best->gain, other_gain, -other, best->scale);
        best->gain = most(other_gain, best->gain);
    }
}

// Codes per unit of weight that map the value to -4; 0 where no fp16 scale holds it.
inline Lanes inverse_of(const Lanes& value) {
    return select_less(splat(kTiny), most(value, -value), kLow3 / value, Lanes{});
}

// Where one sub-block is much wider than others, d is this code and so many of its steps for the farthest weight.
constexpr int kFirstCoarse3 = 14, kLastCoarse3 = 37;
// Codes that the farthest weight of such a sub-block may have: it alone decides on the scale, and with each of these
// the fit is about as good, but the integers are others.
const float kFarthest3[] = {-4.0f, 3.0f, -2.0f};

// Scales for a d of which the fits know little. Replaces `best` if better.
template <bool kEven>
inline void try_grid(const Columns& t, const Lanes& fit, const Lanes& farthest, float d, Grid3* best) {
    Grid3 grid{}, next{};
    grid.d = next.d = d;
    const Lanes inverse = splat(inverse_or_zero(d));
    grid.scale = code_of(fit * inverse, kLowScale, kHighScale);
    recode<kEven>(t, &grid);
    for (const float code : kFarthest3) {
        next.scale = code_of(farthest * (1.0f / code) * inverse, kLowScale, kHighScale);
        recode<kEven>(t, &next);
        keep_better(next, &grid);
    }
    descend<kEven>(t, &grid, 1);
    grid.d = refit(grid);
    recode<kEven>(t, &grid);
    descend<kEven>(t, &grid, 2);
    if (grid.total < best->total) *best = grid;
}

template <bool kEven>
QK_RARE void fit_coarse(const Columns& t, const Lanes& fit, const Lanes& farthest, Grid3* best) {
    const float down = largest(-farthest), up = largest(farthest), extreme = down > up ? -down : up;
    for (int steps = kFirstCoarse3; steps < kLastCoarse3; ++steps) {
        try_grid<kEven>(t, fit, farthest, unit_f16(extreme / (kLow3 * static_cast<float>(-steps))), best);
    }
}

template <bool kEven> inline void encode_q3(const float* x, const float* w, BlockQ3_K* block) {
    Columns t;
    transpose(x, kRun, t.x);
    if (!kEven) transpose(w, kRun, t.w);
    add_up<kEven>(&t);
    constexpr int kReachScale = kEven ? 1 : 3, kRounds = kEven ? 1 : 2;
    Lanes low = t.x[0], high = t.x[0];
    for (int i = 1; i < kRun; ++i) {
        low = least(t.x[i], low);
        high = most(t.x[i], high);
    }
    Best3 found{};
    const Lanes inverse = inverse_of(select_less(high, -low, low, high));
    if (kEven) {
        fit_scales<kEven>(t, inverse, kReach3, &found);
    } else {
        fit_scales<kEven>(t, inverse, kReachWeighted3, &found);
        Lanes heaviest{}, anchor{};
        for (int i = 0; i < kRun; ++i) {
            const Lanes weight = t.wx[i] * t.x[i];
            anchor = select_less(heaviest, weight, t.x[i], anchor);
            heaviest = most(weight, heaviest);
        }
        fit_scales<kEven>(t, inverse_of(anchor), kReachAnchor3, &found);
    }
    const Sums3 sums = choose3<kEven>(t, inverse_or_zero(found.scale));
    const Lanes fit = sums.xl * inverse_or_zero(sums.ll);

    // The widest sub-block gets about -32, the longer side.
    const float down = largest(-fit), up = largest(fit), widest = down > up ? -down : up;
    const float fitted = sum(t.xx - fit * sums.xl);
    float cost;
    Grid3 best{}, next{};
    float fits[kRun], weights[kRun];
    memcpy(fits, &fit, sizeof(fits));
    memcpy(weights, &sums.ll, sizeof(weights));
    best.d = choose_d(fits, weights, kRun, widest, &cost);
    best.scale = code_of(fit * inverse_or_zero(best.d), kLowScale, kHighScale);
    recode<kEven>(t, &best);
    descend<kEven>(t, &best, kReachScale);
    if (cost > kCoarseScales * fitted) {
        fit_coarse<kEven>(t, fit, select_less(high, -low, low, high), &best);
    }
    for (int r = 0; r < kRounds; ++r) {
        next = best;
        next.d = refit(best);
        recode<kEven>(t, &next);
        descend<kEven>(t, &next, kReachScale);
        if (!(next.total < best.total)) break;
        best = next;
    }

    Lanes codes[kRun];
    const Lanes unit = inverse_or_zero(best.scale * best.d);
    for (int i = 0; i < kRun; ++i) codes[i] = code_of(t.x[i] * unit, kLow3, kHigh3) - kLow3;
    uint8_t bytes[kSuper];
    bytes_of(codes, bytes);
    pack_quads(bytes, block->qs);
    for (int i = 0; i < 32; ++i) {
        int bits = 0;
        for (int j = 0; j < 8; ++j) bits |= (bytes[32 * j + i] >> 2) << j;
        block->hmask[i] = static_cast<uint8_t>(bits);
    }
    float values[kLanes];
    memcpy(values, &best.scale, sizeof(values));
    int scales[kLanes];
    for (int j = 0; j < kRun; ++j) scales[j] = static_cast<int>(values[j]) + 32;
    for (int j = 0; j < 8; ++j) block->scales[j] = static_cast<uint8_t>((scales[j] & 15) | (scales[j + 8] & 15) << 4);
    for (int j = 0; j < 4; ++j) {
        block->scales[8 + j] = static_cast<uint8_t>(scales[j] >> 4 | scales[4 + j] >> 4 << 2 | scales[8 + j] >> 4 << 4 |
                                                    scales[12 + j] >> 4 << 6);
    }
    block->d = to_f16(best.d);
}

inline void encode_block(const float* x, const float* w, BlockQ3_K* block) {
    return is_even(w) ? encode_q3<true>(x, w, block) : encode_q3<false>(x, w, block);
}

}  // namespace
