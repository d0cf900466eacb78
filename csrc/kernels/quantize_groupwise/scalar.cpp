// quantize_groupwise, scalar tier: the min-max grid, written like its formula.
//
//   symmetric    z = 2^(b-1)   s = max|w| / (2^(b-1) - 1/2)
//   asymmetric   range includes 0   s = (max - min) / (2^b - 1)   z = clamp(rint(-min/s), 0, 2^b - 1)
//   s is rounded to its stored dtype first; then q = clamp(rint(w / s) + z, 0, 2^b - 1), ties to even.
//
// In: f32, f16 or bf16 rows. Out: dense little-endian codes, scales, zeros. Arithmetic is f32 without
// contraction, division and not multiplication by a reciprocal, so every tier gives the same bits.
#include <math.h>
#include <string.h>

#include "qkern/kernels.h"
#include "qkern/scalar_float.h"

namespace {

using namespace qk;

struct Grid {
    float scale;
    int zero;
};

Grid choose_grid(const QuantizeArgs& args, const char* row, int64_t begin, int64_t end) {
    float low = 0.0f, high = 0.0f;
    for (int64_t k = begin; k < end; ++k) {
        const float w = load_float(row, args.dtype, k);
        low = w < low ? w : low;
        high = w > high ? w : high;
    }
    const int levels = 1 << args.bits;
    if (!args.asymmetric) {
        const float absmax = high > -low ? high : -low;
        const float scale = round_to(absmax / (static_cast<float>(levels / 2) - 0.5f), args.scale_dtype);
        return {scale == 0.0f ? 1.0f : scale, levels / 2};
    }
    float scale = round_to((high - low) / static_cast<float>(levels - 1), args.scale_dtype);
    if (scale == 0.0f) scale = 1.0f;
    float zero = nearbyintf(-low / scale);
    const float top = static_cast<float>(levels - 1);
    zero = zero < 0.0f ? 0.0f : zero > top ? top : zero;
    return {scale, static_cast<int>(zero)};
}

Status quantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
    const int64_t groups = (args.K + args.group_size - 1) / args.group_size;
    const float top = static_cast<float>((1 << args.bits) - 1);
    for (int64_t n = begin; n < end; ++n) {
        const char* row = static_cast<const char*>(args.weight) + n * args.row_stride * dtype_size(args.dtype);
        uint32_t* codes = args.codes + n * args.code_words;
        memset(codes, 0, static_cast<size_t>(args.code_words) * 4);
        for (int64_t k = 0; k < args.K; ++k) {
            if (!isfinite(load_float(row, args.dtype, k))) return Status::non_finite;
        }
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = g * args.group_size;
            const int64_t last = first + args.group_size < args.K ? first + args.group_size : args.K;
            const Grid grid = choose_grid(args, row, first, last);
            store_float(args.scales, args.scale_dtype, n * groups + g, grid.scale);
            if (args.zeros) args.zeros[n * groups + g] = static_cast<uint8_t>(grid.zero);
            for (int64_t k = first; k < last; ++k) {
                float q = nearbyintf(load_float(row, args.dtype, k) / grid.scale) + static_cast<float>(grid.zero);
                q = q < 0.0f ? 0.0f : q > top ? top : q;
                const uint64_t bit = static_cast<uint64_t>(k) * static_cast<uint64_t>(args.bits);
                const uint32_t code = static_cast<uint32_t>(q);
                codes[bit / 32] |= code << (bit % 32);
                // A 3-bit code may straddle two words.
                if (bit % 32 + static_cast<uint64_t>(args.bits) > 32) codes[bit / 32 + 1] |= code >> (32 - bit % 32);
            }
        }
    }
    return Status::ok;
}

}  // namespace

extern "C" void qk_enter_quantize_groupwise_scalar(qk::KernelTable* table) { table->quantize_groupwise = &quantize; }
