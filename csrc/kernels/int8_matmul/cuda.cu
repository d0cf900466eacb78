// int8 activations by an 8-bit weight in the layout "cuda.m64" (../dequant_matmul/cuda_layout.h), one pass over it for
// up to 64 rows of x; and the pieces for more: the weight's codes as int8, and the scaling of int32 sums.
//
// The weight is the left operand of the mma. A block has a panel of 64 rows; its warps, and the blocks of a cluster,
// share the tiles along K. Integer sums have no order.
#include "../dequant_matmul/cuda_layout.h"
#include "qkern/cuda/chunk.h"
#include "qkern/cuda/kernels.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

using namespace qk::gpu;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kLines = 8;  // of a tile
constexpr int kMidpoint = 128;
constexpr uint32_t kSigns = 0x80808080u, kOnes = 0x01010101u;

struct Params {
    Int8MatmulArgs args;
    int64_t tiles;
    int stages;
};

// What a lane reads of a tile of the weight and of the rows of x that go with it.
template <int kTokens>
struct Stage {
    uint4 codes[kLines][kWarp];
    uint2 x[kTokens][2][kWarp];  // 8 columns of each 32
};

// Every lane copies what it will itself read, so no lane waits for another. 96 KiB is what every device with
// asynchronous copies has, and sm_90 twice.
constexpr int kRingBytes = 96 << 10;
template <int kTokens>
constexpr int stages() {
    constexpr int fit = kRingBytes / (kWarps * static_cast<int>(sizeof(Stage<kTokens>)));
    return fit < 4 ? fit : 4;
}

template <int kTokens>
QK_DEVICE void begin_copy(const Int8MatmulArgs& args, const uint4* panel, int64_t token_base, int64_t tile,
                          Stage<kTokens>& stage) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const uint4* at = panel + tile * (kLines * kWarp) + lane;
    QK_UNROLL for (int u = 0; u < kLines; ++u) copy_async(&stage.codes[u][lane], at + u * kWarp);
    QK_UNROLL for (int n = 0; n < kTokens; ++n) {
        const int64_t token = token_base + 8 * n + lane / 4;
        QK_UNROLL for (int half = 0; half < 2; ++half) {
            const int64_t column = tile * kTileColumns + 32 * half + 8 * (lane % 4), left = args.K - column;
            const int bytes = token >= args.M || left <= 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
            const int8_t* from = args.x + (bytes ? token * args.x_stride + column : 0);
            copy_async(&stage.x[n][half][lane], reinterpret_cast<const uint2*>(from), bytes);
        }
    }
}

// A lane's part of two rows of 16: eight adjacent columns of rows g and g + 8 as signed bytes.
QK_DEVICE void read_codes(const uint4& line, uint32_t (&a)[4]) {
    const uint32_t x = line.x ^ kSigns, y = line.y ^ kSigns, z = line.z ^ kSigns, w = line.w ^ kSigns;
    a[0] = byte_permute(x, y, 0x5410);
    a[1] = byte_permute(x, y, 0x7632);
    a[2] = byte_permute(z, w, 0x5410);
    a[3] = byte_permute(z, w, 0x7632);
}

// Ones in the bytes of four columns that x has.
QK_DEVICE uint32_t ones_before(int64_t left) {
    return left >= 4 ? kOnes : left <= 0 ? 0u : kOnes >> (8 * (4 - static_cast<int>(left)));
}

// Products of the codes, and what zero points need beside them.
template <int kTokens>
struct Sums {
    int products[kBlocks][kTokens][4];
    int codes[kBlocks][4];     // every column the same
    int activations[kTokens];  // of row g of eight of x: the columns that this lane reads
};

template <bool kShift, int kTokens>
QK_DEVICE void multiply_tile(const Int8MatmulArgs& args, int64_t tile, const Stage<kTokens>& stage, Sums<kTokens>& sums) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    QK_UNROLL for (int half = 0; half < 2; ++half) {
        uint32_t b[kTokens][2];
        QK_UNROLL for (int n = 0; n < kTokens; ++n) {
            b[n][0] = stage.x[n][half][lane].x;
            b[n][1] = stage.x[n][half][lane].y;
        }
        const int64_t left = args.K - tile * kTileColumns - 32 * half - 8 * (lane % 4);
        const uint32_t present[2] = {ones_before(left), ones_before(left - 4)};
        QK_UNROLL for (int i = 0; i < kBlocks; ++i) {
            uint32_t a[4];
            read_codes(stage.codes[2 * i + half][lane], a);
            QK_UNROLL for (int n = 0; n < kTokens; ++n) Mma<S8>::run(sums.products[i][n], a, b[n]);
            if constexpr (kShift) Mma<S8>::run(sums.codes[i], a, present);
        }
        if constexpr (kShift) {
            QK_UNROLL for (int n = 0; n < kTokens; ++n) {
                sums.activations[n] = add_bytes(b[n][0], add_bytes(b[n][1], sums.activations[n]));
            }
        }
    }
}

