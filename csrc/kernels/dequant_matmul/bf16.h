// compute float of bf16 activations on AVX512-BF16: vdpbf16ps adds x0 * w0 + x1 * w1 to each of 16 f32 sums.
//
// The integers q - midpoint have at most 8 significant bits and are exact in bf16, so a product is exact and
// only the sums round. vpermw looks 32 of them up at once and reads five bits of each 16-bit word, so a table
// that repeats the values of 2, 3 or 4 bits needs no mask: the word as it is gives columns 0 and 2 of a quad,
// shifted by eight 1 and 3. prepare_pairs stores x in that order. Zero points and offsets enter once a block,
// times the sum of x. A byte code is two nibbles, 16 * high + low.
#pragma once
#include "panels.h"

namespace {

// Up to this many rows of x the codes are looked up on the way to the product; above, once a block into L1.
constexpr int64_t kDirectPairs = 16;
constexpr int64_t kDirectPairs8 = 5;  // two products of each byte
constexpr int64_t kBatch = 8;  // blocks
constexpr int kBatchRows = 3;
constexpr int kLinePairs = 16;  // of x in a cache line

// Pairs per quad of columns: (0, 2) and (1, 3).
constexpr int kHalves = 2;

struct BlockPairs {
    const uint8_t* codes;   // as packed, or expanded: pairs of bf16
    int64_t line;           // bytes: R * 4
    int64_t padded;         // columns
    const uint32_t* x;      // [M, padded / 2] pairs
    int64_t x_stride;       // padded / 2
    const float* x_sum;     // element of row m at m * blocks
    int64_t blocks;
    const GroupHead* head;
    qk::ZeroKind zero_kind;
    const uint16_t* low;    // [32] bf16 value of a code, or of its low nibble
    const uint16_t* high;   // [32] bf16 value of the high nibble of 8 bits
    int32_t midpoint;       // what the values of integers are short of
    float factor;           // makes up for values that are too large
    int64_t M;              // rows of x
    float (*tile)[qk::kPanelRows];
};

// Rounding to bf16 hurts a codebook least when it is first multiplied by the right number in [1, 2): fp4's
// thirds become exact, nf4 loses half as much. Returns the number that was chosen.
inline float round_codebook(const float* table, uint16_t* values) {
    const F exact = Isa::load_f(table);
    float best = 1.0f, least = 0.0f;
    for (int step = 0; step < 64; ++step) {
        const float factor = 1.0f + static_cast<float>(step) / 64.0f;
        const F scaled = Isa::mul_f(exact, Isa::splat_f(factor));
        const __m512i rounded = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(scaled));
        const F error = Isa::sub_f(scaled, _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16)));
        const float squares = _mm512_reduce_add_ps(Isa::mul_f(error, error)) / (factor * factor);
        if (step == 0 || squares < least) {
            least = squares;
            best = factor;
        }
    }
    for (int q = 0; q < 16; ++q) values[q] = values[q + 16] = to_bf16(table[q] * best);
    return best;
}

// Fills the tables of a weight's codes and what belongs to them.
inline void code_values(const qk::PackedView& view, uint16_t* low, uint16_t* high, BlockPairs* b) {
    b->zero_kind = view.zero_kind;
    b->low = low;
    b->high = high;
    b->midpoint = view.zero_kind == qk::ZeroKind::offsets ? 0 : 1 << (view.bits - 1);
    b->factor = 1.0f;
    if (view.zero_kind == qk::ZeroKind::codebook) {
        b->factor = 1.0f / round_codebook(view.table, low);
        return;
    }
    const int levels = 1 << (view.bits < 4 ? view.bits : 4);
    for (int q = 0; q < 32; ++q) {
        low[q] = to_bf16(static_cast<float>(q % levels - (view.bits == 8 ? 0 : b->midpoint)));
        high[q] = to_bf16(static_cast<float>(q % 16 * 16 - b->midpoint));
    }
}

QK_INLINE I look_up(I table, I words) { return _mm512_permutexvar_epi16(words, table); }

