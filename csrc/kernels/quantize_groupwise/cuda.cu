// Weights to form 2. Groups of 8 to 256 columns, a power of two that divides K, take their grid and their codes in one
// pass; all others two passes: a warp, or for the MSE search half a warp, chooses the grid of a group, then a thread
// encodes eight adjacent columns. The bits are those of the reference: one rounding an operation, sums over sixteen
// lanes in its order.
#include "qkern/cuda/chunk.h"
#include "qkern/cuda/kernels.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

using namespace qk::gpu;

constexpr int kThreads = 256;
constexpr int kLanes = 16;
constexpr int kRefinements = 3;
constexpr float kInfinity = __builtin_huge_valf();

struct Grid {
    float scale, zero;
};

QK_DEVICE float stored(DType dtype, float scale) {
    if (dtype == DType::f32) return scale;
    return dtype == DType::f16 ? from_f16(to_f16(scale)) : from_bf16(to_bf16(scale));
}

QK_DEVICE bool finite(float value) { return fabsf(value) < kInfinity; }

QK_DEVICE float clamp(float value, float top) { return fminf(fmaxf(value, 0.0f), top); }

QK_DEVICE float top_of(const QuantizeArgs& args) { return static_cast<float>((1 << args.bits) - 1); }

QK_DEVICE float midpoint_of(const QuantizeArgs& args) {
    return args.codebook.entries ? 0.0f : static_cast<float>(1 << (args.bits - 1));
}

// Scale of the min-max grid before it is rounded; low is at most 0, high at least.
QK_DEVICE float span_of(const QuantizeArgs& args, float low, float high) {
    if (args.asymmetric) return divide(sub(high, low), top_of(args));
    const float largest = fmaxf(high, -low);
    return args.codebook.entries ? largest : divide(largest, sub(midpoint_of(args), 0.5f));
}

QK_DEVICE Grid minmax_grid(const QuantizeArgs& args, float low, float high) {
    float scale = stored(args.scale_dtype, span_of(args, low, high));
    if (!finite(scale)) args.flags[1] = 1;
    if (scale == 0.0f) scale = 1.0f;
    const float zero = args.asymmetric ? clamp(round_even(divide(-low, scale)), top_of(args)) : midpoint_of(args);
    return {scale, zero};
}

struct Code {
    int code;
    float level;  // what it stands for before the scale
};

QK_DEVICE Code nearest(const QuantizeArgs& args, float value, Grid grid) {
    const float ratio = divide(value, grid.scale);
    if (args.codebook.entries) {
        int position = 0;
        QK_UNROLL for (int i = 0; i < 15; ++i) position += args.codebook.thresholds[i] < ratio;
        return {args.codebook.codes[position], args.codebook.ordered[position]};
    }
    const float q = clamp(add(round_even(ratio), grid.zero), top_of(args));
    return {static_cast<int>(q), sub(q, grid.zero)};
}

QK_DEVICE void store_grid(const QuantizeArgs& args, int64_t at, Grid grid) {
    switch (args.scale_dtype) {
        case DType::f32: store_float<DType::f32>(args.scales, at, grid.scale); break;
        case DType::f16: store_float<DType::f16>(args.scales, at, grid.scale); break;
        default: store_float<DType::bf16>(args.scales, at, grid.scale);
    }
    if (args.zeros) args.zeros[at] = static_cast<uint8_t>(grid.zero);
}

// The grid that was stored for a group.
QK_DEVICE Grid load_grid(const QuantizeArgs& args, int64_t at) {
    const float scale = load_float(args.scale_dtype, args.scales, at);
    return {scale, args.zeros ? static_cast<float>(args.zeros[at]) : midpoint_of(args)};
}

// The grid is chosen here (kChoose: `lanes` threads share a group) or was chosen before.
template <int kBits, bool kChoose>
QK_KERNEL void QK_BOUNDS(kThreads) encode(const QuantizeArgs args, int lanes, bool aligned) {
    const int64_t row = blockIdx.x, c = int64_t{blockIdx.y} * kThreads + threadIdx.x, first = c * kChunk;
    const bool inside = first < args.K;
    float values[kChunk] = {};
    if (inside) load_chunk(args.dtype, args.weight, row * args.row_stride + first, args.K - first, aligned, values);
    Grid grid{1.0f, 0.0f};
    const int64_t grid_row = row / args.rows_per_grid * args.groups;
    if constexpr (kChoose) {
        float low = 0.0f, high = 0.0f;
        bool sound = true;
        QK_UNROLL for (int i = 0; i < kChunk; ++i) {
            low = fminf(low, values[i]);
            high = fmaxf(high, values[i]);
            sound = sound && finite(values[i]);
        }
        if (!sound) args.flags[0] = 1;
        for (int mask = lanes / 2; mask > 0; mask /= 2) {
            low = fminf(low, shuffle_xor(low, mask));
            high = fmaxf(high, shuffle_xor(high, mask));
        }
        if (!inside) return;
        grid = minmax_grid(args, low, high);
        if (c % lanes == 0) store_grid(args, grid_row + first / args.group_size, grid);
    }
    if (!inside) return;
    uint64_t codes = 0;
    int64_t group = -1;
    QK_UNROLL for (int i = 0; i < kChunk; ++i) {
        if (first + i < args.K) {
            if constexpr (!kChoose) {
                const int64_t now = (first + i) / args.group_size;
                if (now != group) grid = load_grid(args, grid_row + now);
                group = now;
            }
            codes |= static_cast<uint64_t>(nearest(args, values[i], grid).code) << (kBits * i);
        }
    }
    store_codes<kBits>(args.codes + row * args.code_words, args.code_words, c, first + kChunk >= args.K, codes);
}

