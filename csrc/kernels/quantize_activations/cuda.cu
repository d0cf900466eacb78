// Activations to int8. A team of threads has a group of columns: a power of two of the lanes of a warp, or a block. It
// keeps what it read for the largest magnitude and makes codes of it; of a group longer than that, the rest is read
// again, while it is still in the cache.
#include "qkern/cuda/chunk.h"
#include "qkern/cuda/kernels.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

using namespace qk::gpu;

constexpr int kThreads = 256, kMaxThreads = 512;
constexpr int kHeld = 4;  // chunks that a thread keeps
constexpr uint32_t kInfinity = 0x7f800000u;

struct Params {
    QuantizeActivationsArgs args;
    int team;
    bool whole_values, whole_codes;  // chunks lie at a multiple of 16 bytes, and their codes of 8
};

// How the values of a group become codes.
struct Grid {
    float scale, inverse, low, high;
    int zero;
    bool sound;  // else codes only carry signs (Inf) or nothing
};

QK_DEVICE int encode(const Grid& grid, float value) {
    const uint32_t size = as_bits(value) & 0x7fffffffu;
    if (!grid.sound) return size != kInfinity ? 0 : value > 0.0f ? 127 : -127;
    // A product with the reciprocal differs from the quotient by less than 2^-13 where codes are not clamped: it rounds
    // to the same code unless it lies that close to a tie. Inf and NaN are never near to anything.
    float whole = mul(value, grid.inverse);
    const float near = round_even(whole);
    if (fabsf(sub(whole, near)) < 0.499f) {
        whole = near;
    } else {
        whole = round_even(divide(value, grid.scale));
        if (whole != whole) return 0;
    }
    return static_cast<int>(fminf(fmaxf(whole, grid.low), grid.high)) + grid.zero;
}

// The largest magnitude in the team, as bits: NaN > Inf > every finite value.
template <bool kBlock>
QK_DEVICE uint32_t largest_of_team(uint32_t mine, int team) {
    for (int mask = (kBlock ? kWarp : team) / 2; mask > 0; mask /= 2) {
        const uint32_t other = shuffle_xor(mine, mask);
        mine = mine > other ? mine : other;
    }
    if constexpr (kBlock) {
        auto& warps = shared<uint32_t[kMaxThreads / kWarp]>();
        if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
        sync_block();
        for (unsigned w = 0; w < blockDim.x / kWarp; ++w) mine = mine > warps[w] ? mine : warps[w];
    }
    return mine;
}

template <bool kBlock>
QK_KERNEL void QK_BOUNDS(kMaxThreads, 1) quantize_group(const Params p) {
    const QuantizeActivationsArgs& args = p.args;
    const int team = kBlock ? static_cast<int>(blockDim.x) : p.team;
    const int member = static_cast<int>(threadIdx.x) % team;
    const int64_t at = int64_t{blockIdx.x} * (static_cast<int>(blockDim.x) / team) + static_cast<int>(threadIdx.x) / team;
    // Threads beyond the last group go along to where their warp meets.
    const bool inside = at < args.M * args.groups;
    const int64_t row = inside ? quotient(at, args.groups) : 0;
    const int64_t begin = inside ? (at - row * args.groups) * args.group_size : 0;
    const int64_t end = !inside ? 0 : args.K - begin < args.group_size ? args.K : begin + args.group_size;

    uint32_t largest = 0;
    const auto load = [&](int64_t first, float (&values)[kChunk]) {
        load_chunk(args.dtype, args.x, row * args.x_stride + first, end - first, p.whole_values, values);
    };
    const auto enlarge = [&](const float (&values)[kChunk]) {
        QK_UNROLL for (int i = 0; i < kChunk; ++i) {
            const uint32_t size = as_bits(values[i]) & 0x7fffffffu;
            largest = largest > size ? largest : size;
        }
    };
    const auto place = [&](int64_t turn) { return begin + (member + turn * team) * kChunk; };
    float held[kHeld][kChunk];
    QK_UNROLL for (int h = 0; h < kHeld; ++h) {
        if (place(h) < end) {
            load(place(h), held[h]);
            enlarge(held[h]);
        }
    }
    for (int64_t turn = kHeld; place(turn) < end; ++turn) {
        float values[kChunk];
        load(place(turn), values);
        enlarge(values);
    }
    largest = largest_of_team<kBlock>(largest, team);
    if (!inside) return;

    Grid grid{0.0f, 0.0f, -127.0f, 127.0f, 0, true};
    float stored;
    if (args.scale) {
        grid.scale = load_once(args.scale);
        grid.zero = args.zero;
        grid.low = static_cast<float>(-128 - args.zero);
        grid.high = static_cast<float>(127 - args.zero);
        stored = largest < kInfinity ? grid.scale : as_float(0x7fc00000u);
    } else {
        stored = grid.scale = divide(as_float(largest), 127.0f);
        grid.sound = grid.scale > 0.0f && as_bits(grid.scale) < kInfinity;
    }
    grid.inverse = divide(1.0f, grid.scale);
    if (member == 0) args.scales[at] = stored;
    const auto store = [&](int64_t first, const float (&values)[kChunk]) {
        int8_t* to = args.codes + row * args.K + first;
        uint64_t codes = 0;
        QK_UNROLL for (int i = 0; i < kChunk; ++i) {
            codes |= static_cast<uint64_t>(static_cast<uint8_t>(encode(grid, values[i]))) << (8 * i);
        }
        if (p.whole_codes && end - first >= kChunk) {
            *reinterpret_cast<uint64_t*>(to) = codes;
        } else {
            QK_UNROLL for (int i = 0; i < kChunk; ++i) {
                if (first + i < end) to[i] = static_cast<int8_t>(codes >> (8 * i));
            }
        }
    };
    QK_UNROLL for (int h = 0; h < kHeld; ++h) {
        if (place(h) < end) store(place(h), held[h]);
    }
    for (int64_t turn = kHeld; place(turn) < end; ++turn) {
        float values[kChunk];
        load(place(turn), values);
        store(place(turn), values);
    }
}

// The power of two from `least` to `most` that gives each of `chunks` a thread, or comes closest.
int power_for(int64_t chunks, int least, int most) {
    int power = least;
    while (power < most && power < chunks) power *= 2;
    return power;
}

}  // namespace

int quantize_activations(const QuantizeActivationsArgs& args, void* stream) {
    if (args.M * args.groups == 0) return 0;
    if (args.M * args.groups > UINT32_MAX) return kErrorBadLaunch;
    const int64_t bytes = args.dtype == DType::f32 ? 4 : 2;
    const bool whole = args.groups == 1 || args.group_size % kChunk == 0;
    Params p{};
    p.args = args;
    p.whole_values = whole && reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.x_stride * bytes % 16 == 0;
    p.whole_codes = whole && args.K % kChunk == 0;
    const int64_t chunks = (args.group_size + kChunk - 1) / kChunk;
    Launch how{};
    how.stream = static_cast<Stream>(stream);
    if (chunks > kWarp * kHeld) {
        how.threads = power_for(chunks / kHeld, 2 * kWarp, kMaxThreads);
        how.shared_bytes = kMaxThreads / kWarp * sizeof(uint32_t);
        how.grid = dim3(static_cast<unsigned>(args.M * args.groups));
        return launch(how, quantize_group<true>, p);
    }
    p.team = power_for(chunks, 1, kWarp);
    how.threads = kThreads;
    how.grid = dim3(static_cast<unsigned>((args.M * args.groups * p.team + kThreads - 1) / kThreads));
    return launch(how, quantize_group<false>, p);
}

}  // namespace qk::cuda
