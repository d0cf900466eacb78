// Walking a packed panel: the same on every tier. Isa, defined by the including file, is the tier's vector:
//
//   kRows      rows of the weight in a vector (32-bit lanes)
//   kVectors   vectors of a micro tile: kRows * kVectors output columns
//   kDirectM   rows of x of a micro tile that unpacks the codes on the way to the product
//   kDirectRows  up to this many rows of x that is done; above, the codes are unpacked once a block
//   kTileM     rows of x of a micro tile over unpacked codes
//   kFloatM    rows of x of a micro tile of floats
//   kSignedWide  8-bit codes enter the product as signed bytes, 128 less
//   I, F       int32 and f32 lanes, and the functions that the code below names
#pragma once
#include "qkern/kernels.h"
#include "qkern/packed_weight.h"
#include "qkern/scalar_float.h"
#include "qkern/unroll.h"

namespace {

using I = Isa::I;
using F = Isa::F;

constexpr int kMaxVectors = static_cast<int>(qk::kPanelRows) / Isa::kRows;

// Code bytes of one quad of columns: run T of a superline, for kRows rows.
template <int BITS, int T>
QK_INLINE I codes_of(const I* lines) {
    if constexpr (BITS == 8) {
        return lines[0];
    } else if constexpr (BITS == 3) {
        const I low = Isa::bit_and(Isa::template shift_right<2 * (T / 2)>(lines[T % 2]), Isa::splat_byte(3));
        I high = lines[2];
        if constexpr (T < 2) {
            high = Isa::template shift_left<2 - T>(high);
        } else {
            high = Isa::template shift_right<T - 2>(high);
        }
        return Isa::or_and(low, high, Isa::splat_byte(4));
    } else {
        return Isa::bit_and(Isa::template shift_right<BITS * T>(lines[0]), Isa::splat_byte((1 << BITS) - 1));
    }
}

template <int BITS>
QK_INLINE void load_lines(const uint8_t* codes, int64_t line, I* lines) {
    QK_UNROLL for (int l = 0; l < (BITS == 3 ? 3 : 1); ++l) lines[l] = Isa::load(codes + l * line);
}

template <int BITS>
constexpr int64_t kLines = BITS == 3 ? 3 : 1;

// A core that does more with a byte than load it stops asking memory for the next ones when its queues are
// full, so the kernels ask: every product step for its share of what lies kAhead bytes further on, so that all
// the passes over a block together have asked once for as much as it holds, evenly.
constexpr int64_t kAhead = 8192;

struct Ahead {
    const uint8_t* at;  // in the stream, kAhead bytes before what is asked for
    int64_t step;  // bytes
};

// For MT rows of x from row m0 of M, over the quads of `rows` rows of a weight from row r of a panel.
inline Ahead ahead_of(const uint8_t* codes, int64_t r, int64_t rows, int bits, int64_t quads, int64_t m0, int MT,
                      int64_t M) {
    const int bytes = static_cast<int>(rows) * bits / 2;  // of a quad
    const int all = static_cast<int>(M);                  // a short division: this runs for every tile
    return {codes + quads * (r * bits / 2 + static_cast<int>(m0) * bytes / all), (MT * bytes + all - 1) / all};
}

// Step T after `at`. COUNT: the cache lines of a step, about.
template <int COUNT>
QK_INLINE void fetch(const Ahead& ahead, int T) {
#if !defined(_MSC_VER)
    QK_UNROLL for (int i = 0; i < COUNT; ++i) {
        __builtin_prefetch(ahead.at + kAhead + T * ahead.step + i * ahead.step / COUNT);
    }
#endif
}

// A cache line a call, once: of x, or for what unpacks a block once for many rows of x, whose product has no step
// to spare. Codes go to L2 (kAhead bytes ahead), since the block before them passes through L1 first.
QK_INLINE void fetch_x(const void* at) {
#if !defined(_MSC_VER)
    __builtin_prefetch(at);
#endif
}

template <int BITS>
QK_INLINE void fetch_lines(const uint8_t* codes, int64_t line) {
#if !defined(_MSC_VER)
    QK_UNROLL for (int l = 0; l < (BITS == 3 ? 3 : 1); ++l) __builtin_prefetch(codes + kAhead + l * line, 0, 2);
#endif
}

constexpr int fetches(int rows, int bits) { return rows * bits <= 128 ? 1 : rows * bits / 128 > 4 ? 4 : rows * bits / 128; }

// What the rows of one panel share in one group, as the kernels want it.
struct GroupHead {
    float scale[qk::kPanelRows];
    float offset[qk::kPanelRows];   // ZeroKind::offsets
    int32_t zero[qk::kPanelRows];   // else
};

inline void load_floats(const uint8_t* from, qk::DType dtype, int64_t R, float* to) {
    for (int64_t r = 0; r < R; r += Isa::kRows) {
        Isa::store_f(to + r, Isa::load_as_float(from + r * scale_bytes(dtype), dtype));
    }
}

// Reads the head of a group and returns the address of its codes.
inline const uint8_t* load_head(const qk::PackedView& view, const uint8_t* at, int64_t R, GroupHead* head) {
    load_floats(at, view.scale_dtype, R, head->scale);
    at += R * scale_bytes(view.scale_dtype);
    if (view.zero_kind == qk::ZeroKind::uint8) {
        for (int64_t r = 0; r < R; ++r) head->zero[r] = at[r];
        at += R;
    } else if (view.zero_kind == qk::ZeroKind::offsets) {
        load_floats(at, view.scale_dtype, R, head->offset);
        at += R * scale_bytes(view.scale_dtype);
    }
    return at;
}

inline void init_head(const qk::PackedView& view, GroupHead* head) {
    const int32_t zero = view.zero_kind == qk::ZeroKind::midpoint ? 1 << (view.bits - 1) : 0;
    for (int64_t r = 0; r < qk::kPanelRows; ++r) {
        head->zero[r] = zero;
        head->offset[r] = 0.0f;
    }
}

// Calls visit(block, columns, padded, first packed column, codes) for every block of a panel in turn;
// head() has been called for its group.
template <class Visit>
inline void for_each_block(const qk::PackedView& view, int64_t panel, int64_t R, GroupHead* head, Visit&& visit) {
    const uint8_t* at = view.panels + panel * qk::kPanelRows * view.row_bytes;
    int64_t block = 0, packed = 0;
    init_head(view, head);
    for (int64_t g = 0; g < view.groups; ++g) {
        at = load_head(view, at, R, head);
        const int64_t last = view.group_start[g + 1];
        for (int64_t k = view.group_start[g]; k < last; k += qk::kBlockColumns, ++block) {
            const int64_t columns = last - k < qk::kBlockColumns ? last - k : qk::kBlockColumns;
            const int64_t padded = padded_columns(columns, view.bits);
            visit(block, k, columns, padded, packed, at);
            packed += padded;
            at += R * padded * view.bits / 8;
        }
    }
}

// out[m, panel's columns] = tile + bias, in the dtype of out.
inline void store_tile(const qk::MatmulArgs& args, int64_t panel, int64_t first_m, int64_t M, int64_t R,
                       const float (*tile)[qk::kPanelRows]) {
    const int64_t column = panel * qk::kPanelRows;
    const int64_t N = args.view->N - column < R ? args.view->N - column : R;
    const int64_t size = dtype_size(args.out_dtype);
    const uint8_t* bias = static_cast<const uint8_t*>(args.bias) + (args.bias ? column * dtype_size(args.bias_dtype) : 0);
    for (int64_t m = 0; m < M; ++m) {
        const int64_t at = (first_m + m) * args.out_stride + column;
        int64_t r = 0;
        for (; r + Isa::kRows <= N; r += Isa::kRows) {
            F sum = Isa::load_f(tile[m] + r);
            if (args.bias) sum = Isa::add(sum, Isa::load_as_float(bias + r * dtype_size(args.bias_dtype), args.bias_dtype));
            Isa::store_as(static_cast<char*>(args.out) + (at + r) * size, args.out_dtype, sum);
        }
        for (; r < N; ++r) {
            const float sum = args.bias ? tile[m][r] + load_float(bias, args.bias_dtype, r) : tile[m][r];
            store_float(args.out, args.out_dtype, at + r, sum);
        }
    }
}

}  // namespace
