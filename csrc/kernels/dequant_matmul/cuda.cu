// y = x @ dequant(W).T + bias for up to 16 rows of x, in one pass over the packed weight; and the weight as floats.
//
// The weight is the left operand of the mma, so 8 rows of x cost what one costs. A block has a panel of 64 rows; its
// warps, and the blocks of a cluster, share the tiles along K and add their sums in a fixed order.
#include "cuda_codes.h"
#include "qkern/cuda/kernels.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

using namespace qk::gpu;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

struct Params {
    const uint4* codes;
    const void* scales;
    const void* shifts;
    Shift shift;
    DType scale_dtype;
    int64_t N, M, K, groups;
    int tiles, halves_of_group;  // of 32 columns
    int stages;
    const uint16_t* x;
    int64_t x_stride;
    const void* bias;
    bool bias_is_float;
    uint16_t* out;
    float* partials;
    uint32_t table[8];
};

QK_DEVICE float half_to_float(F16, uint16_t bits) { return from_f16(bits); }
QK_DEVICE float half_to_float(BF16, uint16_t bits) { return from_bf16(bits); }
QK_DEVICE uint16_t float_to_half(F16, float value) { return to_f16(value); }
QK_DEVICE uint16_t float_to_half(BF16, float value) { return to_bf16(value); }

// The eight values of a lane, of one panel and group: `at` counts them.
QK_DEVICE void read_eight(DType dtype, const void* from, int64_t at, float (&values)[8]) {
    if (dtype == DType::f32) {
        QK_UNROLL for (int i = 0; i < 8; ++i) values[i] = load_once(static_cast<const float*>(from) + 8 * at + i);
        return;
    }
    const uint4 words = load_once(static_cast<const uint4*>(from) + at);
    QK_UNROLL for (int i = 0; i < 8; ++i) {
        const auto bits = static_cast<uint16_t>(word_of(words, i / 2) >> (16 * (i % 2)));
        values[i] = dtype == DType::f16 ? from_f16(bits) : from_bf16(bits);
    }
}

// What is added to q - midpoint before the scale; 0 where there are no zero points.
template <int kBits>
QK_DEVICE void read_zeros(const Params& p, int64_t at, float (&zeros)[8]) {
    constexpr int midpoint = 1 << (kBits - 1);
    const uint2 bytes = load_once(static_cast<const uint2*>(p.shifts) + at);
    QK_UNROLL for (int i = 0; i < 8; ++i) {
        const uint32_t word = i < 4 ? bytes.x : bytes.y;
        zeros[i] = static_cast<float>(midpoint - static_cast<int>((word >> (8 * (i % 4))) & 255u));
    }
}

// Bytes of a stage: a tile, and the activations that go with it.
template <int kBits, int kTokens>
struct Stage {
    uint4 codes[kBits][kWarp];
    uint4 x[kTokens][2][kWarp];  // 8 columns of each 32
};

// Every lane copies what it will itself read, so no lane waits for another. With 96 KiB two blocks fit into the
// 228 of sm_90, and 48 to 64 KiB of the weight are on their way to a multiprocessor.
constexpr int kRingBytes = 96 << 10;
template <int kBits, int kTokens>
constexpr int stages() {
    constexpr int fit = kRingBytes / (kWarps * static_cast<int>(sizeof(Stage<kBits, kTokens>)));
    return fit < 4 ? fit : 4;
}

