// What the kernels of y = x @ dequant(W).T + bias share: their parameters, scales, and the way of the sums to y.
#pragma once
#include "cuda_codes.h"
#include "qkern/cuda/kernels.h"

namespace qk::cuda {
namespace {

using namespace qk::gpu;

struct Params {
    const uint4* codes;
    const void* scales;
    const void* shifts;
    Shift shift;
    DType scale_dtype;
    int64_t N, M, K, groups;
    int tiles, halves_of_group;  // of 32 columns
    int stages;
    int splits;  // blocks along K
    const uint16_t* x;
    int64_t x_stride;
    const void* bias;
    bool bias_is_float;
    uint16_t* out;
    float* partials;
    uint32_t table[8];
};

inline Params params_of(const MatmulArgs& args) {
    const Weight& weight = args.weight;
    Params p{};
    p.codes = reinterpret_cast<const uint4*>(weight.codes);
    p.scales = weight.scales;
    p.shifts = weight.shifts;
    p.shift = weight.shift;
    p.scale_dtype = weight.scale_dtype;
    p.N = weight.N;
    p.M = args.M;
    p.K = args.K;
    p.groups = weight.groups;
    p.tiles = static_cast<int>(tiles_of(weight.groups, weight.group_columns));
    p.halves_of_group = static_cast<int>(weight.group_columns / 32);
    p.splits = args.splits;
    p.x = static_cast<const uint16_t*>(args.x);
    p.x_stride = args.x_stride;
    p.bias = args.bias;
    p.bias_is_float = args.bias_dtype == DType::f32;
    p.out = static_cast<uint16_t*>(args.out);
    p.partials = args.partials;
    for (int i = 0; i < 8; ++i) p.table[i] = weight.table[i];
    return p;
}

// What a kernel is compiled for: the activations' type, the bits of a code, whether it is of a codebook.
template <class T, int kBits_, bool kBook_>
struct Kind {
    using Type = T;
    static constexpr int kBits = kBits_;
    static constexpr bool kBook = kBook_;
};

template <class T, class Act>
int with_bits(const Weight& weight, Act&& act) {
    if (weight.codebook) return act(Kind<T, 4, true>{});
    switch (weight.bits) {
        case 2: return act(Kind<T, 2, false>{});
        case 3: return act(Kind<T, 3, false>{});
        case 4: return act(Kind<T, 4, false>{});
        default: return act(Kind<T, 8, false>{});
    }
}

template <class Act>
int with_kind(const MatmulArgs& args, Act&& act) {
    return args.dtype == DType::f16 ? with_bits<F16>(args.weight, act) : with_bits<BF16>(args.weight, act);
}

QK_DEVICE float half_to_float(F16, uint16_t bits) { return from_f16(bits); }
QK_DEVICE float half_to_float(BF16, uint16_t bits) { return from_bf16(bits); }
QK_DEVICE uint16_t float_to_half(F16, float value) { return to_f16(value); }
QK_DEVICE uint16_t float_to_half(BF16, float value) { return to_bf16(value); }

// Four scales or offsets as they are stored, so that a load is not waited for before they are used.
QK_DEVICE uint4 load_four(DType dtype, const void* from, int64_t at) {
    if (dtype == DType::f32) return load_once(reinterpret_cast<const uint4*>(static_cast<const float*>(from) + at));
    const uint2 words = load_once(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(from) + at));
    return make_uint4(words.x, words.y, 0, 0);
}

QK_DEVICE void to_floats(DType dtype, const uint4& words, float* values) {
    const auto half = [&](int i) { return static_cast<uint16_t>(word_of(words, i / 2) >> (16 * (i % 2))); };
    // One branch, not one a value.
    if (dtype == DType::f32) {
        QK_UNROLL for (int i = 0; i < 4; ++i) values[i] = as_float(word_of(words, i));
    } else if (dtype == DType::f16) {
        QK_UNROLL for (int i = 0; i < 4; ++i) values[i] = from_f16(half(i));
    } else {
        QK_UNROLL for (int i = 0; i < 4; ++i) values[i] = from_bf16(half(i));
    }
}

QK_DEVICE int byte_of(uint32_t word, int i) { return static_cast<int>((word >> (8 * i)) & 255u); }

// Element (m, n) of y from its sum.
template <class T>
QK_DEVICE void store_result(const Params& p, int64_t m, int64_t n, float sum) {
    if (p.bias) {
        sum = add(sum, p.bias_is_float ? load_once(static_cast<const float*>(p.bias) + n)
                                       : half_to_float(T{}, load_once(static_cast<const uint16_t*>(p.bias) + n)));
    }
    p.out[m * p.N + n] = float_to_half(T{}, sum);
}

// Where blocks cannot read one another's memory.
template <class T>
QK_KERNEL void add_partials(const Params p) {
    const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (e >= p.M * p.N) return;
    float sum = p.partials[e];
    for (int split = 1; split < p.splits; ++split) sum = add(sum, p.partials[split * p.M * p.N + e]);
    store_result<T>(p, e / p.N, e % p.N, sum);
}

// Which block this is: `splits` blocks along K, which are a cluster, have the same rows of the weight.
struct Place {
    unsigned split;
    int64_t rows;  // counts blocks of rows
    int64_t token_base;
};

QK_DEVICE Place place_of(int splits, int tokens) {
    const unsigned count = static_cast<unsigned>(splits);
    return {blockIdx.x % count, static_cast<int64_t>(blockIdx.x / count), int64_t{blockIdx.y} * tokens};
}

// What a block of a kernel takes.
struct BlockSize {
    int rows, tokens, threads;
    size_t shared_bytes;
};

template <class T>
int launch_product(const Params& p, void (*kernel)(Params), const BlockSize& block, Stream stream) {
    Launch how{};
    how.grid = dim3(static_cast<unsigned>((p.N + block.rows - 1) / block.rows * p.splits),
                    static_cast<unsigned>((p.M + block.tokens - 1) / block.tokens));
    how.threads = block.threads;
    how.shared_bytes = block.shared_bytes;
    how.cluster = p.partials ? 1 : p.splits;
    how.stream = stream;
    const int status = launch(how, kernel, p);
    if (status != 0 || !p.partials) return status;
    Launch sum{};
    sum.grid = dim3(static_cast<unsigned>((p.M * p.N + 255) / 256));
    sum.threads = 256;
    sum.stream = stream;
    return launch(sum, add_partials<T>, p);
}

// The sums of a block, `sum(token, row)`, become its part of y; with the blocks of a cluster, whose sums lie at
// `block` once `gather()` has put them there, each takes a part of the additions.
template <class T, int kTokens, int kRows, int kThreads, class Sum, class Gather>
QK_DEVICE void hand_out(const Params& p, const Place& place, const float* block, int stride, Sum&& sum, Gather&& gather) {
    const int64_t first = place.rows * kRows;
    const auto each = [&](int begin, int step, auto&& act) {
        for (int e = begin; e < kTokens * kRows; e += step) {
            const int64_t m = place.token_base + e / kRows, n = first + e % kRows;
            if (m < p.M && n < p.N) act(e / kRows, e % kRows, m, n);
        }
    };
    const int thread = static_cast<int>(threadIdx.x);
    if (p.splits == 1) {
        each(thread, kThreads, [&](int token, int row, int64_t m, int64_t n) { store_result<T>(p, m, n, sum(token, row)); });
    } else if (p.partials) {
        each(thread, kThreads, [&](int token, int row, int64_t m, int64_t n) {
            p.partials[(place.split * p.M + m) * p.N + n] = sum(token, row);
        });
    } else {
        gather();
        sync_cluster();
        const int rank = static_cast<int>(cluster_rank());
        each(rank * kThreads + thread, p.splits * kThreads, [&](int token, int row, int64_t m, int64_t n) {
            const float* here = block + token * stride + row;
            float total = read_cluster(here, 0);
            for (int other = 1; other < p.splits; ++other) {
                total = add(total, read_cluster(here, static_cast<unsigned>(other)));
            }
            store_result<T>(p, m, n, total);
        });
        leave_cluster();  // nobody's memory goes before all have read it
    }
}

}  // namespace
}  // namespace qk::cuda