// ---- from sums to results --------------------------------------------------------------------------------------

// Where the values of a row of the weight lie.
QK_DEVICE int64_t place_of(int64_t n) {
    const int64_t row = n % kPanelRows;
    return n - row + row % 8 * 8 + row / 8;
}

// Zero points, less the midpoint that the codes come without; modulo 2^32, as all that is done with them: what is added
// on the way to a sum may pass int32, the sum does not.
QK_DEVICE uint32_t zero_of(const Weight& weight, int64_t n) {
    int zero = kMidpoint;
    if (weight.shift == Shift::zeros) zero = load_once(static_cast<const uint8_t*>(weight.shifts) + place_of(n));
    if (weight.shift == Shift::offsets) zero = 0;
    return static_cast<uint32_t>(zero - kMidpoint);
}
QK_DEVICE uint32_t zero_of(const int8_t* x_zeros, int64_t m) {
    return x_zeros ? static_cast<uint32_t>(static_cast<int>(load_once(x_zeros + m))) : 0u;
}

QK_DEVICE void store_sum(const Weight& weight, const Int8Output& output, int64_t m, int64_t n, int sum) {
    static_cast<int32_t*>(output.out)[m * weight.N + n] = sum;
}

QK_DEVICE void store_scaled(const Weight& weight, const Int8Output& output, int64_t m, int64_t n, float total) {
    const int64_t at = place_of(n);
    const float x_scale = load_once(output.x_scales + m);
    float value = mul(total, mul(load_float(weight.scale_dtype, weight.scales, at), x_scale));
    if (weight.shift == Shift::offsets) {
        const float offset = load_float(weight.scale_dtype, weight.shifts, at);
        value = add(value, mul(mul(offset, x_scale), load_once(output.x_sums + m)));
    }
    if (output.bias) value = add(value, load_float(output.bias_dtype, output.bias, n));
    switch (output.dtype) {
        case DType::f32: store_float<DType::f32>(output.out, m * weight.N + n, value); break;
        case DType::f16: store_float<DType::f16>(output.out, m * weight.N + n, value); break;
        default: store_float<DType::bf16>(output.out, m * weight.N + n, value);
    }
}

QK_KERNEL void QK_BOUNDS(256) scale_kernel(const ScaleSumsArgs args) {
    const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (e >= args.M * args.rows) return;
    const int64_t m = quotient(e, args.rows), row = e - m * args.rows, n = args.first_row + row;
    const int64_t part = args.M * args.sums_stride;
    const int32_t* sums = args.sums + m * args.sums_stride + row;
    const auto segment = [&](int64_t s) {
        uint32_t sum = 0;
        for (int split = 0; split < args.splits; ++split) {
            sum += static_cast<uint32_t>(load_once(sums + (s * args.splits + split) * part));
        }
        if (args.activations) {
            sum -= zero_of(args.weight, n) * static_cast<uint32_t>(load_once(args.activations + s * args.M + m));
        }
        if (args.codes) {
            sum -= zero_of(args.x_zeros, m) * static_cast<uint32_t>(load_once(args.codes + s * args.sums_stride + row));
        }
        return static_cast<int>(sum);
    };
    const int first = segment(0);
    if (!args.output.x_scales) return store_sum(args.weight, args.output, m, n, first);
    float total = static_cast<float>(first);
    for (int s = 1; s < args.segments; ++s) total = add(total, static_cast<float>(segment(s)));
    store_scaled(args.weight, args.output, m, n, total);
}

// ---- the product -------------------------------------------------------------------------------------------------

template <int kTokens>
struct Shared {
    uint32_t products[kWarps][8 * kTokens][kPanelRows + 4];  // + 4: the four columns of a lane's rows fall in other banks
    uint32_t activations[kWarps][8 * kTokens];
    uint32_t codes[kWarps][kPanelRows];
};