template <int kBits, int kTokens>
QK_DEVICE void begin_copy(const Params& p, const uint4* panel, int64_t token_base, int tile,
                          Stage<kBits, kTokens>& stage) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const uint4* at = panel + int64_t{tile} * (kBits * kWarp) + lane;
    QK_UNROLL for (int u = 0; u < kBits; ++u) copy_async(&stage.codes[u][lane], at + u * kWarp);
    QK_UNROLL for (int n = 0; n < kTokens; ++n) {
        const int64_t token = token_base + 8 * n + lane / 4;
        if (token >= p.M) continue;  // zeros since the beginning
        QK_UNROLL for (int half = 0; half < 2; ++half) {
            const int64_t column = int64_t{tile} * kTileColumns + 32 * half + 8 * (lane % 4);
            const bool inside = column < p.K;
            const uint16_t* from = p.x + token * p.x_stride + (inside ? column : 0);
            copy_async(&stage.x[n][half][lane], reinterpret_cast<const uint4*>(from), inside);
        }
    }
}

// Sums of one group, and what has been added up of the groups before.
template <int kTokens>
struct Sums {
    float group[kBlocks][kTokens][4];
    float activations[kTokens][4];  // every row the same: the sum of x
    float total[kBlocks][kTokens][4];
};

template <class T, int kBits, bool kBook, bool kShift, int kTokens, int s>
QK_DEVICE void multiply_step(const Params& p, const Tile<kBits>& codes, const uint4 (&x)[kTokens], Sums<kTokens>& sums) {
    uint32_t b[kTokens][2];
    QK_UNROLL for (int n = 0; n < kTokens; ++n) {
        b[n][0] = word_of(x[n], 2 * (s % 2));
        b[n][1] = word_of(x[n], 2 * (s % 2) + 1);
    }
    const auto multiply = [&](auto block) {
        constexpr int i = decltype(block)::value;
        uint32_t a[4];
        if constexpr (kBook) {
            look_up<i, s>(codes, p.table, a);
        } else {
            Codes<T, kBits>::template get<i, s>(codes, a);
        }
        QK_UNROLL for (int n = 0; n < kTokens; ++n) Mma<T>::run(sums.group[i][n], a, b[n]);
    };
    multiply(Constant<0>{});
    multiply(Constant<1>{});
    multiply(Constant<2>{});
    multiply(Constant<3>{});
    if constexpr (kShift) {
        constexpr uint32_t one = twice(IsSame<T, F16>::value ? 0x3c00u : 0x3f80u);
        const uint32_t ones[4] = {one, one, one, one};
        QK_UNROLL for (int n = 0; n < kTokens; ++n) Mma<T>::run(sums.activations[n], ones, b[n]);
    }
}

// total += scale * group + shift * sum of x, and the next group begins.
template <int kBits, bool kShift, int kTokens>
QK_DEVICE void finish_group(const Params& p, int64_t panel, int64_t group, Sums<kTokens>& sums) {
    const int64_t at = (panel * p.groups + group) * 8 + threadIdx.x % kWarp / 4;
    float scales[8], shifts[8];
    read_eight(p.scale_dtype, p.scales, at, scales);
    if constexpr (kShift) {
        if (p.shift == Shift::zeros) {
            read_zeros<kBits>(p, at, shifts);
            QK_UNROLL for (int i = 0; i < 8; ++i) shifts[i] *= scales[i];
        } else {
            read_eight(p.scale_dtype, p.shifts, at, shifts);
            // The codes come less their midpoint.
            QK_UNROLL for (int i = 0; i < 8; ++i) shifts[i] = fused(static_cast<float>(1 << (kBits - 1)), scales[i], shifts[i]);
        }
    }
    QK_UNROLL for (int i = 0; i < kBlocks; ++i) {
        QK_UNROLL for (int n = 0; n < kTokens; ++n) {
            QK_UNROLL for (int c = 0; c < 4; ++c) {
                const int row = 2 * i + c / 2;
                float total = fused(scales[row], sums.group[i][n][c], sums.total[i][n][c]);
                if constexpr (kShift) total = fused(shifts[row], sums.activations[n][c], total);
                sums.total[i][n][c] = total;
                sums.group[i][n][c] = 0.0f;
            }
        }
    }
    if constexpr (kShift) {
        QK_UNROLL for (int n = 0; n < kTokens; ++n) {
            QK_UNROLL for (int c = 0; c < 4; ++c) sums.activations[n][c] = 0.0f;
        }
    }
}

