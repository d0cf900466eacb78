// compute int8: sum over blocks of  s_w * s_x * (sum of q * a  -  z * sum of a)  with exact int32 sums.
//
// Bound of a block's sum: 128 columns * 255 * 127 < 2^23, so neither int32 nor its conversion to f32 rounds.
// A codebook is two byte planes, round(32767 * table) = 256 * high + low - 32768, which keeps the table's error
// below 2^-16 of its largest entry; 256 times the sum of the high plane is where that of the low one starts,
// below 128 * 32768 * 127 < 2^30.
#pragma once
#include "stream.h"
#if defined(QK_WORDS)
#include "words.h"
#endif

namespace {

// One block of one panel, and the rows of x that it multiplies.
struct BlockInt8 {
    const uint8_t* codes;
    int64_t line;          // bytes of a line: R * 4
    int64_t padded;        // columns
    const int8_t* x;       // [M, x_stride]
    int64_t x_stride;
    const float* x_scale;  // element of row m at m * blocks
    const int32_t* x_sum;
    int64_t blocks;
    const float* scale;    // [R]
    const int32_t* zero;   // [R], or null: `midpoint` for every row
    int32_t midpoint;
    const float* offset;   // [R], or null
    const Planes* planes;  // of a codebook
    float factor;          // of a codebook's sums, else 1
    const uint8_t* packed; // codes as they came from memory
    int64_t M;             // rows of x
    int bits;
    float (*tile)[qk::kPanelRows];  // [M]
};

template <Codes KIND, int T>
QK_INLINE I product_codes(const I* lines, I table) {
    I codes = codes_of<stored_bits(KIND), T>(lines);
    if constexpr (KIND == Codes::codebook) codes = Isa::lookup_bytes(table, codes);
    if constexpr (Isa::kSignedWide && is_wide(KIND) && !is_expanded(KIND)) {
        codes = Isa::bit_xor(codes, Isa::splat_byte(0x80));
    }
    return codes;
}

// Where MT rows of x and NV vectors of output columns stand in a block.
struct Cursor {
    const uint8_t* codes;
    const int8_t* x;
    int64_t x_stride;
    int64_t run;  // columns
    Ahead ahead;
};

// Cache lines of packed codes that one run of a tile asks for; codes are expanded for many rows of x only.
template <Codes KIND, int MT, int NV>
constexpr int kFetches = is_expanded(KIND) || MT > 4 ? 2 : fetches(Isa::kRows * NV, stored_bits(KIND));

// Run T of a superline and the following ones.
template <Codes KIND, int MT, int NV, int T, class Product>
QK_INLINE void add_runs(const Cursor& at, const I (*lines)[3], I table, Product product, I* sums) {
    I codes[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) codes[v] = product_codes<KIND, T>(lines[v], table);
    fetch<kFetches<KIND, MT, NV>>(at.ahead, T);
    QK_UNROLL for (int m = 0; m < MT; ++m) {
        const I quad = Isa::load_quad(at.x + m * at.x_stride + T * at.run);
        QK_UNROLL for (int v = 0; v < NV; ++v) sums[m * NV + v] = product(sums[m * NV + v], codes[v], quad);
    }
    if constexpr (T + 1 < runs(KIND)) add_runs<KIND, MT, NV, T + 1>(at, lines, table, product, sums);
}

// `count` superlines; a block is never empty.
template <Codes KIND, int MT, int NV, class Product>
QK_INLINE void add_superlines(Cursor& at, int64_t count, int64_t line, I table, Product product, I* sums) {
    do {
        I lines[NV][3];
        QK_UNROLL for (int v = 0; v < NV; ++v) {
            load_lines<stored_bits(KIND)>(at.codes + v * 4 * Isa::kRows, line, lines[v]);
        }
        add_runs<KIND, MT, NV, 0>(at, lines, table, product, sums);
        at.codes += kLines<stored_bits(KIND)> * line;
        at.x += 4;
        at.ahead.at += runs(KIND) * at.ahead.step;
    } while (--count > 0);
}

// The products of one plane. Vector: Isa, as a parameter because not every tier has pairs.
template <Codes KIND, int MT, int NV, int PLANE, class Vector = Isa>
QK_INLINE void add_plane(const BlockInt8& b, const Ahead& ahead, I* sums) {
    const I table = KIND == Codes::codebook ? Isa::load_table(b.planes->bytes[PLANE]) : Isa::splat(0);
    const int64_t count = b.padded / (4 * runs(KIND));
    Cursor at{b.codes, b.x, b.x_stride, 4 * count, ahead};
    if (KIND == Codes::planes) at.codes += PLANE * (b.padded / 4) * b.line;
    if constexpr (Vector::kPairQuads > 0 && !is_wide(KIND)) {
        constexpr int64_t kChain = Vector::kPairQuads / runs(KIND);
        for (int64_t left = count; left > 0; left -= kChain) {
            I pairs[MT * NV];
            QK_UNROLL for (int i = 0; i < MT * NV; ++i) pairs[i] = Isa::splat(0);
            add_superlines<KIND, MT, NV>(at, left < kChain ? left : kChain, b.line, table,
                                         [](I sum, I codes, I quad) { return Vector::dot_pairs(sum, codes, quad); }, pairs);
            QK_UNROLL for (int i = 0; i < MT * NV; ++i) sums[i] = Vector::add_pairs(sums[i], pairs[i]);
        }
    } else {
        add_superlines<KIND, MT, NV>(at, count, b.line, table, [](I sum, I codes, I quad) {
            return Isa::template dot4<is_wide(KIND)>(sum, codes, quad);
        }, sums);
    }
}

// MT rows of x from row m0 by NV vectors of output columns from column r of the panel, over one block.
template <Codes KIND, int MT, int NV>
QK_INLINE void micro_int8(BlockInt8 b, int64_t r, int64_t m0) {
    b.codes += 4 * r;
    b.x += m0 * b.x_stride;
    b.x_sum += m0 * b.blocks;
    b.x_scale += m0 * b.blocks;
    float* const tile = b.tile[m0] + r;
    const Ahead ahead = ahead_of(b.packed, r, Isa::kRows * NV, b.bits, b.padded / 4, m0, MT, b.M);
    // Codes that enter 128 less.
    constexpr int32_t kBias = Isa::kSignedWide && is_wide(KIND) ? 128 : 0;
    if constexpr (MT > 4) {  // the next rows of x
        QK_UNROLL for (int m = MT; m < 2 * MT; ++m) {
            QK_UNROLL for (int64_t at = 0; at < qk::kBlockColumns; at += 64) fetch_x(b.x + m * b.x_stride + at);
        }
    }
    I sums[MT * NV];
    if (b.zero) {
        QK_UNROLL for (int v = 0; v < NV; ++v) {
            const I zero = Isa::sub(Isa::load_i(b.zero + r + v * Isa::kRows), Isa::splat(kBias));
            QK_UNROLL for (int m = 0; m < MT; ++m) {
                sums[m * NV + v] = Isa::mul(zero, Isa::splat(-b.x_sum[m * b.blocks]));
            }
        }
    } else {
        QK_UNROLL for (int m = 0; m < MT; ++m) {
            const I start = Isa::splat(-b.x_sum[m * b.blocks] * (b.midpoint - kBias));
            QK_UNROLL for (int v = 0; v < NV; ++v) sums[m * NV + v] = start;
        }
    }
    add_plane<KIND, MT, NV, 0>(b, ahead, sums);
    if constexpr (planes(KIND) == 2) {
        QK_UNROLL for (int m = 0; m < MT; ++m) {
            const I bias = Isa::splat(-kBias * b.x_sum[m * b.blocks]);
            QK_UNROLL for (int v = 0; v < NV; ++v) {
                sums[m * NV + v] = Isa::sub(Isa::mul(sums[m * NV + v], Isa::splat(256)), bias);
            }
        }
        add_plane<KIND, MT, NV, 1>(b, ahead, sums);
    }
    F scale[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) scale[v] = Isa::load_f(b.scale + r + v * Isa::kRows);
    QK_UNROLL for (int m = 0; m < MT; ++m) {
        const F x_scale = Isa::splat_f(b.x_scale[m * b.blocks] * b.factor);
        QK_UNROLL for (int v = 0; v < NV; ++v) {
            float* out = tile + m * qk::kPanelRows + v * Isa::kRows;
            Isa::store_f(out, Isa::fma(Isa::to_float(sums[m * NV + v]), Isa::mul_f(scale[v], x_scale), Isa::load_f(out)));
        }
    }
    if (b.offset) {
        QK_UNROLL for (int m = 0; m < MT; ++m) {
            const F x_sum = Isa::splat_f(b.x_scale[m * b.blocks] * static_cast<float>(b.x_sum[m * b.blocks]));
            QK_UNROLL for (int v = 0; v < NV; ++v) {
                float* out = tile + m * qk::kPanelRows + v * Isa::kRows;
                Isa::store_f(out, Isa::fma(Isa::load_f(b.offset + r + v * Isa::kRows), x_sum, Isa::load_f(out)));
            }
        }
    }
}

// Rows [m, M): as many as fit in tiles of MT rows, the rest in smaller ones.
template <Codes KIND, int MT, int NV>
inline void rows_int8(const BlockInt8& b, int64_t r, int64_t m, int64_t M) {
    for (; m + MT <= M; m += MT) micro_int8<KIND, MT, NV>(b, r, m);
    if constexpr (MT > 1) {
        constexpr int kNext = NV == 1 ? 1 : MT > 4 ? 4 : MT / 2;
        if (m < M) rows_int8<KIND, kNext, NV>(b, r, m, M);
    }
}

template <Codes KIND, int MT>
inline void block_int8(const BlockInt8& b, int64_t R, int64_t M) {
    int64_t r = 0;
    for (; r + Isa::kRows * Isa::kVectors <= R; r += Isa::kRows * Isa::kVectors) {
        rows_int8<KIND, MT, Isa::kVectors>(b, r, 0, M);
    }
    for (; r < R; r += Isa::kRows) rows_int8<KIND, MT, 1>(b, r, 0, M);
}

template <Codes KIND, int T>
QK_INLINE void expand_runs(const I* lines, int64_t run, I table, uint8_t* out) {
    Isa::store(out, product_codes<KIND, T>(lines, table));
    if constexpr (T + 1 < runs(KIND)) expand_runs<KIND, T + 1>(lines, run, table, out + run);
}

// A block's codes as one byte each, quad after quad: [planes][padded / 4][R][4].
template <Codes KIND>
inline void expand(const BlockInt8& b, int64_t R, uint8_t* out) {
    const int64_t count = b.padded / (4 * runs(KIND));
    for (int plane = 0; plane < planes(KIND); ++plane) {
        const I table = KIND == Codes::codebook ? Isa::load_table(b.planes->bytes[plane]) : Isa::splat(0);
        const uint8_t* codes = b.codes;
        for (int64_t j = 0; j < count; ++j, codes += kLines<stored_bits(KIND)> * b.line) {
            for (int64_t r = 0; r < R; r += Isa::kRows) {
                I lines[3];
                load_lines<stored_bits(KIND)>(codes + 4 * r, b.line, lines);
                expand_runs<KIND, 0>(lines, count * b.line, table, out + j * b.line + 4 * r);
            }
        }
        out += b.padded / 4 * b.line;
    }
}

template <Codes KIND>
inline void product_int8(BlockInt8& b, int64_t R, int64_t M, uint8_t* scratch) {
    b.packed = b.codes;
    b.bits = stored_bits(KIND);
    if (KIND == Codes::bits8 && !Isa::kSignedWide) {
        block_int8<KIND, Isa::kTileM>(b, R, M);
    } else if (M <= Isa::kDirectRows) {
        block_int8<KIND, Isa::kDirectM>(b, R, M);
    } else {
        expand<KIND>(b, R, scratch);
        b.codes = scratch;
        block_int8<expanded(KIND), Isa::kTileM>(b, R, M);
    }
}

void run_int8(const qk::MatmulArgs& args, int64_t panel, int64_t first_m, int64_t M) {
    const qk::PackedView& view = *args.view;
    const int64_t R = panel_rows(view, panel);
    const bool codebook = view.zero_kind == qk::ZeroKind::codebook;
    alignas(64) float tile[qk::kMatmulRows][qk::kPanelRows];
    alignas(64) uint8_t scratch[2 * qk::kPanelRows * qk::kBlockColumns];
    memset(tile, 0, static_cast<size_t>(M) * sizeof tile[0]);
    GroupHead head;
    Planes planes{};
    if (codebook) planes = planes_of(view.table);
    if constexpr (kStreams) {
        // Both planes of four rows do not fit in registers.
        const int64_t most = codebook ? kStreamRows / 2 : kStreamRows;
        if (M <= most && R == qk::kPanelRows && view.zero_kind != qk::ZeroKind::offsets) {
            const auto stream = codebook         ? &stream_rows<Codes::codebook>
                                : view.bits == 2 ? &stream_rows<Codes::bits2>
                                : view.bits == 3 ? &stream_rows<Codes::bits3>
                                : view.bits == 4 ? &stream_rows<Codes::bits4>
                                                 : &stream_rows<Codes::bits8>;
            stream(args, planes, panel, first_m, M, tile);
            return store_tile(args, panel, first_m, M, R, tile);
        }
    }
    BlockInt8 b{};
    b.line = 4 * R;
    b.x_stride = view.padded_K;
    b.blocks = view.blocks;
    b.scale = head.scale;
    b.zero = view.zero_kind == qk::ZeroKind::uint8 ? head.zero : nullptr;
    b.midpoint = codebook ? 128 : view.zero_kind == qk::ZeroKind::midpoint ? 1 << (view.bits - 1) : 0;
    b.offset = view.zero_kind == qk::ZeroKind::offsets ? head.offset : nullptr;
    b.planes = &planes;
    b.factor = codebook ? 1.0f / 32767.0f : 1.0f;
    b.M = M;
    b.tile = tile;
    for_each_block(view, panel, R, &head,
                   [&](int64_t block, int64_t, int64_t, int64_t padded, int64_t packed, const uint8_t* codes) {
        b.codes = codes;
        b.padded = padded;
        b.x = args.codes + first_m * view.padded_K + packed;
        b.x_scale = args.scales + first_m * view.blocks + block;
        b.x_sum = args.sums + first_m * view.blocks + block;
#if defined(QK_WORDS)
        if (codebook) return product_words(b, R, M, scratch);
#else
        if (codebook) return product_int8<Codes::codebook>(b, R, M, scratch);
#endif
        switch (view.bits) {
            case 2: return product_int8<Codes::bits2>(b, R, M, scratch);
            case 3: return product_int8<Codes::bits3>(b, R, M, scratch);
            case 4: return product_int8<Codes::bits4>(b, R, M, scratch);
            default: return product_int8<Codes::bits8>(b, R, M, scratch);
        }
    });
    store_tile(args, panel, first_m, M, R, tile);
}

}  // namespace