template <bool kShift, int kTokens>
QK_KERNEL void QK_BOUNDS(kThreads, 2) int8_kernel(const Params p) {
    const Int8MatmulArgs& args = p.args;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t panel = blockIdx.y, token_base = int64_t{blockIdx.z} * (8 * kTokens);
    const int splits = args.splits, split = static_cast<int>(blockIdx.x) % splits;
    const int64_t segment = static_cast<int>(blockIdx.x) / splits;
    const auto* codes = reinterpret_cast<const uint4*>(args.weight.codes) + panel * p.tiles * (kLines * kWarp);

    const int64_t first = segment * args.segment_tiles;
    const int64_t length = p.tiles - first < args.segment_tiles ? p.tiles - first : args.segment_tiles;
    const int part = split * kWarps + warp;
    const int64_t begin = first + length * part / (splits * kWarps), end = first + length * (part + 1) / (splits * kWarps);

    Sums<kTokens> sums{};
    // p.stages is kStages, but for devices with little shared memory, which have no asynchronous copies either.
    constexpr int kStages = stages<kTokens>();
    Stage<kTokens>* const ring = &shared<Stage<kTokens>>() + warp * p.stages;
    for (int a = 0; a < p.stages; ++a) {
        if (begin + a < end) begin_copy<kTokens>(args, codes, token_base, begin + a, ring[a]);
        close_batch();
    }
    int slot = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
        wait_batches<kStages - 1>();
        multiply_tile<kShift, kTokens>(args, tile, ring[slot], sums);
        if (tile + p.stages < end) begin_copy<kTokens>(args, codes, token_base, tile + p.stages, ring[slot]);
        close_batch();
        slot = slot + 1 == p.stages ? 0 : slot + 1;
    }

    wait_batches<0>();
    sync_block();  // the sums take the place of the ring
    auto& memory = shared<Shared<kTokens>>();
    QK_UNROLL for (int i = 0; i < kBlocks; ++i) {
        QK_UNROLL for (int c = 0; c < 4; ++c) {
            const int row = 16 * i + 8 * (c / 2) + lane / 4;
            QK_UNROLL for (int n = 0; n < kTokens; ++n) {
                memory.products[warp][8 * n + 2 * (lane % 4) + c % 2][row] = static_cast<uint32_t>(sums.products[i][n][c]);
            }
            if (kShift && c % 2 == 0 && lane % 4 == 0) memory.codes[warp][row] = static_cast<uint32_t>(sums.codes[i][c]);
        }
    }
    if constexpr (kShift) {
        QK_UNROLL for (int n = 0; n < kTokens; ++n) {
            int of_row = sums.activations[n];
            of_row += shuffle_xor(of_row, 1);
            of_row += shuffle_xor(of_row, 2);
            if (lane % 4 == 0) memory.activations[warp][8 * n + lane / 4] = static_cast<uint32_t>(of_row);
        }
    }
    sync_block();
    // Columns of x in the segment, of which one block tells.
    const int64_t last = (first + length) * kTileColumns;
    const int64_t columns = split > 0 ? 0 : (last < args.K ? last : args.K) - first * kTileColumns;
    const auto sum_of_block = [&](int token, int row) {
        uint32_t sum = 0, sum_of_x = 0, sum_of_codes = 0;
        QK_UNROLL for (int w = 0; w < kWarps; ++w) sum += memory.products[w][token][row];
        if constexpr (kShift) {
            QK_UNROLL for (int w = 0; w < kWarps; ++w) {
                sum_of_x += memory.activations[w][token];
                sum_of_codes += memory.codes[w][row];
            }
            const int64_t m = token_base + token;
            const uint32_t zero = zero_of(args.weight, panel * kPanelRows + row);
            const uint32_t x_zero = m < args.M ? zero_of(args.x_zeros, m) : 0u;
            sum -= zero * (sum_of_x - x_zero * static_cast<uint32_t>(columns)) + x_zero * sum_of_codes;
        }
        return sum;
    };
    const auto store = [&](int token, int row, uint32_t bits) {
        const int64_t n = panel * kPanelRows + row, m = token_base + token;
        const int sum = static_cast<int>(bits);
        if (n >= args.weight.N || m >= args.M) return;
        if (args.partials) {
            args.partials[(blockIdx.x * args.M + m) * args.weight.N + n] = sum;
        } else if (args.output.x_scales) {
            store_scaled(args.weight, args.output, m, n, static_cast<float>(sum));
        } else {
            store_sum(args.weight, args.output, m, n, sum);
        }
    };
    constexpr int kResults = 8 * kTokens * kPanelRows;
    const int thread = static_cast<int>(threadIdx.x);
    if (args.partials || splits == 1) {
        for (int e = thread; e < kResults; e += kThreads) {
            store(e / kPanelRows, e % kPanelRows, sum_of_block(e / kPanelRows, e % kPanelRows));
        }
        return;
    }
    for (int e = thread; e < kResults; e += kThreads) {
        memory.products[0][e / kPanelRows][e % kPanelRows] = sum_of_block(e / kPanelRows, e % kPanelRows);
    }
    sync_cluster();
    for (int e = split * kThreads + thread; e < kResults; e += splits * kThreads) {
        const uint32_t* here = &memory.products[0][e / kPanelRows][e % kPanelRows];
        uint32_t sum = 0;
        for (int rank = 0; rank < splits; ++rank) sum += read_cluster(here, static_cast<unsigned>(rank));
        store(e / kPanelRows, e % kPanelRows, sum);
    }
    leave_cluster();  // nobody's memory goes before all have read it
}