template <int kTokens>
struct Shared {
    float warps[kWarps][8 * kTokens][kPanelRows + 4];  // + 4: the four columns of a lane's rows fall in other banks
    float block[8 * kTokens][kPanelRows];
};

// The two steps of 32 columns.
template <class T, int kBits, bool kBook, bool kShift, int kTokens, int kHalf>
QK_DEVICE void multiply_half(const Params& p, const Tile<kBits>& codes, const Stage<kBits, kTokens>& stage,
                             Sums<kTokens>& sums) {
    uint4 x[kTokens];
    QK_UNROLL for (int n = 0; n < kTokens; ++n) x[n] = stage.x[n][kHalf][threadIdx.x % kWarp];
    multiply_step<T, kBits, kBook, kShift, kTokens, 2 * kHalf>(p, codes, x, sums);
    multiply_step<T, kBits, kBook, kShift, kTokens, 2 * kHalf + 1>(p, codes, x, sums);
}

template <class T, int kBits, bool kBook, bool kShift, int kTokens>
QK_DEVICE void multiply_panel(const Params& p) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t panel = blockIdx.y, token_base = int64_t{blockIdx.z} * (8 * kTokens);
    const unsigned splits = gridDim.x, split = blockIdx.x;
    const uint4* codes = p.codes + panel * p.tiles * (kBits * kWarp);

    const auto border = [&](unsigned part) {
        return static_cast<int>(int64_t{p.tiles} * part / (splits * kWarps));
    };
    const unsigned part = split * kWarps + static_cast<unsigned>(warp);
    const int begin = border(part), end = border(part + 1);

    Sums<kTokens> sums;
    QK_UNROLL for (int n = 0; n < kTokens; ++n) {
        QK_UNROLL for (int c = 0; c < 4; ++c) {
            sums.activations[n][c] = 0.0f;
            QK_UNROLL for (int i = 0; i < kBlocks; ++i) sums.group[i][n][c] = sums.total[i][n][c] = 0.0f;
        }
    }

    // p.stages is kStages, but for devices with little shared memory, which have no asynchronous copies either.
    constexpr int kStages = stages<kBits, kTokens>();
    Stage<kBits, kTokens>* const ring = &shared<Stage<kBits, kTokens>>() + warp * p.stages;
    for (int a = 0; a < p.stages; ++a) {
        QK_UNROLL for (int n = 0; n < kTokens; ++n) {
            if (token_base + 8 * n + lane / 4 < p.M) continue;
            ring[a].x[n][0][lane] = ring[a].x[n][1][lane] = make_uint4(0, 0, 0, 0);
        }
        if (begin + a < end) begin_copy<kBits, kTokens>(p, codes, token_base, begin + a, ring[a]);
        close_batch();
    }
    int64_t group = int64_t{begin} * 2 / p.halves_of_group;
    int left = p.halves_of_group - static_cast<int>(int64_t{begin} * 2 - group * p.halves_of_group);
    int slot = 0;
    for (int tile = begin; tile < end; ++tile) {
        wait_batches<kStages - 1>();
        Stage<kBits, kTokens>& stage = ring[slot];
        Tile<kBits> own;
        QK_UNROLL for (int u = 0; u < kBits; ++u) own.lines[u] = stage.codes[u][lane];
        multiply_half<T, kBits, kBook, kShift, kTokens, 0>(p, own, stage, sums);
        if (--left == 0) {
            finish_group<kBits, kShift, kTokens>(p, panel, group++, sums);
            left = p.halves_of_group;
        }
        // The layout is whole tiles; the last may be half beyond the last group.
        if (group < p.groups) {
            multiply_half<T, kBits, kBook, kShift, kTokens, 1>(p, own, stage, sums);
            if (--left == 0) {
                finish_group<kBits, kShift, kTokens>(p, panel, group++, sums);
                left = p.halves_of_group;
            }
        }
        if (tile + p.stages < end) begin_copy<kBits, kTokens>(p, codes, token_base, tile + p.stages, stage);
        close_batch();
        slot = slot + 1 == p.stages ? 0 : slot + 1;
    }
    if (begin < end && left != p.halves_of_group) finish_group<kBits, kShift, kTokens>(p, panel, group, sums);

    wait_batches<0>();
    sync_block();  // the sums take the place of the ring
    auto& memory = shared<Shared<kTokens>>();
    QK_UNROLL for (int i = 0; i < kBlocks; ++i) {
        QK_UNROLL for (int n = 0; n < kTokens; ++n) {
            QK_UNROLL for (int c = 0; c < 4; ++c) {
                memory.warps[warp][8 * n + 2 * (lane % 4) + c % 2][16 * i + 8 * (c / 2) + lane / 4] = sums.total[i][n][c];
            }
        }
    }
    sync_block();
    const auto sum_of_block = [&](int token, int row) {
        float sum = memory.warps[0][token][row];
        QK_UNROLL for (int w = 1; w < kWarps; ++w) sum = add(sum, memory.warps[w][token][row]);
        return sum;
    };
    const auto store = [&](int token, int row, float sum) {
        const int64_t n = panel * kPanelRows + row, m = token_base + token;
        if (n >= p.N || m >= p.M) return;
        if (p.bias) {
            sum = add(sum, p.bias_is_float ? load_once(static_cast<const float*>(p.bias) + n)
                                           : half_to_float(T{}, load_once(static_cast<const uint16_t*>(p.bias) + n)));
        }
        p.out[m * p.N + n] = float_to_half(T{}, sum);
    };
    constexpr int kResults = 8 * kTokens * kPanelRows;
    if (splits == 1) {
        for (int e = static_cast<int>(threadIdx.x); e < kResults; e += kThreads) {
            store(e / kPanelRows, e % kPanelRows, sum_of_block(e / kPanelRows, e % kPanelRows));
        }
    } else if (p.partials) {
        for (int e = static_cast<int>(threadIdx.x); e < kResults; e += kThreads) {
            const int64_t n = panel * kPanelRows + e % kPanelRows, m = token_base + e / kPanelRows;
            if (n < p.N && m < p.M) {
                p.partials[(split * p.M + m) * p.N + n] = sum_of_block(e / kPanelRows, e % kPanelRows);
            }
        }
    } else {
        for (int e = static_cast<int>(threadIdx.x); e < kResults; e += kThreads) {
            memory.block[e / kPanelRows][e % kPanelRows] = sum_of_block(e / kPanelRows, e % kPanelRows);
        }
        sync_cluster();
        for (int e = static_cast<int>(cluster_rank()) * kThreads + static_cast<int>(threadIdx.x); e < kResults;
             e += static_cast<int>(splits) * kThreads) {
            const float* here = &memory.block[e / kPanelRows][e % kPanelRows];
            float sum = read_cluster(here, 0);
            for (unsigned rank = 1; rank < splits; ++rank) sum = add(sum, read_cluster(here, rank));
            store(e / kPanelRows, e % kPanelRows, sum);
        }
        sync_cluster();  // nobody's memory goes before all have read it
    }
}

