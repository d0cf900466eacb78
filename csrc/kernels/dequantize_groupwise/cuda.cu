// Form 2 to weights: a thread decodes eight adjacent codes of a row, whatever the bits.
#include "qkern/cuda/chunk.h"
#include "qkern/cuda/kernels.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

using namespace qk::gpu;

constexpr int kThreads = 256;

// kWhole: the eight columns are of one group, and their place in `out` is aligned for 16-byte stores.
template <int kBits, DType kOut, bool kWhole>
QK_KERNEL void QK_BOUNDS(kThreads) dequantize(const DequantizeArgs args) {
    const int64_t row = blockIdx.x;
    const int64_t first = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kChunk;
    if (first >= args.K) return;
    const uint64_t codes = load_codes<kBits>(args.codes + row * args.code_words, args.code_words, first / kChunk);
    const int64_t scale_row = row / args.rows_per_scale * args.groups;
    const auto group_of = [&](int64_t column) -> int64_t {
        return args.group_index ? load_once(args.group_index + column) : column / args.group_size;
    };
    float values[kChunk];
    float scale = 0.0f, offset = 0.0f;
    int zero = 1 << (kBits - 1);
    QK_UNROLL for (int i = 0; i < kChunk; ++i) {
        const int64_t column = first + i < args.K ? first + i : args.K - 1;
        if (i == 0 || !kWhole) {
            const int64_t at = scale_row + group_of(column);
            scale = load_float(args.scale_dtype, args.scales, at);
            if (args.zeros) zero = load_once(args.zeros + at);
            if (args.offsets) offset = load_float(args.scale_dtype, args.offsets, at);
        }
        const int code = static_cast<int>(codes >> (kBits * i)) & ((1 << kBits) - 1);
        if (args.table) {
            values[i] = mul(load_once(args.table + code), scale);
        } else if (args.offsets) {
            values[i] = add(mul(static_cast<float>(code), scale), offset);
        } else {
            values[i] = mul(static_cast<float>(code - zero), scale);
        }
    }
    const int64_t to = row * args.out_stride + first;
    if constexpr (kWhole) {
        store_chunk<kOut>(args.out, to, values);
    } else {
        QK_UNROLL for (int i = 0; i < kChunk; ++i) {
            if (first + i < args.K) store_float<kOut>(args.out, to + i, values[i]);
        }
    }
}

template <int kBits, DType kOut>
int run(const Launch& how, const DequantizeArgs& args) {
    const int64_t bytes = kOut == DType::f32 ? 4 : 2;
    const bool aligned = reinterpret_cast<uintptr_t>(args.out) % 16 == 0 && args.out_stride * bytes % 16 == 0;
    const bool whole = aligned && args.K % kChunk == 0 && !args.group_index &&
                       (args.group_size % kChunk == 0 || args.groups == 1);
    return whole ? launch(how, dequantize<kBits, kOut, true>, args) : launch(how, dequantize<kBits, kOut, false>, args);
}

template <DType kOut>
int with_bits(const Launch& how, const DequantizeArgs& args) {
    switch (args.bits) {
        case 2: return run<2, kOut>(how, args);
        case 3: return run<3, kOut>(how, args);
        case 4: return run<4, kOut>(how, args);
        default: return run<8, kOut>(how, args);
    }
}

}  // namespace

int dequantize_groupwise(const DequantizeArgs& args, void* stream) {
    if (args.rows == 0 || args.K == 0) return 0;
    Launch how{};
    how.grid = dim3(static_cast<unsigned>(args.rows),
                    static_cast<unsigned>((args.K + kChunk * kThreads - 1) / (kChunk * kThreads)));
    how.threads = kThreads;
    how.stream = static_cast<Stream>(stream);
    switch (args.out_dtype) {
        case DType::f32: return with_bits<DType::f32>(how, args);
        case DType::f16: return with_bits<DType::f16>(how, args);
        default: return with_bits<DType::bf16>(how, args);
    }
}

}  // namespace qk::cuda