// A warp chooses the min-max grid of a group of any length.
QK_KERNEL void QK_BOUNDS(kThreads) choose_minmax(const QuantizeArgs args) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t at = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (at >= args.rows * args.groups) return;
    const int64_t row = quotient(at, args.groups), begin = (at - row * args.groups) * args.group_size;
    const int64_t end = begin + args.group_size < args.K ? begin + args.group_size : args.K;
    float low = 0.0f, high = 0.0f;
    bool sound = true;
    for (int64_t column = begin + lane; column < end; column += kWarp) {
        const float value = load_float(args.dtype, args.weight, row * args.row_stride + column);
        low = fminf(low, value);
        high = fmaxf(high, value);
        sound = sound && finite(value);
    }
    if (!sound) args.flags[0] = 1;
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        low = fminf(low, shuffle_xor(low, mask));
        high = fmaxf(high, shuffle_xor(high, mask));
    }
    const Grid grid = minmax_grid(args, low, high);
    if (lane == 0) store_grid(args, at, grid);
}

// ---- the search for the smallest squared error; half a warp a group ---------------------------------------------

struct Group {
    int64_t row, begin, end;
};

struct Fit {
    float error, slope, curvature;
};

QK_DEVICE float lane_sum(float value) {
    for (int mask = kLanes / 2; mask > 0; mask /= 2) value = add(value, shuffle_xor(value, mask));
    return value;
}

QK_DEVICE Fit fit(const QuantizeArgs& args, const Group& group, Grid grid) {
    Fit sums{0.0f, 0.0f, 0.0f};
    for (int64_t column = group.begin + threadIdx.x % kLanes; column < group.end; column += kLanes) {
        const float value = load_float(args.dtype, args.weight, group.row * args.row_stride + column);
        const float level = nearest(args, value, grid).level;
        const float error = sub(value, mul(level, grid.scale));
        float weighted_error = error, weighted_level = level;
        if (args.importance) {
            const float weight = load_once(args.importance + group.row * args.importance_stride + column);
            weighted_error = mul(weight, error);
            weighted_level = mul(weight, level);
        }
        sums.error = add(sums.error, mul(weighted_error, error));
        sums.slope = add(sums.slope, mul(weighted_error, level));
        sums.curvature = add(sums.curvature, mul(weighted_level, level));
    }
    return {lane_sum(sums.error), lane_sum(sums.slope), lane_sum(sums.curvature)};
}

// The best grid so far, and the one whose unrounded optimal scale promises the smallest error.
struct Search {
    const QuantizeArgs& args;
    Group group;
    Grid start, best, pick;
    float best_error, pick_error;

    QK_DEVICE float storable(float scale) const {
        const float rounded = stored(args.scale_dtype, scale);
        return rounded == 0.0f || !finite(rounded) ? start.scale : rounded;
    }
    QK_DEVICE void consider(Grid grid) {
        const Fit found = fit(args, group, grid);
        if (found.error < best_error) {
            best = grid;
            best_error = found.error;
        }
        // For fixed codes the error is a parabola in the scale: this is the step to its minimum.
        const float step = found.curvature > 0.0f ? divide(found.slope, found.curvature) : 0.0f;
        const float promise = sub(found.error, mul(found.slope, step));
        if (promise < pick_error) {
            pick = {add(grid.scale, step), grid.zero};
            pick_error = promise;
        }
    }
};

// Fractions of the min-max scale that are tried: (first - i) / unit. Shared with reference.py.
struct Shrinks {
    int first, unit, count;
};
QK_DEVICE Shrinks shrinks_of(const QuantizeArgs& args) {
    if (args.codebook.entries) return {48, 32, 36};
    switch (args.bits) {
        case 2: return {49, 32, 41};
        case 3: return {38, 32, 30};
        case 4: return {35, 32, 27};
        default: return {259, 256, 26};
    }
}