QK_INLINE F dot_pairs(F sum, I weights, I x) { return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x); }

// Words whose low bits index the table: columns 0 and 2 of run T, or with HALF columns 1 and 3.
template <int BITS, int T, int HALF>
QK_INLINE I words_of(const I* lines) {
    if constexpr (BITS == 3) {
        const I low = Isa::template shift_right<2 * (T / 2)>(lines[T % 2]);
        I high = lines[2];
        if constexpr (T < 2) {
            high = Isa::template shift_left<2 - T>(high);
        } else {
            high = Isa::template shift_right<T - 2>(high);
        }
        // Two bits of the first, the rest of the second.
        const I words = _mm512_ternarylogic_epi32(Isa::splat_byte(3), low, high, 0xca);
        return Isa::template shift_right<8 * HALF>(words);
    } else {
        return Isa::template shift_right<BITS % 8 * T + 8 * HALF>(lines[0]);
    }
}

template <int BITS, int MT, int NV, int T, int HALF>
QK_INLINE void pairs_step(const uint32_t* x, int64_t x_stride, int64_t quads, const I (*lines)[3], I low, I high,
                          const Ahead& ahead, F* sums) {
    if constexpr (HALF == 0) fetch<MT < 4 ? fetches(Isa::kRows * NV, BITS) : 2>(ahead, T);
    // Few rows of x leave a chain of sums to wait for itself: a second one then.
    F* const chain = sums + (MT <= 2 ? HALF * MT * NV : 0);
    I weights[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) weights[v] = look_up(low, words_of<BITS, T, HALF>(lines[v]));
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
        const I pair = Isa::splat(static_cast<int32_t>(x[i / NV * x_stride + kHalves * T * quads + HALF]));
        chain[i] = dot_pairs(chain[i], weights[i % NV], pair);
    }
    if constexpr (BITS == 8) {
        QK_UNROLL for (int v = 0; v < NV; ++v) {
            weights[v] = look_up(high, Isa::template shift_right<8 * HALF + 4>(lines[v][0]));
        }
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
            const I pair = Isa::splat(static_cast<int32_t>(x[i / NV * x_stride + kHalves * T * quads + HALF]));
            chain[i] = dot_pairs(chain[i], weights[i % NV], pair);
        }
    }
    if constexpr (HALF == 0) {
        pairs_step<BITS, MT, NV, T, 1>(x, x_stride, quads, lines, low, high, ahead, sums);
    } else if constexpr (T + 1 < (BITS == 3 ? 8 : 8 / BITS)) {
        pairs_step<BITS, MT, NV, T + 1, 0>(x, x_stride, quads, lines, low, high, ahead, sums);
    }
}

// tile += scale * (sum - (z - midpoint) * sum of x), or scale * sum + offset * sum of x.
template <int MT, int NV>
QK_INLINE void add_to_tile(const BlockPairs& b, int64_t r, int64_t m0, const F* sums) {
    F scale[NV];
    QK_UNROLL for (int v = 0; v < NV; ++v) {
        scale[v] = Isa::mul_f(Isa::load_f(b.head->scale + r + v * Isa::kRows), Isa::splat_f(b.factor));
    }
    QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
        const int64_t m = m0 + i / NV, at = r + i % NV * Isa::kRows;
        float* out = b.tile[m] + at;
        F sum = sums[i], before = Isa::load_f(out);
        if (b.zero_kind == qk::ZeroKind::uint8 || b.zero_kind == qk::ZeroKind::offsets) {
            const F x_sum = Isa::splat_f(b.x_sum[m * b.blocks]);
            if (b.zero_kind == qk::ZeroKind::uint8) {
                const I zero = Isa::sub(Isa::load_i(b.head->zero + at), Isa::splat(b.midpoint));
                sum = _mm512_fnmadd_ps(Isa::to_float(zero), x_sum, sum);
            } else {
                before = Isa::fma(Isa::load_f(b.head->offset + at), x_sum, before);
            }
        }
        Isa::store_f(out, Isa::fma(sum, scale[i % NV], before));
    }
}

