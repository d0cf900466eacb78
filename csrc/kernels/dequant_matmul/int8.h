// compute int8: sum over blocks of  s_w * s_x * (sum of q * a  -  z * sum of a)  with exact int32 sums.
//
// Bound of a block's sum: 128 columns * 255 * 127 < 2^23, so neither int32 nor its conversion to f32 rounds.
// A codebook is two byte planes, round(32767 * table) = 256 * high + low - 32768: two passes over a block
// that lies in L1, which keeps the table's error below 2^-16 of its largest entry.
#pragma once
#include "panels.h"

namespace {

// How the code bytes of a micro tile are stored and what they hold.
enum class Codes { bits2, bits3, bits4, bits8, high_plane, low_plane, narrow, wide };

constexpr int stored_bits(Codes kind) {
    return kind == Codes::bits2 ? 2 : kind == Codes::bits3 ? 3 : kind == Codes::bits8 || kind == Codes::narrow ||
           kind == Codes::wide ? 8 : 4;
}

constexpr bool is_plane(Codes kind) { return kind == Codes::high_plane || kind == Codes::low_plane; }

// 8 significant bits a code: the product needs the wide form.
constexpr bool is_wide(Codes kind) { return kind == Codes::bits8 || kind == Codes::wide || is_plane(kind); }

struct Plane {
    alignas(16) uint8_t bytes[16];
    int32_t zero[qk::kPanelRows];
};

inline Plane plane_of(const float* table, bool high) {
    Plane plane;
    for (int i = 0; i < 16; ++i) {
        const float scaled = table[i] * 32767.0f;
        const int32_t value = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f)) + 32768;
        plane.bytes[i] = static_cast<uint8_t>(high ? value >> 8 : value);
    }
    for (int32_t& zero : plane.zero) zero = high ? 128 : 0;
    return plane;
}

template <Codes KIND, int T>
QK_INLINE I product_codes(const I* lines, I table) {
    I codes = codes_of<stored_bits(KIND), T>(lines);
    if constexpr (is_plane(KIND)) codes = Isa::lookup_bytes(table, codes);
    if constexpr (Isa::kSignedWide && (KIND == Codes::bits8 || is_plane(KIND))) {
        codes = Isa::bit_xor(codes, Isa::splat_byte(0x80));
    }
    return codes;
}

struct BlockInt8 {
    const uint8_t* codes;
    int64_t line;    // bytes of a line: R * 4
    int64_t padded;  // columns
    const int8_t* x;  // [MT, x_stride]
    int64_t x_stride;
    const float* x_scale;  // element of row m at m * blocks
    const int32_t* x_sum;
    int64_t blocks;
    const GroupHead* head;
    bool has_offset;
    const int32_t* zero;  // [R]
    const Plane* plane;   // of a codebook, else null
    float factor;         // of the plane, else 1
    float (*tile)[qk::kPanelRows];  // [MT]
};

template <Codes KIND, int MT, int NV, int T>
QK_INLINE void product_step(const BlockInt8& b, int64_t j, int64_t quads, const I (*lines)[3], I table, I* sums) {
    I codes[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) codes[v] = product_codes<KIND, T>(lines[v], table);
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
        const I quad = Isa::load_quad(b.x + i / NV * b.x_stride + 4 * (T * quads + j));
        sums[i] = Isa::template dot4<is_wide(KIND)>(sums[i], codes[i % NV], quad);
    }
    if constexpr (T + 1 < (stored_bits(KIND) == 3 ? 8 : 8 / stored_bits(KIND))) {
        product_step<KIND, MT, NV, T + 1>(b, j, quads, lines, table, sums);
    }
}

// MT rows of x by NV vectors of output columns from column `r` of the panel, over one block.
template <Codes KIND, int MT, int NV>
QK_INLINE void micro_int8(const BlockInt8& b, int64_t r, int64_t m0) {
    constexpr int kBits = stored_bits(KIND);
    BlockInt8 at = b;
    at.x += m0 * b.x_stride;
    const int32_t bias = Isa::kSignedWide && is_wide(KIND) ? 128 : 0;
    I sums[MT * NV];
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
        const I zero = Isa::load_i(b.zero + r + i % NV * Isa::kRows);
        sums[i] = Isa::mul(bias ? Isa::sub(zero, Isa::splat(bias)) : zero, Isa::splat(-b.x_sum[(m0 + i / NV) * b.blocks]));
    }
    const I table = is_plane(KIND) ? Isa::load_table(b.plane->bytes) : Isa::splat(0);
    const int64_t quads = b.padded / (4 * superline_steps(kBits));
    const uint8_t* codes = b.codes + 4 * r;
    int64_t j = 0;
    do {  // a block is never empty
        I lines[NV][3];
        QK_UNROLL for (int v = 0; v < NV; ++v) load_lines<kBits>(codes + v * 4 * Isa::kRows, b.line, lines[v]);
        product_step<KIND, MT, NV, 0>(at, j, quads, lines, table, sums);
        codes += kLines<kBits> * b.line;
    } while (++j < quads);
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
        const int64_t m = m0 + i / NV, at_r = r + i % NV * Isa::kRows;
        const float x_scale = b.x_scale[m * b.blocks];
        float* out = b.tile[m] + at_r;
        const F scale = Isa::mul_f(Isa::load_f(b.head->scale + at_r), Isa::splat_f(x_scale * b.factor));
        F total = Isa::fma(Isa::to_float(sums[i]), scale, Isa::load_f(out));
        if (b.has_offset) {
            const F x_sum = Isa::splat_f(x_scale * static_cast<float>(b.x_sum[m * b.blocks]));
            total = Isa::fma(Isa::load_f(b.head->offset + at_r), x_sum, total);
        }
        Isa::store_f(out, total);
    }
}

