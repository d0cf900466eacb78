// y = x @ dequant(W).T + bias for up to 16 rows of x, in one pass over the packed weight; and the weight as floats.
//
// The weight is the left operand of the mma, so 8 rows of x cost what one costs. A block has a panel of 64 rows; its
// warps, and the blocks of a cluster, share the tiles along K and add their sums in a fixed order.
#include "cuda_matmul.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

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

// What a lane needs of a group: scales of its eight rows, their zero points or offsets. As they are stored, and
// loaded while the group before is multiplied.
struct Grid {
    uint4 scales[2], shifts[2];  // zero points: eight bytes of the first
};

template <bool kShift>
QK_DEVICE void load_grid(const Params& p, int64_t panel, int64_t group, Grid& grid) {
    if (group >= p.groups) return;
    const int64_t at = ((panel * p.groups + group) * 8 + threadIdx.x % kWarp / 4) * 8;
    QK_UNROLL for (int i = 0; i < 2; ++i) grid.scales[i] = load_four(p.scale_dtype, p.scales, at + 4 * i);
    if constexpr (kShift) {
        if (p.shift == Shift::zeros) {
            const uint2 bytes = load_once(reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(p.shifts) + at));
            grid.shifts[0] = make_uint4(bytes.x, bytes.y, 0, 0);
        } else {
            QK_UNROLL for (int i = 0; i < 2; ++i) grid.shifts[i] = load_four(p.scale_dtype, p.shifts, at + 4 * i);
        }
    }
}

// total += scale * group + shift * sum of x, and the next group begins.
template <int kBits, bool kShift, int kTokens>
QK_DEVICE void finish_group(const Params& p, int64_t panel, int64_t group, Grid& grid, Sums<kTokens>& sums) {
    constexpr int midpoint = 1 << (kBits - 1);
    float scales[8], shifts[8];
    QK_UNROLL for (int i = 0; i < 2; ++i) to_floats(p.scale_dtype, grid.scales[i], scales + 4 * i);
    if constexpr (kShift) {
        // The codes come less their midpoint.
        if (p.shift == Shift::zeros) {
            QK_UNROLL for (int i = 0; i < 8; ++i) {
                const int zero = byte_of(i < 4 ? grid.shifts[0].x : grid.shifts[0].y, i % 4);
                shifts[i] = static_cast<float>(midpoint - zero) * scales[i];
            }
        } else {
            QK_UNROLL for (int i = 0; i < 2; ++i) to_floats(p.scale_dtype, grid.shifts[i], shifts + 4 * i);
            QK_UNROLL for (int i = 0; i < 8; ++i) shifts[i] = fused(static_cast<float>(midpoint), scales[i], shifts[i]);
        }
    }
    load_grid<kShift>(p, panel, group + 1, grid);
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
    const Place place = place_of(p.splits, 8 * kTokens);
    const int64_t panel = place.rows, token_base = place.token_base;
    const uint4* codes = p.codes + panel * p.tiles * (kBits * kWarp);

    const auto border = [&](unsigned part) {
        return static_cast<int>(int64_t{p.tiles} * part / (p.splits * kWarps));
    };
    const unsigned part = place.split * kWarps + static_cast<unsigned>(warp);
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
    Grid grid{};
    if (begin < end) load_grid<kShift>(p, panel, group, grid);
    int slot = 0;
    for (int tile = begin; tile < end; ++tile) {
        wait_batches<kStages - 1>();
        Stage<kBits, kTokens>& stage = ring[slot];
        Tile<kBits> own;
        QK_UNROLL for (int u = 0; u < kBits; ++u) own.lines[u] = stage.codes[u][lane];
        multiply_half<T, kBits, kBook, kShift, kTokens, 0>(p, own, stage, sums);
        if (--left == 0) {
            finish_group<kBits, kShift, kTokens>(p, panel, group++, grid, sums);
            left = p.halves_of_group;
        }
        // The layout is whole tiles; the last may be half beyond the last group.
        if (group < p.groups) {
            multiply_half<T, kBits, kBook, kShift, kTokens, 1>(p, own, stage, sums);
            if (--left == 0) {
                finish_group<kBits, kShift, kTokens>(p, panel, group++, grid, sums);
                left = p.halves_of_group;
            }
        }
        if (tile + p.stages < end) begin_copy<kBits, kTokens>(p, codes, token_base, tile + p.stages, stage);
        close_batch();
        slot = slot + 1 == p.stages ? 0 : slot + 1;
    }
    if (begin < end && left != p.halves_of_group) finish_group<kBits, kShift, kTokens>(p, panel, group, grid, sums);

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
    const auto gather = [&] {
        for (int e = static_cast<int>(threadIdx.x); e < 8 * kTokens * kPanelRows; e += kThreads) {
            memory.block[e / kPanelRows][e % kPanelRows] = sum_of_block(e / kPanelRows, e % kPanelRows);
        }
    };
    hand_out<T, 8 * kTokens, kPanelRows, kThreads>(p, place, &memory.block[0][0], kPanelRows, sum_of_block, gather);
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

template <class T, int kBits, bool kBook, bool kShift, int kTokens>
int run(Params p, Stream stream) {
    using Part = Stage<kBits, kTokens>;
    p.stages = stages<kBits, kTokens>();
    if (shared_limit() < kRingBytes) p.stages = 1;
    const size_t ring = sizeof(Part) * static_cast<size_t>(kWarps * p.stages), sums = sizeof(Shared<kTokens>);
    const BlockSize block{kPanelRows, 8 * kTokens, kThreads, ring < sums ? sums : ring};
    return launch_product<T>(p, matmul_kernel<T, kBits, kBook, kShift, kTokens>, block, stream);
}

}  // namespace

int dequant_matmul(const MatmulArgs& args, void* stream) {
    if (args.M > kFewTokens) return dequant_matmul_batch(args, stream);
    const Params p = params_of(args);
    return with_kind(args, [&](auto kind) {
        using Kind = decltype(kind);
        using T = typename Kind::Type;
        const auto with_shift = [&](auto shift) {
            constexpr bool kShift = decltype(shift)::value != 0;
            return p.M <= 8 ? run<T, Kind::kBits, Kind::kBook, kShift, 1>(p, static_cast<Stream>(stream))
                            : run<T, Kind::kBits, Kind::kBook, kShift, 2>(p, static_cast<Stream>(stream));
        };
        if constexpr (!Kind::kBook) {
            if (p.shift != Shift::none) return with_shift(Constant<1>{});
        }
        return with_shift(Constant<0>{});
    });
}

}  // namespace qk::cuda