// MT rows of x by NV vectors of output columns from column `r` of the panel, over one block.
template <int BITS, int MT, int NV>
QK_INLINE void micro_pairs(const BlockPairs& b, int64_t r, int64_t m0) {
    constexpr int kSums = MT <= 2 ? 2 * MT * NV : MT * NV;
    F sums[kSums];
    QK_UNROLL for (int i = 0; i < kSums; ++i) sums[i] = Isa::splat_f(0.0f);
    const I low = _mm512_loadu_si512(b.low);
    const I high = BITS == 8 ? _mm512_loadu_si512(b.high) : low;
    const int64_t quads = b.padded / (4 * superline_steps(BITS));
    const uint8_t* codes = b.codes + 4 * r;
    const uint32_t* x = b.x + m0 * b.x_stride;
    Ahead ahead = ahead_of(b.codes, r, Isa::kRows * NV, BITS, b.padded / 4, m0, MT, b.M);
    int64_t j = 0;
    do {  // a block is never empty
        I lines[NV][3];
        QK_UNROLL for (int v = 0; v < NV; ++v) load_lines<BITS>(codes + v * 4 * Isa::kRows, b.line, lines[v]);
        pairs_step<BITS, MT, NV, 0, 0>(x, b.x_stride, quads, lines, low, high, ahead, sums);
        ahead.at += superline_steps(BITS) * ahead.step;
        codes += kLines<BITS> * b.line;
        x += kHalves;
    } while (++j < quads);
    if constexpr (kSums > MT * NV) {
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) sums[i] = Isa::add(sums[i], sums[MT * NV + i]);
    }
    add_to_tile<MT, NV>(b, r, m0, sums);
}

template <int BITS, int MT, int NV>
inline void direct_rows(const BlockPairs& b, int64_t R, int64_t m0) {
    int64_t r = 0;
    for (; r + Isa::kRows * NV <= R; r += Isa::kRows * NV) micro_pairs<BITS, MT, NV>(b, r, m0);
    for (; r < R; r += Isa::kRows) micro_pairs<BITS, MT, 1>(b, r, m0);
}

// Expanded blocks of one panel, up to kBlockColumns columns, side by side; what their rows share.
struct Batch {
    alignas(64) uint8_t weights[qk::kPanelRows * qk::kBlockColumns * 2];  // pairs of bf16: [columns / 2][R][2]
    int64_t columns, count;
    const float* x_sum;           // of the first block
    const uint32_t* x[kBatch];    // [M, length]
    int64_t length[kBatch];       // pairs of columns
    float scale[kBatch][qk::kPanelRows];
    float zero[kBatch][qk::kPanelRows];  // z - midpoint, or the offset
};

// Keeps a value in its register: GCC would rather load it again for every product.
QK_INLINE void keep(I& value) {
#if defined(__GNUC__)
    asm("" : "+v"(value));
#endif
}

