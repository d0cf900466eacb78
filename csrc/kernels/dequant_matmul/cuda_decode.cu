// The packed weight as floats, rows of the layout in the layout's order of columns; and x brought into that order.
#include "cuda_codes.h"
#include "qkern/cuda/chunk.h"
#include "qkern/cuda/kernels.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

using namespace qk::gpu;

constexpr int kWarps = 4;

// The code in the low (0) or high (1) half of register j of step s; the table of cuda_layout.h.
template <int kBits, bool kBook>
QK_DEVICE int code_at(const Tile<kBits>& tile, int i, int s, int j, int high) {
    if constexpr (kBits == 8) {
        return static_cast<int>(word_of(tile.lines[2 * i + s / 2], 2 * (s % 2) + j / 2) >> (8 * (2 * (j % 2) + high))) & 255;
    } else if constexpr (kBits == 4) {
        const int nibble = kBook ? 2 * j + high : j + 4 * high;
        return static_cast<int>(word_of(tile.lines[i], s) >> (4 * nibble)) & 15;
    } else {
        const uint32_t w = word_of(tile.lines[i / 2], 2 * (i % 2) + s / 2);
        int code = static_cast<int>(w >> (2 * (4 * (s % 2) + j) + 16 * high)) & 3;
        if constexpr (kBits == 3) {
            code |= (static_cast<int>(word_of(tile.lines[2], i) >> (third_bit(4 * s + j) + 16 * high)) & 1) << 2;
        }
        return code;
    }
}

struct Params {
    Weight weight;
    const float* table;
    int64_t first_panel, rows, padded;
    int tiles;
    void* out;
};

template <int kBits, bool kBook, DType kOut>
QK_KERNEL void QK_BOUNDS(kWarps * kWarp) decode_tile(const Params p) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t tile_index = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
    if (tile_index >= p.tiles) return;
    const Weight& weight = p.weight;
    const int64_t panel = p.first_panel + blockIdx.y;
    Tile<kBits> tile;
    const auto* at = reinterpret_cast<const uint4*>(weight.codes) +
                     (panel * p.tiles + tile_index) * (kBits * kWarp) + lane;
    QK_UNROLL for (int u = 0; u < kBits; ++u) tile.lines[u] = load_stream(at + u * kWarp);
    QK_UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t column = tile_index * kTileColumns + 32 * half + 8 * (lane % 4);
        // The layout is whole tiles; the last may be half beyond the last group. What lies there is read and not used.
        const bool inside = column < p.padded;
        const int64_t group = inside ? column / weight.group_columns : 0;
        QK_UNROLL for (int block_row = 0; block_row < 8; ++block_row) {
            const int i = block_row / 2, lower = block_row % 2;
            const int64_t row = int64_t{blockIdx.y} * kPanelRows + 16 * i + 8 * lower + lane / 4;
            const int64_t where = ((panel * weight.groups + group) * 8 + lane / 4) * 8 + block_row;
            const float scale = load_float(weight.scale_dtype, weight.scales, where);
            int zero = 1 << (kBits - 1);
            float offset = 0.0f;
            if (weight.shift == Shift::zeros) zero = load_once(static_cast<const uint8_t*>(weight.shifts) + where);
            if (weight.shift == Shift::offsets) offset = load_float(weight.scale_dtype, weight.shifts, where);
            float values[8];
            QK_UNROLL for (int c = 0; c < 8; ++c) {
                const int code = code_at<kBits, kBook>(tile, i, 2 * half + c / 4, lower + 2 * (c / 2 % 2), c % 2);
                if constexpr (kBook) {
                    values[c] = mul(load_once(p.table + code), scale);
                } else if (weight.shift == Shift::offsets) {
                    values[c] = add(mul(static_cast<float>(code), scale), offset);
                } else {
                    values[c] = mul(static_cast<float>(code - zero), scale);
                }
            }
            if (inside && row < p.rows) store_chunk<kOut>(p.out, row * p.padded + column, values);
        }
    }
}

QK_KERNEL void QK_BOUNDS(256) gather(const GatherArgs args) {
    const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (column >= args.padded) return;
    const int64_t from = args.columns ? load_once(args.columns + column) : column < args.K ? column : -1;
    const auto* x = static_cast<const uint16_t*>(args.x) + row * args.x_stride;
    static_cast<uint16_t*>(args.out)[row * args.padded + column] = from < 0 || from >= args.K ? uint16_t{0} : load_once(x + from);
}

template <DType kOut>
int with_bits(const Launch& how, const Params& p) {
    if (p.weight.codebook) return launch(how, decode_tile<4, true, kOut>, p);
    switch (p.weight.bits) {
        case 2: return launch(how, decode_tile<2, false, kOut>, p);
        case 3: return launch(how, decode_tile<3, false, kOut>, p);
        case 4: return launch(how, decode_tile<4, false, kOut>, p);
        default: return launch(how, decode_tile<8, false, kOut>, p);
    }
}

}  // namespace

int decode_weight(const DecodeArgs& args, void* stream) {
    const Weight& weight = args.weight;
    Params p{};
    p.weight = weight;
    p.table = args.table;
    p.first_panel = args.first_row / kPanelRows;
    p.rows = args.rows;
    p.tiles = static_cast<int>(tiles_of(weight.groups, weight.group_columns));
    p.padded = weight.groups * weight.group_columns;
    p.out = args.out;
    Launch how{};
    how.grid = dim3(static_cast<unsigned>((p.tiles + kWarps - 1) / kWarps),
                    static_cast<unsigned>((args.rows + kPanelRows - 1) / kPanelRows));
    how.threads = kWarps * kWarp;
    how.stream = static_cast<Stream>(stream);
    switch (args.dtype) {
        case DType::f32: return with_bits<DType::f32>(how, p);
        case DType::f16: return with_bits<DType::f16>(how, p);
        default: return with_bits<DType::bf16>(how, p);
    }
}

int gather_columns(const GatherArgs& args, void* stream) {
    Launch how{};
    how.grid = dim3(static_cast<unsigned>((args.padded + 255) / 256), static_cast<unsigned>(args.M));
    how.threads = 256;
    how.stream = static_cast<Stream>(stream);
    return launch(how, gather, args);
}

}  // namespace qk::cuda