template <class T, int kBits, bool kBook, bool kShift, int kTokens>
QK_KERNEL void QK_BOUNDS(kThreads, kTokens == 1 ? 2 : 1) matmul_kernel(const Params p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    // No bf16 in the tensor cores: the caller takes another way (ops/dequant_matmul/cuda.py).
    if constexpr (!IsSame<T, BF16>::value) multiply_panel<T, kBits, kBook, kShift, kTokens>(p);
#else
    multiply_panel<T, kBits, kBook, kShift, kTokens>(p);
#endif
}

// Where blocks cannot read one another's memory.
template <class T>
QK_KERNEL void add_partials(const Params p, int splits) {
    const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (e >= p.M * p.N) return;
    float sum = p.partials[e];
    for (int split = 1; split < splits; ++split) sum = add(sum, p.partials[split * p.M * p.N + e]);
    if (p.bias) {
        const int64_t n = e % p.N;
        sum = add(sum, p.bias_is_float ? load_once(static_cast<const float*>(p.bias) + n)
                                       : half_to_float(T{}, load_once(static_cast<const uint16_t*>(p.bias) + n)));
    }
    p.out[e] = float_to_half(T{}, sum);
}

template <class T, int kBits, bool kBook, bool kShift, int kTokens>
int run(Params p, int splits, Stream stream) {
    using Part = Stage<kBits, kTokens>;
    p.stages = stages<kBits, kTokens>();
    if (shared_limit() < kRingBytes) p.stages = 1;
    Launch how{};
    how.grid = dim3(static_cast<unsigned>(splits), static_cast<unsigned>((p.N + kPanelRows - 1) / kPanelRows),
                    static_cast<unsigned>((p.M + 8 * kTokens - 1) / (8 * kTokens)));
    how.threads = kThreads;
    how.shared_bytes = sizeof(Part) * static_cast<size_t>(kWarps * p.stages);
    if (how.shared_bytes < sizeof(Shared<kTokens>)) how.shared_bytes = sizeof(Shared<kTokens>);
    how.cluster = p.partials ? 1 : splits;
    how.stream = stream;
    const int status = launch(how, matmul_kernel<T, kBits, kBook, kShift, kTokens>, p);
    if (status != 0 || !p.partials) return status;
    Launch sum{};
    sum.grid = dim3(static_cast<unsigned>((p.M * p.N + 255) / 256));
    sum.threads = 256;
    sum.stream = stream;
    return launch(sum, add_partials<T>, p, splits);
}