// MT rows of x by NV vectors of output columns over a batch. With few rows the totals stay in registers, so
// that short groups do not each cost a pass through the tile.
template <int MT, int NV, bool ZERO, bool OFFSET>
QK_INLINE void micro_batch(const BlockPairs& b, const Batch& batch, int64_t r, int64_t m0) {
    constexpr bool kTotals = MT <= kBatchRows;
    float* const tile = b.tile[m0] + r;
    const auto out = [&](int i) { return tile + i / NV * qk::kPanelRows + i % NV * Isa::kRows; };
    F totals[MT * NV];
    if constexpr (kTotals) {
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) totals[i] = Isa::load_f(out(i));
    }
    const uint8_t* weights = batch.weights + 4 * r;
    for (int64_t n = 0; n < batch.count; ++n) {
        const int64_t length = batch.length[n];
        const uint32_t* x = batch.x[n] + m0 * length;
        const uint32_t* const end = x + length;
        F sums[MT * NV];
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) sums[i] = Isa::splat_f(0.0f);
        do {  // a block is never empty
            QK_UNROLL for (int m = MT; m < 2 * MT; ++m) fetch_x(x + m * length);
            const uint32_t* const line = end - x < kLinePairs ? end : x + kLinePairs;
            do {
                I w[NV];
                QK_UNROLL for (int v = 0; v < NV; ++v) {
                    w[v] = Isa::load(weights + v * 4 * Isa::kRows);
                    keep(w[v]);
                }
                QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
                    sums[i] = dot_pairs(sums[i], w[i % NV], Isa::splat(static_cast<int32_t>(x[i / NV * length])));
                }
                weights += b.line;
            } while (++x < line);
        } while (x < end);
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) {
            const int64_t at = r + i % NV * Isa::kRows;
            F total = kTotals ? totals[i] : Isa::load_f(out(i));
            if constexpr (ZERO || OFFSET) {
                const F x_sum = Isa::splat_f(batch.x_sum[(m0 + i / NV) * b.blocks + n]);
                const F zero = Isa::load_f(batch.zero[n] + at);
                if (ZERO) sums[i] = _mm512_fnmadd_ps(zero, x_sum, sums[i]);
                if (OFFSET) total = Isa::fma(zero, x_sum, total);
            }
            total = Isa::fma(sums[i], Isa::load_f(batch.scale[n] + at), total);
            if constexpr (kTotals) {
                totals[i] = total;
            } else {
                Isa::store_f(out(i), total);
            }
        }
    }
    if constexpr (kTotals) {
        QK_UNROLL for (int i = 0; i < MT * NV; ++i) Isa::store_f(out(i), totals[i]);
    }
}

template <int MT, int NV>
QK_INLINE void micro_batch(const BlockPairs& b, const Batch& batch, int64_t r, int64_t m0) {
    switch (b.zero_kind) {
        case qk::ZeroKind::uint8: return micro_batch<MT, NV, true, false>(b, batch, r, m0);
        case qk::ZeroKind::offsets: return micro_batch<MT, NV, false, true>(b, batch, r, m0);
        default: return micro_batch<MT, NV, false, false>(b, batch, r, m0);
    }
}

template <int MT>
void batch_rows(const BlockPairs& b, const Batch& batch, int64_t R, int64_t m0) {
    int64_t r = 0;
    for (; r + Isa::kRows * 4 <= R; r += Isa::kRows * 4) micro_batch<MT, 4>(b, batch, r, m0);
    for (; r < R; r += Isa::kRows) micro_batch<MT, 1>(b, batch, r, m0);
}

void product_batch(const BlockPairs& b, Batch* batch, int64_t R, int64_t M) {
    if (batch->count == 0) return;
    int64_t m = 0;
    if (batch->count == 1) {
        for (; m + 6 <= M; m += 6) batch_rows<6>(b, *batch, R, m);
    }
    for (; m + kBatchRows <= M; m += kBatchRows) batch_rows<kBatchRows>(b, *batch, R, m);
    if (m + 2 <= M) {
        batch_rows<2>(b, *batch, R, m);
    } else if (m < M) {
        batch_rows<1>(b, *batch, R, m);
    }
    batch->count = batch->columns = 0;
}

// Bytes to the bf16 pairs of columns (0, 2) and (1, 3): an integer of 8 bits has no bit in the low half of
// its f32.
QK_INLINE void expand_bytes(I line, F midpoint, I* pairs) {
    F q[4];
    q[0] = Isa::to_float(Isa::template byte<0>(line));
    q[1] = Isa::to_float(Isa::template byte<1>(line));
    q[2] = Isa::to_float(Isa::template byte<2>(line));
    q[3] = Isa::to_float(Isa::template byte<3>(line));
    QK_UNROLL for (int half = 0; half < kHalves; ++half) {
        const I first = _mm512_castps_si512(Isa::sub_f(q[half], midpoint));
        const I second = _mm512_castps_si512(Isa::sub_f(q[half + 2], midpoint));
        pairs[half] = _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
    }
}

