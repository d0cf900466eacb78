// y = x @ dequant(W).T + bias for 17 to 64 rows of x, in one pass over the packed weight.
//
// So many rows of x cost more to bring than the weight does, so a block has two panels, and its warps share x: four of
// them, 32 rows of the weight each, go along one half of the block's part of K, four along the other.
#include "cuda_matmul.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

constexpr int kPanels = 2;  // of a block
constexpr int kRows = kPanels * kPanelRows;
constexpr int kRowWarps = 4, kRuns = 2;  // warps along the rows, and along K
constexpr int kRunThreads = kRowWarps * kWarp;
constexpr int kThreads = kRuns * kRunThreads;
constexpr int kOwn = kRows / kRowWarps / 16;  // blocks of 16 rows of a warp

// A tile of each panel and run, and the activations that go with it.
template <int kBits, int kTokens>
struct Stage {
    uint4 codes[kRuns][kPanels][kBits][kWarp];
    uint4 x[kRuns][kTokens][2][kWarp];  // 8 columns of each 32
};

// As many as fit into what every GPU since sm_80 has.
constexpr int kRingBytes = 96 << 10;
template <int kBits, int kTokens>
constexpr int stages() {
    constexpr int fit = kRingBytes / static_cast<int>(sizeof(Stage<kBits, kTokens>));
    return fit < 6 ? fit : 6;
}

// Tiles of a run: begin <= tile < end.
struct Run {
    int begin, end;
};

QK_DEVICE Run run_of(const Params& p, unsigned split, int run) {
    const int64_t parts = int64_t{p.splits} * kRuns, part = int64_t{split} * kRuns + run;
    return {static_cast<int>(p.tiles * part / parts), static_cast<int>(p.tiles * (part + 1) / parts)};
}

// The warps of a run copy what they will all read.
template <int kBits, int kTokens>
QK_DEVICE void begin_copy(const Params& p, const Place& place, int64_t panels, int run, int tile,
                          Stage<kBits, kTokens>& stage) {
    constexpr int kLines = kPanels * kBits * kWarp, kActivations = kTokens * 2 * kWarp;
    const int thread = static_cast<int>(threadIdx.x) % kRunThreads;
    QK_UNROLL for (int turn = 0; turn < (kLines + kRunThreads - 1) / kRunThreads; ++turn) {
        const int e = thread + turn * kRunThreads;
        if (kLines % kRunThreads != 0 && e >= kLines) break;
        // Beyond the last panel the last once more; its results are not stored.
        const int64_t wanted = place.rows * kPanels + e / (kBits * kWarp);
        const int64_t panel = wanted < panels ? wanted : panels - 1;
        copy_async(&stage.codes[run][0][0][0] + e,
                   p.codes + (panel * p.tiles + tile) * (kBits * kWarp) + e % (kBits * kWarp));
    }
    QK_UNROLL for (int turn = 0; turn < kActivations / kRunThreads; ++turn) {
        const int e = thread + turn * kRunThreads;
        const int lane = e % kWarp, half = e / kWarp % 2;
        const int64_t token = place.token_base + e / (2 * kWarp) * 8 + lane / 4;
        const int64_t column = int64_t{tile} * kTileColumns + 32 * half + 8 * (lane % 4);
        const bool inside = token < p.M && column < p.K;
        const uint16_t* from = p.x + (inside ? token * p.x_stride + column : 0);
        copy_async(&stage.x[run][0][0][0] + e, reinterpret_cast<const uint4*>(from), inside);
    }
}

// The lines of a warp's half of a panel, as if they were the first: Codes<>::get asks for blocks 0 and 1.
template <int kBits>
QK_DEVICE void read_lines(const uint4 (&lines)[kBits][kWarp], int half, int lane, Tile<kBits>& tile) {
    if constexpr (kBits == 2 || kBits == 3) {
        tile.lines[0] = lines[half][lane];
    } else {
        QK_UNROLL for (int u = 0; u < kBits / 2; ++u) tile.lines[u] = lines[half * (kBits / 2) + u][lane];
    }
    if constexpr (kBits == 3) {
        const uint4 thirds = lines[2][lane];
        tile.lines[2] = half ? make_uint4(thirds.z, thirds.w, 0, 0) : thirds;
    }
}

QK_DEVICE uint32_t twice_half(F16, int whole) { return twice(to_f16(static_cast<float>(whole))); }
QK_DEVICE uint32_t subtract_two(F16, uint32_t a, uint32_t b) { return f16_sub2(a, b); }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
QK_DEVICE uint32_t twice_half(BF16, int whole) { return twice(to_bf16(static_cast<float>(whole))); }
// a - b for whole numbers below 256, which is exact.
QK_DEVICE uint32_t subtract_two(BF16, uint32_t a, uint32_t b) { return bf16_fma2(b, twice(0xbf80), a); }
#endif

template <int kTokens>
struct Sums {
    float group[kOwn][kTokens][4];
    float total[kOwn][kTokens][4];
};