QK_KERNEL void QK_BOUNDS(kThreads, 1) choose_mse(const QuantizeArgs args) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int64_t total = args.rows * args.groups;
    const int64_t index = int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes;
    // The other half of the warp goes along where there is no group.
    const int64_t at = index < total ? index : total - 1;
    const int64_t row = quotient(at, args.groups), begin = (at - row * args.groups) * args.group_size;
    const Group group{row, begin, begin + args.group_size < args.K ? begin + args.group_size : args.K};
    float low = 0.0f, high = 0.0f;
    bool sound = true;
    for (int64_t column = group.begin + lane; column < group.end; column += kLanes) {
        const float value = load_float(args.dtype, args.weight, group.row * args.row_stride + column);
        low = fminf(low, value);
        high = fmaxf(high, value);
        sound = sound && finite(value);
    }
    if (!sound) args.flags[0] = 1;
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
        low = fminf(low, shuffle_xor(low, mask));
        high = fmaxf(high, shuffle_xor(high, mask));
    }
    const Grid start = minmax_grid(args, low, high);
    Search search{args, group, start, start, start, fit(args, group, start).error, kInfinity};
    const float span = span_of(args, low, high), top = top_of(args);
    const Shrinks shrinks = shrinks_of(args);
    // Both halves of a warp make the same number of turns, so that they meet in the sums.
    for (int i = 0; i < shrinks.count; ++i) {
        const float shrink = divide(static_cast<float>(shrinks.first - i), static_cast<float>(shrinks.unit));
        if (args.asymmetric) {
            // The range shrinks at both ends, at the top only, at the bottom only.
            const float scale = search.storable(mul(span, shrink));
            search.consider({scale, clamp(round_even(divide(-mul(low, shrink), scale)), top)});
            search.consider({scale, clamp(round_even(divide(-low, scale)), top)});
            search.consider({scale, clamp(round_even(sub(top, divide(high, scale))), top)});
        } else {
            search.consider({search.storable(mul(span, shrink)), start.zero});
            search.consider({search.storable(-mul(span, shrink)), start.zero});
        }
    }
    for (int i = 0; i < kRefinements; ++i) {
        search.pick_error = kInfinity;
        search.consider({search.storable(search.pick.scale), search.pick.zero});
    }
    if (lane == 0 && index < total) store_grid(args, at, search.best);
}

unsigned blocks_of(int64_t items, int64_t a_block) { return static_cast<unsigned>((items + a_block - 1) / a_block); }

template <bool kChoose>
int run_encode(const QuantizeArgs& args, int lanes, Stream stream) {
    const int64_t bytes = args.dtype == DType::f32 ? 4 : 2;
    const bool aligned = reinterpret_cast<uintptr_t>(args.weight) % 16 == 0 && args.row_stride * bytes % 16 == 0 &&
                         args.K % kChunk == 0;
    Launch how{};
    how.grid = dim3(static_cast<unsigned>(args.rows), blocks_of(args.K, kThreads * kChunk));
    how.threads = kThreads;
    how.stream = stream;
    switch (args.bits) {
        case 2: return launch(how, encode<2, kChoose>, args, lanes, aligned);
        case 3: return launch(how, encode<3, kChoose>, args, lanes, aligned);
        case 4: return launch(how, encode<4, kChoose>, args, lanes, aligned);
        default: return launch(how, encode<8, kChoose>, args, lanes, aligned);
    }
}

}  // namespace

int quantize_groupwise(const QuantizeArgs& args, void* stream) {
    if (args.rows == 0) return 0;
    const auto on = static_cast<Stream>(stream);
    const int64_t lanes = args.group_size / kChunk;
    const bool one_pass = !args.grid_given && !args.search_mse && args.codes && args.K > 0 &&
                          args.group_size % kChunk == 0 && args.K % args.group_size == 0 && lanes <= kWarp &&
                          (lanes & (lanes - 1)) == 0;
    if (one_pass) return run_encode<true>(args, static_cast<int>(lanes), on);
    if (!args.grid_given && args.groups > 0) {
        if (args.rows * args.groups > UINT32_MAX) return kErrorBadLaunch;
        Launch how{};
        how.threads = kThreads;
        how.stream = on;
        how.grid = dim3(blocks_of(args.rows * args.groups, kThreads / (args.search_mse ? kLanes : kWarp)));
        const int status = args.search_mse ? launch(how, choose_mse, args) : launch(how, choose_minmax, args);
        if (status != 0) return status;
    }
    return args.codes && args.K > 0 ? run_encode<false>(args, 1, on) : 0;
}

}  // namespace qk::cuda