template <int BITS, int T, int HALF>
QK_INLINE void expand_step(const I* lines, I low, int64_t quads, int64_t line, uint8_t* out) {
    Isa::store(out + (kHalves * T * quads + HALF) * line, look_up(low, words_of<BITS, T, HALF>(lines)));
    if constexpr (HALF == 0) {
        expand_step<BITS, T, 1>(lines, low, quads, line, out);
    } else if constexpr (T + 1 < (BITS == 3 ? 8 : 8 / BITS)) {
        expand_step<BITS, T + 1, 0>(lines, low, quads, line, out);
    }
}

// A block as bf16 pairs, [padded / 2][R][2].
template <int BITS>
void expand_pairs(const BlockPairs& b, int64_t R, uint8_t* out) {
    const I low = _mm512_loadu_si512(b.low);
    const F midpoint = Isa::splat_f(static_cast<float>(b.midpoint));
    const int64_t quads = b.padded / (4 * superline_steps(BITS));
    for (int64_t j = 0; j < quads; ++j) {
        for (int64_t r = 0; r < R; r += Isa::kRows) {
            I lines[3];
            const uint8_t* codes = b.codes + j * kLines<BITS> * b.line + 4 * r;
            fetch_lines<BITS>(codes, b.line);
            load_lines<BITS>(codes, b.line, lines);
            uint8_t* at = out + kHalves * j * b.line + 4 * r;
            if constexpr (BITS == 8) {
                I pairs[kHalves];
                expand_bytes(lines[0], midpoint, pairs);
                Isa::store(at, pairs[0]);
                Isa::store(at + b.line, pairs[1]);
            } else {
                expand_step<BITS, 0, 0>(lines, low, quads, b.line, at);
            }
        }
    }
}

template <int BITS>
void direct_pairs(const BlockPairs& b, int64_t R, int64_t M) {
    int64_t m = 0;
    for (; M - m >= 7 || M - m == 4; m += 4) direct_rows<BITS, 4, 4>(b, R, m);
    for (; M - m >= 3; m += 3) direct_rows<BITS, 3, 4>(b, R, m);
    if (M - m == 2) {
        direct_rows<BITS, 2, 4>(b, R, m);
    } else if (M - m == 1) {
        direct_rows<BITS, 1, 4>(b, R, m);
    }
}

// Adds a block to the batch, which has room for it.
void add_to_batch(const BlockPairs& b, int bits, int64_t R, Batch* batch) {
    uint8_t* out = batch->weights + batch->columns / 2 * b.line;
    switch (bits) {
        case 2: expand_pairs<2>(b, R, out); break;
        case 3: expand_pairs<3>(b, R, out); break;
        case 4: expand_pairs<4>(b, R, out); break;
        default: expand_pairs<8>(b, R, out); break;
    }
    if (batch->count == 0) batch->x_sum = b.x_sum;
    const int64_t n = batch->count++;
    batch->columns += b.padded;
    batch->x[n] = b.x;
    batch->length[n] = b.padded / 2;
    for (int64_t r = 0; r < R; r += Isa::kRows) {
        Isa::store_f(batch->scale[n] + r, Isa::mul_f(Isa::load_f(b.head->scale + r), Isa::splat_f(b.factor)));
        if (b.zero_kind == qk::ZeroKind::uint8) {
            Isa::store_f(batch->zero[n] + r, Isa::to_float(Isa::sub(Isa::load_i(b.head->zero + r), Isa::splat(b.midpoint))));
        } else if (b.zero_kind == qk::ZeroKind::offsets) {
            Isa::store_f(batch->zero[n] + r, Isa::load_f(b.head->offset + r));
        }
    }
}

