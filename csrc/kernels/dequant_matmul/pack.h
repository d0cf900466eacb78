// Form 2 to panels and back, one row of one block at a time. Only the scalar tier compiles it.
#pragma once
#include "qkern/kernels.h"
#include "qkern/packed_weight.h"
#include "qkern/scalar_float.h"

namespace {

inline uint32_t load_word(const uint8_t* at) {
    uint32_t word;
    memcpy(&word, at, 4);
    return word;
}

inline void store_word(uint8_t* at, uint32_t word) { memcpy(at, &word, 4); }

// Codes first..first+n of one row of the dense bit stream, in packed column order.
inline void read_codes(const qk::PackArgs& args, int64_t row, int64_t first, int64_t n, uint8_t* codes) {
    const uint32_t* words = args.codes + row * args.code_words;
    const int bits = args.view->bits;
    const int32_t* permutation = args.view->permutation;
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t bit = (permutation ? permutation[first + i] : first + i) * bits;
        const int shift = static_cast<int>(bit & 31);
        uint32_t code = words[bit >> 5] >> shift;
        if (shift + bits > 32) code |= words[(bit >> 5) + 1] << (32 - shift);
        codes[i] = static_cast<uint8_t>(code & mask);
    }
}

inline void write_codes(const qk::PackArgs& args, int64_t row, int64_t first, int64_t n, const uint8_t* codes) {
    uint32_t* words = args.codes + row * args.code_words;
    const int bits = args.view->bits;
    const int32_t* permutation = args.view->permutation;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t bit = (permutation ? permutation[first + i] : first + i) * bits;
        const int shift = static_cast<int>(bit & 31);
        words[bit >> 5] |= static_cast<uint32_t>(codes[i]) << shift;
        if (shift + bits > 32) words[(bit >> 5) + 1] |= static_cast<uint32_t>(codes[i]) >> (32 - shift);
    }
}

// One row of a block: padded codes to the row's 4 bytes of every line, and back. line is R * 4 bytes.
inline void spread(const uint8_t* codes, int64_t padded, int bits, uint8_t* out, int64_t line) {
    const int steps = superline_steps(bits);
    const int64_t run = padded / steps;
    for (int64_t j = 0; j < run / 4; ++j) {
        const uint8_t* quad = codes + 4 * j;
        if (bits == 3) {
            uint32_t low[2] = {0, 0}, high = 0;
            for (int t = 0; t < 8; ++t) {
                const uint32_t word = load_word(quad + t * run);
                low[t % 2] |= (word & 0x03030303u) << (2 * (t / 2));
                high |= (word >> 2 & 0x01010101u) << t;
            }
            store_word(out, low[0]);
            store_word(out + line, low[1]);
            store_word(out + 2 * line, high);
            out += 3 * line;
        } else {
            uint32_t word = 0;
            for (int t = 0; t < steps; ++t) word |= load_word(quad + t * run) << (bits * t);
            store_word(out, word);
            out += line;
        }
    }
}

inline void collect(uint8_t* codes, int64_t padded, int bits, const uint8_t* in, int64_t line) {
    const int steps = superline_steps(bits);
    const int64_t run = padded / steps;
    const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
    for (int64_t j = 0; j < run / 4; ++j) {
        uint8_t* quad = codes + 4 * j;
        if (bits == 3) {
            const uint32_t low[2] = {load_word(in), load_word(in + line)};
            const uint32_t high = load_word(in + 2 * line);
            for (int t = 0; t < 8; ++t) {
                store_word(quad + t * run, (low[t % 2] >> (2 * (t / 2)) & 0x03030303u) |
                                               (high >> t & 0x01010101u) << 2);
            }
            in += 3 * line;
        } else {
            const uint32_t word = load_word(in);
            for (int t = 0; t < steps; ++t) store_word(quad + t * run, word >> (bits * t) & mask);
            in += line;
        }
    }
}

// Rows of a panel including the padding; the panel that holds a lone per-tensor scale has 16.
inline int64_t rows_in_panel(const qk::PackedView& view, int64_t panel) {
    const int64_t rows = panel_rows(view, panel);
    return rows > 0 ? rows : qk::kRowUnit;
}

template <bool PACK>
void move_panels(const qk::PackArgs& args, int64_t begin, int64_t end) {
    const qk::PackedView& view = *args.view;
    const int64_t scale_size = scale_bytes(view.scale_dtype);
    const int64_t zero_size = group_head_bytes(view.scale_dtype, view.zero_kind) - scale_size;
    const bool per_tensor = args.scale_row_stride == 0;
    uint8_t codes[qk::kBlockColumns];
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t R = rows_in_panel(view, panel);
        uint8_t* at = args.panels + panel * qk::kPanelRows * view.row_bytes;
        for (int64_t g = 0; g < view.groups; ++g) {
            // A field of the group's head: R elements, row by row.
            const auto head = [&](void* field, int64_t size) {
                for (int64_t r = 0; r < R; ++r) {
                    const int64_t row = panel * qk::kPanelRows + r;
                    uint8_t* packed = at + r * size;
                    uint8_t* plain = static_cast<uint8_t*>(field) + (row * args.scale_row_stride + g) * size;
                    const bool real = row < view.N || (per_tensor && row == 0);
                    if (!PACK) {
                        if (real && (!per_tensor || row == 0)) memcpy(plain, packed, static_cast<size_t>(size));
                    } else if (real) {
                        memcpy(packed, plain, static_cast<size_t>(size));
                    } else {
                        memset(packed, 0, static_cast<size_t>(size));
                    }
                }
                at += R * size;
            };
            head(args.scales, scale_size);
            if (zero_size > 0) head(args.zeros, zero_size);
            const int64_t last = view.group_start[g + 1];
            for (int64_t k = view.group_start[g]; k < last; k += qk::kBlockColumns) {
                const int64_t n = last - k < qk::kBlockColumns ? last - k : qk::kBlockColumns;
                const int64_t padded = padded_columns(n, view.bits);
                for (int64_t r = 0; r < R; ++r) {
                    const int64_t row = panel * qk::kPanelRows + r;
                    if (PACK) {
                        memset(codes, 0, sizeof codes);
                        if (row < view.N) read_codes(args, row, k, n, codes);
                        spread(codes, padded, view.bits, at + 4 * r, 4 * R);
                    } else if (row < view.N) {
                        collect(codes, padded, view.bits, at + 4 * r, 4 * R);
                        write_codes(args, row, k, n, codes);
                    }
                }
                at += R * padded * view.bits / 8;
            }
        }
    }
}

}  // namespace