template <Codes KIND, int MT>
inline void micro_rows_int8(const BlockInt8& b, int64_t R, int64_t m0) {
    int64_t r = 0;
    for (; r + Isa::kRows * Isa::kVectors <= R; r += Isa::kRows * Isa::kVectors) {
        micro_int8<KIND, MT, Isa::kVectors>(b, r, m0);
    }
    for (; r < R; r += Isa::kRows) micro_int8<KIND, MT, 1>(b, r, m0);
}

template <Codes KIND, int MT>
inline void block_int8(const BlockInt8& b, int64_t R, int64_t M) {
    int64_t m = 0;
    for (; m + MT <= M; m += MT) micro_rows_int8<KIND, MT>(b, R, m);
    if constexpr (MT > 2) {
        for (; m + 2 <= M; m += 2) micro_rows_int8<KIND, 2>(b, R, m);
    }
    for (; m < M; ++m) micro_rows_int8<KIND, 1>(b, R, m);
}

// A block's codes as one byte each, quad after quad: [padded / 4][R][4].
template <Codes KIND, int T>
QK_INLINE void expand_step(const I* lines, I table, int64_t quads, int64_t line, uint8_t* out) {
    Isa::store(out + T * quads * line, product_codes<KIND, T>(lines, table));
    if constexpr (T + 1 < (stored_bits(KIND) == 3 ? 8 : 8 / stored_bits(KIND))) {
        expand_step<KIND, T + 1>(lines, table, quads, line, out);
    }
}

template <Codes KIND>
inline void expand(const BlockInt8& b, int64_t R, uint8_t* out) {
    constexpr int kBits = stored_bits(KIND);
    const I table = is_plane(KIND) ? Isa::load_table(b.plane->bytes) : Isa::splat(0);
    const int64_t quads = b.padded / (4 * superline_steps(kBits));
    for (int64_t j = 0; j < quads; ++j) {
        for (int64_t r = 0; r < R; r += Isa::kRows) {
            I lines[3];
            load_lines<kBits>(b.codes + j * kLines<kBits> * b.line + 4 * r, b.line, lines);
            expand_step<KIND, 0>(lines, table, quads, b.line, out + j * b.line + 4 * r);
        }
    }
}

template <Codes KIND>
inline void product_int8(BlockInt8 b, int64_t R, int64_t M, uint8_t* scratch) {
    // 3-bit codes are put together from two lines, which pays to do once sooner.
    constexpr int64_t kDirectRows = KIND == Codes::bits3 ? Isa::kDirectRows / 3 : Isa::kDirectRows;
    if (KIND == Codes::bits8 && M > kDirectRows) {
        block_int8<Codes::bits8, Isa::kTileM>(b, R, M);
    } else if (M <= kDirectRows) {
        block_int8<KIND, Isa::kDirectM>(b, R, M);
    } else {
        expand<KIND>(b, R, scratch);
        b.codes = scratch;
        block_int8<is_wide(KIND) ? Codes::wide : Codes::narrow, Isa::kTileM>(b, R, M);
    }
}

void run_int8(const qk::MatmulArgs& args, int64_t panel, int64_t first_m, int64_t M) {
    const qk::PackedView& view = *args.view;
    const int64_t R = panel_rows(view, panel);
    alignas(64) float tile[qk::kMatmulRows][qk::kPanelRows];
    alignas(64) uint8_t scratch[qk::kPanelRows * qk::kBlockColumns];
    memset(tile, 0, static_cast<size_t>(M) * sizeof tile[0]);
    GroupHead head;
    Plane high, low;
    if (view.zero_kind == qk::ZeroKind::codebook) {
        high = plane_of(view.table, true);
        low = plane_of(view.table, false);
    }
    for_each_block(view, panel, R, &head,
                   [&](int64_t block, int64_t, int64_t, int64_t padded, int64_t packed, const uint8_t* codes) {
        BlockInt8 b;
        b.codes = codes;
        b.line = 4 * R;
        b.padded = padded;
        b.x = args.codes + first_m * view.padded_K + packed;
        b.x_stride = view.padded_K;
        b.x_scale = args.scales + first_m * view.blocks + block;
        b.x_sum = args.sums + first_m * view.blocks + block;
        b.blocks = view.blocks;
        b.head = &head;
        b.has_offset = view.zero_kind == qk::ZeroKind::offsets;
        b.zero = head.zero;
        b.plane = nullptr;
        b.factor = 1.0f;
        b.tile = tile;
        if (view.zero_kind == qk::ZeroKind::codebook) {
            b.plane = &high;
            b.zero = high.zero;
            b.factor = 256.0f / 32767.0f;
            product_int8<Codes::high_plane>(b, R, M, scratch);
            b.plane = &low;
            b.zero = low.zero;
            b.factor = 1.0f / 32767.0f;
            product_int8<Codes::low_plane>(b, R, M, scratch);
            return;
        }
        switch (view.bits) {
            case 2: product_int8<Codes::bits2>(b, R, M, scratch); break;
            case 3: product_int8<Codes::bits3>(b, R, M, scratch); break;
            case 4: product_int8<Codes::bits4>(b, R, M, scratch); break;
            default: product_int8<Codes::bits8>(b, R, M, scratch); break;
        }
    });
    store_tile(args, panel, first_m, M, R, tile);
}

}  // namespace