// x in the weight's column order, the middle two columns of every quad swapped, blocks padded with zeros. The
// rows of a chunk lie together block by block, so that they share no cache sets whatever K is.
void prepare_pairs(const qk::PrepareArgs& args, int64_t begin, int64_t end) {
    const qk::PackedView& view = *args.view;
    const bool wants_sums = view.zero_kind == qk::ZeroKind::uint8 || view.zero_kind == qk::ZeroKind::offsets;
    const int64_t chunk = qk::matmul_chunk_rows(args.M, qk::kPairRows);
    constexpr int kWords = 32;  // in a register
    alignas(64) uint16_t words[qk::kBlockColumns + kWords];
    for (int64_t row = begin; row < end; ++row) {
        const uint16_t* x = static_cast<const uint16_t*>(args.x) + row * args.row_stride;
        const int64_t first = row / chunk * chunk;
        const int64_t rows = args.M - first < chunk ? args.M - first : chunk;
        uint16_t* block = args.pairs + first * view.padded_K;
        float* sums = args.pair_sums + row * view.blocks;
        for (int64_t g = 0; g < view.groups; ++g) {
            const int64_t last = view.group_start[g + 1];
            for (int64_t k = view.group_start[g]; k < last; k += qk::kBlockColumns) {
                const int64_t n = last - k < qk::kBlockColumns ? last - k : qk::kBlockColumns;
                const int64_t padded = padded_columns(n, view.bits);
                if (view.permutation) {
                    for (int64_t i = 0; i < n; ++i) words[i] = x[view.permutation[k + i]];
                } else {
                    memcpy(words, x + k, static_cast<size_t>(n) * 2);
                }
                memset(words + n, 0, kWords * 2);
                uint16_t* out = block + (row - first) * padded;
                block += rows * padded;
                F sum = Isa::splat_f(0.0f);
                for (int64_t i = 0; i < padded; i += kWords) {
                    I quads = _mm512_load_si512(words + i);
                    quads = _mm512_shufflelo_epi16(_mm512_shufflehi_epi16(quads, 0xd8), 0xd8);
                    if (wants_sums) sum = dot_pairs(sum, quads, _mm512_set1_epi16(0x3f80));  // 1.0
                    const int64_t left = padded - i;
                    _mm512_mask_storeu_epi16(out + i, left < kWords ? (1u << left) - 1 : ~0u, quads);
                }
                if (wants_sums) *sums++ = _mm512_reduce_add_ps(sum);
            }
        }
    }
}

void run_pairs(const qk::MatmulArgs& args, int64_t begin, int64_t end) {
    const qk::PackedView& view = *args.view;
    alignas(64) float tile[qk::kPairRows][qk::kPanelRows];
    Batch batch;
    batch.count = batch.columns = 0;
    alignas(64) uint16_t low[32], high[32];
    GroupHead head;
    BlockPairs b;
    code_values(view, low, high, &b);
    b.blocks = view.blocks;
    b.head = &head;
    b.tile = tile;
    const int64_t chunk = qk::matmul_chunk_rows(args.M, qk::kPairRows);
    for (int64_t t = begin; t < end; ++t) {
        const int64_t panel = t % view.panel_count, first_m = t / view.panel_count * chunk;
        const int64_t M = args.M - first_m < chunk ? args.M - first_m : chunk;
        const int64_t R = panel_rows(view, panel);
        b.line = 4 * R;
        b.M = M;
        memset(tile, 0, static_cast<size_t>(M) * sizeof tile[0]);
        for_each_block(view, panel, R, &head,
                       [&](int64_t block, int64_t, int64_t, int64_t padded, int64_t packed, const uint8_t* codes) {
            b.codes = codes;
            b.padded = padded;
            b.x = reinterpret_cast<const uint32_t*>(args.pairs + first_m * view.padded_K + packed * M);
            b.x_stride = padded / 2;
            b.x_sum = args.pair_sums + first_m * view.blocks + block;
            if (M > (view.bits == 8 ? kDirectPairs8 : kDirectPairs)) {
                if (batch.count == kBatch || batch.columns + padded > qk::kBlockColumns) product_batch(b, &batch, R, M);
                add_to_batch(b, view.bits, R, &batch);
                return;
            }
            switch (view.bits) {
                case 2: direct_pairs<2>(b, R, M); break;
                case 3: direct_pairs<3>(b, R, M); break;
                case 4: direct_pairs<4>(b, R, M); break;
                default: direct_pairs<8>(b, R, M); break;
            }
        });
        product_batch(b, &batch, R, M);
        store_tile(args, panel, first_m, M, R, tile);
    }
}

}  // namespace