// 32 columns of a tile.
template <class T, int kBits, bool kBook, bool kZeros, int kTokens, int kHalf>
QK_DEVICE void multiply_half(const Params& p, const Tile<kBits>& codes, const uint4 (&x)[kTokens][2][kWarp],
                             const uint32_t (&zeros)[2 * kOwn], Sums<kTokens>& sums) {
    uint32_t a[2][kOwn][4];
    const auto decode = [&](auto block, auto step) {
        constexpr int i = decltype(block)::value, s = decltype(step)::value;
        uint32_t(&to)[4] = a[s % 2][i];
        if constexpr (kBook) {
            look_up<i, s>(codes, p.table, to);
        } else {
            Codes<T, kBits>::template get<i, s>(codes, to);
        }
        if constexpr (kZeros) {
            QK_UNROLL for (int j = 0; j < 4; ++j) to[j] = subtract_two(T{}, to[j], zeros[2 * i + j % 2]);
        }
    };
    decode(Constant<0>{}, Constant<2 * kHalf>{});
    decode(Constant<1>{}, Constant<2 * kHalf>{});
    decode(Constant<0>{}, Constant<2 * kHalf + 1>{});
    decode(Constant<1>{}, Constant<2 * kHalf + 1>{});
    QK_UNROLL for (int n = 0; n < kTokens; ++n) {
        const uint4 own = x[n][kHalf][threadIdx.x % kWarp];
        QK_UNROLL for (int s = 0; s < 2; ++s) {
            const uint32_t b[2] = {word_of(own, 2 * s), word_of(own, 2 * s + 1)};
            QK_UNROLL for (int i = 0; i < kOwn; ++i) Mma<T>::run(sums.group[i][n], a[s][i], b);
        }
    }
}

template <int kTokens>
struct Shared {
    float sums[8 * kTokens][kRows + 4];  // + 4: the four columns of a lane's rows fall in other banks
};

template <class T, int kBits, bool kBook, bool kZeros, int kTokens>
QK_DEVICE void multiply_panels(const Params& p) {
    constexpr int kMidpoint = 1 << (kBits - 1);
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int run = warp / kRowWarps, own_panel = warp % kRowWarps / 2, half = warp % 2;
    const Place place = place_of(p.splits, 8 * kTokens);
    const int64_t panels = (p.N + kPanelRows - 1) / kPanelRows;
    const int64_t wanted = place.rows * kPanels + own_panel, panel = wanted < panels ? wanted : panels - 1;
    const Run part = run_of(p, place.split, run);
    int steps = 0;  // of the longest run
    QK_UNROLL for (int r = 0; r < kRuns; ++r) {
        const Run other = run_of(p, place.split, r);
        if (other.end - other.begin > steps) steps = other.end - other.begin;
    }

    Sums<kTokens> sums;
    QK_UNROLL for (int i = 0; i < kOwn; ++i) {
        QK_UNROLL for (int n = 0; n < kTokens; ++n) {
            QK_UNROLL for (int c = 0; c < 4; ++c) sums.group[i][n][c] = sums.total[i][n][c] = 0.0f;
        }
    }

    int group = part.begin * 2 / p.halves_of_group;
    int left = p.halves_of_group - (part.begin * 2 - group * p.halves_of_group);
    // Of the rows of this lane. What a group needs is loaded while the one before is multiplied: the scales it needs
    // at its end, the zero points, a byte each, at its beginning.
    const auto at = [&](int of_group) { return ((panel * p.groups + of_group) * 8 + lane / 4) * 8 + 4 * half; };
    uint4 scales{};
    uint32_t next_zeros = 0, zeros[2 * kOwn];
    const auto load_zeros = [&](int of_group) {
        if (kZeros && of_group < p.groups) {
            next_zeros = load_once(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(p.shifts) + at(of_group)));
        }
    };
    const auto enter_group = [&] {
        if (group < p.groups) scales = load_four(p.scale_dtype, p.scales, at(group));
        if constexpr (kZeros) {
            QK_UNROLL for (int r = 0; r < 2 * kOwn; ++r) zeros[r] = twice_half(T{}, byte_of(next_zeros, r) - kMidpoint);
        }
        load_zeros(group + 1);
    };
    const auto finish_group = [&] {
        float factors[2 * kOwn];
        to_floats(p.scale_dtype, scales, factors);
        QK_UNROLL for (int i = 0; i < kOwn; ++i) {
            QK_UNROLL for (int n = 0; n < kTokens; ++n) {
                QK_UNROLL for (int c = 0; c < 4; ++c) {
                    sums.total[i][n][c] = fused(factors[2 * i + c / 2], sums.group[i][n][c], sums.total[i][n][c]);
                    sums.group[i][n][c] = 0.0f;
                }
            }
        }
    };
    load_zeros(group);
    enter_group();
    const auto end_half = [&] {
        if (--left != 0) return;
        finish_group();
        ++group;
        left = p.halves_of_group;
        enter_group();
    };

    // p.stages is kStages, but for devices with little shared memory, which have no asynchronous copies either.
    constexpr int kStages = stages<kBits, kTokens>();
    auto* const ring = &shared<Stage<kBits, kTokens>>();
    const auto copy = [&](int step, Stage<kBits, kTokens>& stage) {
        const int tile = part.begin + step;
        if (tile < part.end) begin_copy<kBits, kTokens>(p, place, panels, run, tile, stage);
    };
    for (int step = 0; step < p.stages - 1; ++step) {
        copy(step, ring[step]);
        close_batch();
    }
    int slot = 0, free_slot = p.stages - 1;
    for (int step = 0; step < steps; ++step) {
        wait_batches<kStages - 2>();
        sync_block();  // all have copied this stage, and all are done with the one before
        copy(step + p.stages - 1, ring[free_slot]);
        close_batch();
        free_slot = slot;
        const Stage<kBits, kTokens>& stage = ring[slot];
        slot = slot + 1 == p.stages ? 0 : slot + 1;
        if (part.begin + step >= part.end) continue;
        Tile<kBits> own;
        read_lines<kBits>(stage.codes[run][own_panel], half, lane, own);
        multiply_half<T, kBits, kBook, kZeros, kTokens, 0>(p, own, stage.x[run], zeros, sums);
        end_half();
        // The layout is whole tiles; the last may be half beyond the last group.
        if (group < p.groups) {
            multiply_half<T, kBits, kBook, kZeros, kTokens, 1>(p, own, stage.x[run], zeros, sums);
            end_half();
        }
    }
    if (part.begin < part.end && left != p.halves_of_group) finish_group();

    wait_batches<0>();
    sync_block();  // the sums take the place of the ring
    auto& memory = shared<Shared<kTokens>>();
    const auto each = [&](auto&& act) {
        QK_UNROLL for (int i = 0; i < kOwn; ++i) {
            QK_UNROLL for (int n = 0; n < kTokens; ++n) {
                QK_UNROLL for (int c = 0; c < 4; ++c) {
                    act(memory.sums[8 * n + 2 * (lane % 4) + c % 2][32 * (warp % kRowWarps) + 16 * i + 8 * (c / 2) + lane / 4],
                        sums.total[i][n][c]);
                }
            }
        }
    };
    if (run == 0) each([](float& place_of_sum, float sum) { place_of_sum = sum; });
    sync_block();
    if (run == 1) each([](float& place_of_sum, float sum) { place_of_sum = add(place_of_sum, sum); });
    sync_block();
    hand_out<T, 8 * kTokens, kRows, kThreads>(
        p, place, &memory.sums[0][0], kRows + 4, [&](int token, int row) { return memory.sums[token][row]; }, [] {});
}