template <bool kShift, int kTokens>
int run(Params p, Stream stream) {
    const Int8MatmulArgs& args = p.args;
    p.stages = shared_limit() < kRingBytes ? 1 : stages<kTokens>();
    Launch how{};
    how.grid = dim3(static_cast<unsigned>(args.segments * args.splits),
                    static_cast<unsigned>((args.weight.N + kPanelRows - 1) / kPanelRows),
                    static_cast<unsigned>((args.M + 8 * kTokens - 1) / (8 * kTokens)));
    how.threads = kThreads;
    how.shared_bytes = sizeof(Stage<kTokens>) * static_cast<size_t>(kWarps * p.stages);
    if (how.shared_bytes < sizeof(Shared<kTokens>)) how.shared_bytes = sizeof(Shared<kTokens>);
    how.cluster = args.partials ? 1 : args.splits;
    how.stream = stream;
    const int status = launch(how, int8_kernel<kShift, kTokens>, p);
    if (status != 0 || !args.partials) return status;
    ScaleSumsArgs scale{};
    scale.sums = args.partials;
    scale.sums_stride = scale.rows = args.weight.N;
    scale.segments = args.segments;
    scale.splits = args.splits;
    scale.weight = args.weight;
    scale.M = args.M;
    scale.output = args.output;
    return scale_sums(scale, stream);
}

template <bool kShift>
int with_tokens(const Params& p, Stream stream) {
    if (p.args.M <= 8) return run<kShift, 1>(p, stream);
    if (p.args.M <= 16) return run<kShift, 2>(p, stream);
    // The sums of 64 rows of x need more shared memory than the smallest devices have.
    if (p.args.M <= 32 || shared_limit() < kRingBytes) return run<kShift, 4>(p, stream);
    return run<kShift, 8>(p, stream);
}

// ---- the weight as int8 ----------------------------------------------------------------------------------------

QK_KERNEL void QK_BOUNDS(kThreads) decode_codes_kernel(const DecodeCodesArgs args, int64_t tiles) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t tile = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    if (tile >= tiles) return;
    const auto* at = reinterpret_cast<const uint4*>(args.weight.codes) +
                     ((args.first_row / kPanelRows + blockIdx.y) * tiles + tile) * (kLines * kWarp) + lane;
    uint4 lines[kLines];
    QK_UNROLL for (int u = 0; u < kLines; ++u) lines[u] = load_stream(at + u * kWarp);
    QK_UNROLL for (int u = 0; u < kLines; ++u) {
        uint32_t a[4];
        read_codes(lines[u], a);
        QK_UNROLL for (int lower = 0; lower < 2; ++lower) {
            const int64_t row = int64_t{blockIdx.y} * kPanelRows + 16 * (u / 2) + 8 * lower + lane / 4;
            const int64_t column = tile * kTileColumns + 32 * (u % 2) + 8 * (lane % 4);
            *reinterpret_cast<uint64_t*>(args.out + row * tiles * kTileColumns + column) =
                a[lower] | (static_cast<uint64_t>(a[2 + lower]) << 32);
        }
    }
}

int64_t tiles_of(const Weight& weight) { return qk::cuda::tiles_of(weight.groups, weight.group_columns); }

}  // namespace

int int8_matmul(const Int8MatmulArgs& args, void* stream) {
    Params p{};
    p.args = args;
    p.tiles = tiles_of(args.weight);
    const bool shift = args.weight.shift != Shift::none || args.x_zeros;
    return shift ? with_tokens<true>(p, static_cast<Stream>(stream)) : with_tokens<false>(p, static_cast<Stream>(stream));
}

int scale_sums(const ScaleSumsArgs& args, void* stream) {
    if (args.M * args.rows > UINT32_MAX) return kErrorBadLaunch;
    Launch how{};
    how.grid = dim3(static_cast<unsigned>((args.M * args.rows + 255) / 256));
    how.threads = 256;
    how.stream = static_cast<Stream>(stream);
    return launch(how, scale_kernel, args);
}

int decode_codes(const DecodeCodesArgs& args, void* stream) {
    const int64_t tiles = tiles_of(args.weight);
    Launch how{};
    how.grid = dim3(static_cast<unsigned>((tiles + kWarps - 1) / kWarps), static_cast<unsigned>(args.rows / kPanelRows));
    how.threads = kThreads;
    how.stream = static_cast<Stream>(stream);
    return launch(how, decode_codes_kernel, args, tiles);
}

}  // namespace qk::cuda