template <class T, int kBits, bool kBook>
int with_shift(const Params& p, int splits, Stream stream) {
    if constexpr (kBook) {
        return p.M <= 8 ? run<T, kBits, kBook, false, 1>(p, splits, stream)
                        : run<T, kBits, kBook, false, 2>(p, splits, stream);
    } else {
        if (p.shift == Shift::none) {
            return p.M <= 8 ? run<T, kBits, kBook, false, 1>(p, splits, stream)
                            : run<T, kBits, kBook, false, 2>(p, splits, stream);
        }
        return p.M <= 8 ? run<T, kBits, kBook, true, 1>(p, splits, stream)
                        : run<T, kBits, kBook, true, 2>(p, splits, stream);
    }
}

template <class T>
int with_bits(const Weight& weight, const Params& p, int splits, Stream stream) {
    if (weight.codebook) return with_shift<T, 4, true>(p, splits, stream);
    switch (weight.bits) {
        case 2: return with_shift<T, 2, false>(p, splits, stream);
        case 3: return with_shift<T, 3, false>(p, splits, stream);
        case 4: return with_shift<T, 4, false>(p, splits, stream);
        default: return with_shift<T, 8, false>(p, splits, stream);
    }
}

}  // namespace

int dequant_matmul(const MatmulArgs& args, void* stream) {
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
    p.x = static_cast<const uint16_t*>(args.x);
    p.x_stride = args.x_stride;
    p.bias = args.bias;
    p.bias_is_float = args.bias_dtype == DType::f32;
    p.out = static_cast<uint16_t*>(args.out);
    p.partials = args.partials;
    for (int i = 0; i < 8; ++i) p.table[i] = weight.table[i];
    return args.dtype == DType::f16 ? with_bits<F16>(weight, p, args.splits, static_cast<Stream>(stream))
                                    : with_bits<BF16>(weight, p, args.splits, static_cast<Stream>(stream));
}

}  // namespace qk::cuda