template <class T, int kBits, bool kBook, bool kZeros, int kTokens>
QK_KERNEL void QK_BOUNDS(kThreads, 1) matmul_batch_kernel(const Params p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    // No bf16 in the tensor cores: the caller takes another way (ops/dequant_matmul/cuda.py).
    if constexpr (!IsSame<T, BF16>::value) multiply_panels<T, kBits, kBook, kZeros, kTokens>(p);
#else
    multiply_panels<T, kBits, kBook, kZeros, kTokens>(p);
#endif
}

template <class T, int kBits, bool kBook, bool kZeros, int kTokens>
int run(Params p, Stream stream) {
    using Part = Stage<kBits, kTokens>;
    p.stages = stages<kBits, kTokens>();
    const int fit = shared_limit() / static_cast<int>(sizeof(Part));
    if (fit < p.stages) p.stages = fit;
    const size_t ring = sizeof(Part) * static_cast<size_t>(p.stages), sums = sizeof(Shared<kTokens>);
    const BlockSize block{kRows, 8 * kTokens, kThreads, ring < sums ? sums : ring};
    return launch_product<T>(p, matmul_batch_kernel<T, kBits, kBook, kZeros, kTokens>, block, stream);
}

}  // namespace

int dequant_matmul_batch(const MatmulArgs& args, void* stream) {
    const Params p = params_of(args);
    return with_kind(args, [&](auto kind) {
        using Kind = decltype(kind);
        using T = typename Kind::Type;
        const auto with_zeros = [&](auto zeros) {
            constexpr bool kZeros = decltype(zeros)::value != 0;
            return p.M <= 32 ? run<T, Kind::kBits, Kind::kBook, kZeros, 4>(p, static_cast<Stream>(stream))
                             : run<T, Kind::kBits, Kind::kBook, kZeros, 8>(p, static_cast<Stream>(stream));
        };
        if constexpr (!Kind::kBook) {
            if (p.shift == Shift::zeros) return with_zeros(Constant<1>{});
        }
        return with_zeros(Constant<0>{});
    });
}

}  // namespace qk::cuda
