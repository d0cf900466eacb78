// The 256-weight super-blocks: Q4_K and Q5_K (8 x 32, scales and minima of 6 bits), Q6_K (16 x 16, scales of
// 8 bits). Each search has the same three steps: fit every sub-block alone and keep what each candidate says;
// look for the super-block's fp16 scales for which the candidates' best integers leave least; then choose
// codes, integers and fp16 scales in turn.
#pragma once
#include "qkern/gguf_blocks.h"
#include "tile.h"

namespace {

using namespace qk;

constexpr int kSuper = 256;

// Q4_K, Q5_K --------------------------------------------------------------------------------------------

constexpr int kSub = 32;
constexpr int kSubs = kSuper / kSub;
constexpr float kTop6 = 63.0f;

// What the super-blocks store: d and dmin are fp16 values. `error` is of each sub-block, with what it counts.
struct Grid {
    Lanes d, dmin;
    Lanes scale[kSubs], minimum[kSubs], error[kSubs];
};

// The integers next to a line's fit, if they leave less than those of the grid.
inline void keep_better(const Line& line, int j, Grid* grid) {
    const Lanes inverse_d = inverse_or_zero(grid->d), inverse_dmin = inverse_or_zero(grid->dmin);
    const Lanes minimum = clamp_round(-line.offset * inverse_dmin, 0.0f, kTop6);
    const Lanes move = -(minimum * grid->dmin) - line.offset;
    const Lanes target = line.scale - line.slope * move;
    const Lanes scale = clamp_round(target * inverse_d, 0.0f, kTop6);
    const Lanes miss = scale * grid->d - target;
    const Lanes error = (line.error + (line.stiff * move) * move) + (line.ll * miss) * miss;
    const Lanes least = grid->error[j];
    grid->error[j] = select_less(error, least, error, least);
    grid->scale[j] = select_less(error, least, scale, grid->scale[j]);
    grid->minimum[j] = select_less(error, least, minimum, grid->minimum[j]);
}

// Steps of a sub-block's integers, each from the best so far. A minimum follows its scale, so that the middle
// of the range stays.
struct Step {
    float scale, minimum;
};
constexpr Step kStay[] = {{0, 0}}, kAround[] = {{0, 0}, {1, 0}, {-1, 0}, {0, 1}, {0, -1}, {0, 0}};

// Chooses codes at the stored scales and integers at the codes, in turn.
template <int count>
inline void descend(const Centered* runs, float top, const Step (&steps)[count], Grid* grid) {
    const Lanes follow = 0.5f * top * grid->d * inverse_or_zero(grid->dmin);
    for (int j = 0; j < kSubs; ++j) {
        for (const Step& step : steps) {
            const Lanes scale = clamp_round(grid->scale[j] + step.scale, 0.0f, kTop6);
            const Lanes moved = grid->minimum[j] + (follow * step.scale + step.minimum);
            const Lanes minimum = clamp_round(moved, 0.0f, kTop6);
            const Map map = map_of(runs[j], scale * grid->d, -(minimum * grid->dmin));
            keep_better(fit_line(runs[j], map, top), j, grid);
        }
    }
}

// Lines that are kept of a sub-block: those of its search, and the one of its codes at the last refit.
constexpr int kStored = kCoarse + kLater + 1;

inline Lanes total(const Grid& grid, const Lanes* share) {
    Lanes error{};
    for (int j = 0; j < kSubs; ++j) error += grid.error[j] * share[j];
    return error;
}

// The d and dmin that fit codes and integers of all sub-blocks best; those of the grid where they do not exist.
inline void refit(const Centered* runs, const Lanes* share, float top, Line (*lines)[kStored], int count,
                  Grid* grid) {
    Lanes aa{}, ab{}, bb{}, ax{}, bx{};
    for (int j = 0; j < kSubs; ++j) {
        const Lanes a = grid->scale[j], b = -grid->minimum[j];
        Line& line = lines[j][count];
        line = fit_line(runs[j], map_of(runs[j], a * grid->d, b * grid->dmin), top);
        const Lanes l1 = line.slope * line.ll;
        aa += (a * a) * (line.ll * share[j]);
        ab += (a * b) * (l1 * share[j]);
        bb += (b * b) * (runs[j].weight * share[j]);
        ax += a * ((line.scale * line.ll + line.offset * l1) * share[j]);
        bx += b * ((runs[j].mean * runs[j].weight) * share[j]);
    }
    const Lanes determinant = aa * bb - ab * ab;
    const Lanes inverse = inverse_or_zero(select_less(1e-5f * (aa * bb), determinant, determinant, Lanes{}));
    const Lanes d = unit_f16((ax * bb - bx * ab) * inverse), dmin = unit_f16((bx * aa - ax * ab) * inverse);
    const Lanes usable = select_less(Lanes{}, lesser(d, dmin), lesser(65504.0f - d, 65504.0f - dmin), Lanes{});
    grid->d = select_less(Lanes{}, usable, d, grid->d);
    grid->dmin = select_less(Lanes{}, usable, dmin, grid->dmin);
}

// d and dmin relative to those that give the largest scale and the largest minimum the code 63.
constexpr float kWiden[] = {1.0f, 0.99f, 1.007f, 1.014f, 1.021f, 1.029f, 1.037f, 1.046f};
// First candidates of Q4_K without importance, where time matters most; otherwise all.
constexpr int kCoarse4 = 36;
// Where a large sub-block has a nearly as good fit with a smaller scale, the others may gain more than it loses.
constexpr float kNearly = 1.03f;

// A sub-block with more than this part of the error is searched once more.
constexpr float kMuch = 0.36f;
// Where the integers multiply the error by more than this (of 16 and of 32 codes), as they do where one sub-block is
// much wider than others, true errors choose d and dmin. They are relative to those that give the widest range and
// the lowest weight the code 63: the fits of such a sub-block may lie far beyond its range, for next to nothing.
constexpr float kRounded[] = {1.06f, 1.15f};
constexpr float kWidenFar[] = {1.0f, 0.95f, 1.05f, 1.1f, 0.9f, 1.17f, 1.25f, 1.35f};
constexpr float kDeepenFar[] = {1.02f, 1.04f, 1.07f, 1.1f, 1.15f, 1.2f};

// Pairs of d and dmin that are looked at closely where an importance is given; otherwise one.
constexpr int kPairs = 3;

inline void exchange_if_less(const Lanes& x, const Lanes& y, Lanes* a, Lanes* b) {
    const Lanes old = *b;
    *b = select_less(x, y, *a, old);
    *a = select_less(x, y, old, *a);
}

using SuperTile = Tile<kSuper, kSub>;

inline Grid fit_grid(SuperTile& tile, float top) {
    const int coarse = tile.even && top == 15.0f ? kCoarse4 : kCoarse, count = coarse + kLater;
    Centered runs[kSubs];
    Line lines[kSubs][kStored], tops[kSubs];
    Best fits[kSubs];
    Lanes together{};
    for (int j = 0; j < kSubs; ++j) {
        runs[j] = center(tile.x + j * kSub, tile.weights(j), kSub);
        fits[j] = fit_lines(runs[j], top, true, coarse, lines[j]);
        together += fits[j].error * tile.share[j];
    }
    Lanes largest{}, deepest{}, finer{}, shallower{}, widest{}, lowest{}, alone{};
    for (int j = 0; j < kSubs; ++j) {
        const Lanes much = fits[j].error * tile.share[j] - kMuch * together;
        if (any_positive(much)) fit_lines_closely(runs[j], top, closed_but(much), &fits[j]);
        const Best& best = fits[j];
        alone += best.error * tile.share[j];
        const Lanes low = greater(-(runs[j].low + runs[j].mean), Lanes{});
        lowest = greater(lowest, low);
        widest = greater(widest, (runs[j].high + runs[j].mean + low) * (1.0f / top));
        tops[j] = best.line;
        lines[j][count] = best.line;
        Lanes scale = best.scale, offset = best.offset;
        for (int k = 0; k < count && !tile.even; ++k) {
            const Lanes nearly = select_less(lines[j][k].error, kNearly * best.error, lines[j][k].scale, scale);
            offset = select_less(nearly, scale, lines[j][k].offset, offset);
            scale = lesser(nearly, scale);
        }
        largest = greater(largest, best.scale);
        deepest = greater(deepest, -best.offset);
        finer = greater(finer, scale);
        shallower = greater(shallower, -offset);
    }
    Grid best{}, grid;
    Lanes least = splat(kNoFit), closed{};
    const auto keep = [&] {
        const Lanes error = total(grid, tile.share) + closed;
        best.d = select_less(error, least, grid.d, best.d);
        best.dmin = select_less(error, least, grid.dmin, best.dmin);
        for (int j = 0; j < kSubs; ++j) {
            best.scale[j] = select_less(error, least, grid.scale[j], best.scale[j]);
            best.minimum[j] = select_less(error, least, grid.minimum[j], best.minimum[j]);
            best.error[j] = select_less(error, least, grid.error[j], best.error[j]);
        }
        least = lesser(error, least);
    };
    // The lines from `first` on compete for the integers.
    const auto choose = [&](const Lanes& d, const Lanes& dmin, int first) {
        grid.d = d;
        grid.dmin = dmin;
        for (int j = 0; j < kSubs; ++j) {
            grid.error[j] = splat(kNoFit);
            grid.scale[j] = grid.minimum[j] = Lanes{};
            for (int k = first; k <= count; ++k) keep_better(lines[j][k], j, &grid);
        }
        descend(runs, top, kStay, &grid);
        keep();
    };
    choose(unit_f16(largest * (1.0f / kTop6)), unit_f16(deepest * (1.0f / kTop6)), 0);
    if (!tile.even) choose(unit_f16(finer * (1.0f / kTop6)), unit_f16(shallower * (1.0f / kTop6)), 0);
    // The pairs of scales that suit the best lines, in order.
    const int pairs = tile.even ? 1 : kPairs;
    Lanes fewest[kPairs], d[kPairs], dmin[kPairs];
    for (int p = 0; p < pairs; ++p) {
        fewest[p] = splat(kNoFit);
        d[p] = dmin[p] = Lanes{};
    }
    for (const float wide : kWiden) {
        grid.d = unit_f16(largest * (wide / kTop6));
        for (const float deep : kWiden) {
            grid.dmin = unit_f16(deepest * (deep / kTop6));
            Lanes error{}, next_d = grid.d, next_dmin = grid.dmin;
            for (int j = 0; j < kSubs; ++j) {
                grid.error[j] = splat(kNoFit);
                grid.scale[j] = grid.minimum[j] = Lanes{};
                keep_better(tops[j], j, &grid);
                error += grid.error[j] * tile.share[j];
            }
            for (int p = 0; p < pairs; ++p) {
                exchange_if_less(error, fewest[p], &next_d, &d[p]);
                exchange_if_less(error, fewest[p], &next_dmin, &dmin[p]);
                const Lanes least_yet = lesser(error, fewest[p]);
                error = greater(error, fewest[p]);
                fewest[p] = least_yet;
            }
        }
    }
    for (int p = 0; p < pairs; ++p) choose(d[p], dmin[p], 0);
    const Lanes rounded = least - kRounded[top > 15.0f] * alone;
    if (any_positive(rounded)) {
        closed = closed_but(rounded);
        for (const float wide : kWidenFar) {
            choose(unit_f16(widest * (wide / kTop6)), unit_f16(lowest * (1.0f / kTop6)), 0);
        }
        for (const float deep : kDeepenFar) choose(best.d, unit_f16(lowest * (deep / kTop6)), 0);
        closed = Lanes{};
    }
    grid = best;
    refit(runs, tile.share, top, lines, count, &grid);
    choose(grid.d, grid.dmin, 0);
    refit(runs, tile.share, top, lines, count, &grid);
    choose(grid.d, grid.dmin, count);
    descend(runs, top, kAround, &grid);
    keep();
    return best;
}

inline void pack_scales(const float* scale, const float* minimum, uint8_t* scales) {
    for (int j = 0; j < 4; ++j) {
        const int low_scale = static_cast<int>(scale[j]), high_scale = static_cast<int>(scale[j + 4]);
        const int low_min = static_cast<int>(minimum[j]), high_min = static_cast<int>(minimum[j + 4]);
        scales[j] = static_cast<uint8_t>(low_scale | (high_scale >> 4) << 6);
        scales[j + 4] = static_cast<uint8_t>(low_min | (high_min >> 4) << 6);
        scales[j + 8] = static_cast<uint8_t>((high_scale & 15) | (high_min & 15) << 4);
    }
}

// Byte 32 p + i: sub-block 2 p in the low nibble, 2 p + 1 in the high one.
inline void pack_pairs(const int32_t* codes, uint8_t* qs) {
    for (int p = 0; p < kSubs / 2; ++p) {
        for (int i = 0; i < kSub; ++i) {
            qs[kSub * p + i] =
                static_cast<uint8_t>((codes[2 * kSub * p + i] & 15) | (codes[2 * kSub * p + kSub + i] & 15) << 4);
        }
    }
}

inline void pack(const int32_t* codes, BlockQ4_K* block) { pack_pairs(codes, block->qs); }

inline void pack(const int32_t* codes, BlockQ5_K* block) {
    pack_pairs(codes, block->qs);
    for (int i = 0; i < kSub; ++i) {
        int bits = 0;
        for (int j = 0; j < kSubs; ++j) bits |= (codes[kSub * j + i] >> 4) << j;
        block->qh[i] = static_cast<uint8_t>(bits);
    }
}

template <class Block>
inline void affine_super_blocks(SuperTile& tile, float top, const float* x, int count, Block* blocks) {
    const Grid grid = fit_grid(tile, top);
    for (int c = 0; c < count; ++c) {
        float scale[kSubs], minimum[kSubs];
        int32_t codes[kSuper];
        const float d = lane(grid.d, c), dmin = lane(grid.dmin, c);
        for (int j = 0; j < kSubs; ++j) {
            scale[j] = lane(grid.scale[j], c);
            minimum[j] = lane(grid.minimum[j], c);
            choose_codes(x + c * kSuper + j * kSub, kSub, inverse_or_zero(d * scale[j]), dmin * minimum[j], 0.0f,
                         top, codes + j * kSub);
        }
        blocks[c].d = to_f16(d);
        blocks[c].dmin = to_f16(dmin);
        pack_scales(scale, minimum, blocks[c].scales);
        pack(codes, blocks + c);
    }
}

inline void encode_tile(SuperTile& tile, const float* x, int count, BlockQ4_K* blocks) {
    affine_super_blocks(tile, 15.0f, x, count, blocks);
}
inline void encode_tile(SuperTile& tile, const float* x, int count, BlockQ5_K* blocks) {
    affine_super_blocks(tile, 31.0f, x, count, blocks);
}

// Q6_K --------------------------------------------------------------------------------------------------

constexpr int kSub6 = 16;
constexpr int kSubs6 = kSuper / kSub6;
constexpr float kLow6 = -32.0f, kHigh6 = 31.0f;

using SuperTile6 = Tile<kSuper, kSub6>;

// What the super-blocks store: d is an fp16 value.
struct Grid6 {
    Lanes d;
    Lanes scale[kSubs6], error[kSubs6];
};

inline void keep_better(const Ray& ray, int j, Grid6* grid) {
    const Lanes scale = clamp_round(ray.scale * inverse_or_zero(grid->d), -128.0f, 127.0f);
    const Lanes miss = scale * grid->d - ray.scale;
    const Lanes error = ray.error + (ray.ll * miss) * miss;
    const Lanes least = grid->error[j];
    grid->error[j] = select_less(error, least, error, least);
    grid->scale[j] = select_less(error, least, scale, grid->scale[j]);
}

// As kReach, of 64 codes.
constexpr int kRays = 24;
constexpr float kReach6[kRays] = {
    1.00f, 0.97f, 0.91f, 0.94f, 0.85f, 0.88f, 1.03f, 0.81f, 0.72f, 0.78f, 1.09f, 0.68f, 0.60f, 0.75f, 1.01f,
    0.83f, 0.96f, 0.90f, 0.99f, 1.07f, 0.66f, 0.93f, 1.13f, 0.87f};
// d relative to the one that gives the widest sub-block the code -128, the longer side.
constexpr float kWiden6[] = {1.0f,   0.996f, 1.004f, 1.008f, 1.012f, 1.016f,
                             1.020f, 1.024f, 1.028f, 1.032f, 1.037f, 1.042f};
constexpr float kSteps6[] = {0, 1, -1, 2, -2};

inline Grid6 fit_grid(const SuperTile6& tile) {
    Ray rays[kSubs6][kRays + 1];
    Run runs[kSubs6];
    Lanes xx[kSubs6], widest{};
    for (int j = 0; j < kSubs6; ++j) {
        runs[j] = {tile.x + j * kSub6, tile.weights(j), kSub6};
        xx[j] = squares(runs[j]);
        const Lanes extreme = extreme_of(runs[j]);
        const Lanes unit = select_less(splat(kTiny), greater(extreme, -extreme), kLow6 / extreme, Lanes{});
        Ray best{splat(kNoFit), Lanes{}, Lanes{}};
        for (int k = 0; k < kRays; ++k) {
            rays[j][k] = fit_ray(runs[j], xx[j], unit * kReach6[k], kLow6, kHigh6);
            keep_better(rays[j][k], &best);
        }
        rays[j][kRays] = rays[j][0];
        widest = select_less(greater(widest, -widest), greater(best.scale, -best.scale), best.scale, widest);
    }
    Grid6 best{}, grid;
    Lanes least = splat(kNoFit);
    const auto keep = [&] {
        Lanes error{};
        for (int j = 0; j < kSubs6; ++j) error += grid.error[j] * tile.share[j];
        best.d = select_less(error, least, grid.d, best.d);
        for (int j = 0; j < kSubs6; ++j) {
            best.scale[j] = select_less(error, least, grid.scale[j], best.scale[j]);
            best.error[j] = select_less(error, least, grid.error[j], best.error[j]);
        }
        least = lesser(error, least);
    };
    const auto choose = [&](const Lanes& d) {
        grid.d = d;
        for (int j = 0; j < kSubs6; ++j) {
            grid.error[j] = splat(kNoFit);
            grid.scale[j] = Lanes{};
            for (const Ray& ray : rays[j]) keep_better(ray, j, &grid);
        }
    };
    const auto descend = [&] {
        for (int j = 0; j < kSubs6; ++j) {
            for (const float step : kSteps6) {
                const Lanes scale = clamp_round(grid.scale[j] + step, -128.0f, 127.0f);
                keep_better(fit_ray(runs[j], xx[j], code_units(scale * grid.d), kLow6, kHigh6), j, &grid);
            }
        }
        keep();
    };
    for (const float wide : kWiden6) {
        choose(unit_f16(widest * (wide / -128.0f)));
        keep();
    }
    grid = best;
    descend();
    for (int round = 0; round < 2; ++round) {
        Lanes aa{}, ax{};
        for (int j = 0; j < kSubs6; ++j) {
            Ray& ray = rays[j][kRays];
            ray = fit_ray(runs[j], xx[j], code_units(grid.scale[j] * grid.d), kLow6, kHigh6);
            const Lanes a = grid.scale[j] * (ray.ll * tile.share[j]);
            aa += grid.scale[j] * a;
            ax += a * ray.scale;
        }
        choose(unit_f16(ax * inverse_or_zero(aa)));
        descend();
    }
    return best;
}

inline void pack(const int32_t* codes, BlockQ6_K* block) {
    for (int half = 0; half < 2; ++half) {
        const int32_t* q = codes + 128 * half;
        for (int i = 0; i < 64; ++i) {
            block->ql[64 * half + i] = static_cast<uint8_t>((q[i] & 15) | (q[64 + i] & 15) << 4);
        }
        for (int i = 0; i < 32; ++i) {
            block->qh[32 * half + i] = static_cast<uint8_t>(q[i] >> 4 | q[32 + i] >> 4 << 2 | q[64 + i] >> 4 << 4 |
                                                            q[96 + i] >> 4 << 6);
        }
    }
}

inline void encode_tile(const SuperTile6& tile, const float* x, int count, BlockQ6_K* blocks) {
    const Grid6 grid = fit_grid(tile);
    for (int c = 0; c < count; ++c) {
        int32_t codes[kSuper];
        const float d = lane(grid.d, c);
        blocks[c].d = to_f16(d);
        for (int j = 0; j < kSubs6; ++j) {
            const float scale = lane(grid.scale[j], c);
            blocks[c].scales[j] = static_cast<int8_t>(scale);
            choose_codes(x + c * kSuper + j * kSub6, kSub6, inverse_or_zero(d * scale), 0.0f, kLow6, kHigh6,
                         codes + j * kSub6);
        }
        for (int i = 0; i < kSuper; ++i) codes[i] += 32;
        pack(codes, blocks + c);
    }
}

}  // namespace
