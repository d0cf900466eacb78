// The CPU layout of a quantized weight, "cpu.k4x16": one blob that every CPU tier reads.
//
//   header (256 bytes) | group_start int32 [groups + 1] | permutation int32 [K] (act-order only) | panels | extra
//
// Columns are stored in group order (the permutation says which column of x each one is). A panel holds 64
// rows (the last one a multiple of 16, padded with zero scales) and is read from front to back:
//
//   for each group:  scales [R]   zeros uint8 [R] or offsets [R]   codes of each block
//
// A block is up to kBlockColumns columns of one group, padded with code 0 to a whole number of superlines;
// the padded length P is cut into `steps` equal runs of J = P / (4 * steps) quads of columns. Superline j
// holds quad j of every run, 4 bytes a row:
//
//   bits   steps   bytes a row   run t of byte i (column 4 * (t * J + j) + i)
//   8      1       4             the byte
//   4      2       4             nibble t
//   2      4       4             bits 2t, 2t + 1
//   3      8       12            low two bits: line t % 2, bits 2 * (t / 2) and the next; high bit: line 2, bit t
//
// so that a vector register loaded from a line holds four consecutive columns of 16, 8 or 4 rows: what the
// 4-way dot product instructions want, with a mask and at most one shift between load and product.
#pragma once
#include <string.h>

#include "qkern/types.h"

namespace qk {

enum class ZeroKind : int { midpoint = 0, uint8 = 1, offsets = 2, codebook = 3 };

constexpr uint32_t kPackedVersion = 1;
constexpr int64_t kPanelRows = 64;
constexpr int64_t kRowUnit = 16;
constexpr int64_t kBlockColumns = 128;
constexpr char kPackedMagic[8] = {'q', 'k', 'e', 'r', 'n', 'K', '4', '\0'};

struct PackedHeader {
    char magic[8];
    uint32_t version;
    int32_t bits;
    int64_t total_bytes;
    int64_t N, K, groups;
    int32_t zero_kind;      // ZeroKind
    int32_t scale_dtype;    // DType
    int32_t per_tensor;     // one scale, repeated for every row
    int32_t has_index;      // form 2 had a group_index
    int64_t permutation_offset;  // 0: columns are in their original order
    int64_t panels_offset;
    int64_t extra_offset, extra_bytes;  // opaque here: what else form 2 carried
    float table[16];        // codebook: w = table[q] * s
    char scheme[64];        // spelling, zero terminated
    char reserved[32];
};
static_assert(sizeof(PackedHeader) == 256, "the header is 256 bytes");

// A validated blob; every pointer lies inside it.
struct PackedView {
    int64_t N, K, groups;
    int bits;
    ZeroKind zero_kind;
    DType scale_dtype;
    const int32_t* group_start;   // [groups + 1]
    const int32_t* permutation;   // [K] or null
    const uint8_t* panels;
    const float* table;           // [16]
    int64_t row_bytes;            // bytes of one row in a panel
    int64_t padded_K;             // columns with every block padded
    int64_t blocks;
    int64_t panel_count;
    bool per_token;               // scheme w8..a8: int8 activations share one scale a token, not one a block
};

}  // namespace qk

namespace {

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

inline int superline_steps(int bits) { return bits == 3 ? 8 : 8 / bits; }

// Columns of a block after padding.
inline int64_t padded_columns(int64_t columns, int bits) { return round_up(columns, 4 * superline_steps(bits)); }

inline int64_t scale_bytes(qk::DType dtype) { return dtype == qk::DType::f32 ? 4 : 2; }

// Bytes of one row's scale and zero point or offset in one group.
inline int64_t group_head_bytes(qk::DType scale_dtype, qk::ZeroKind kind) {
    const int64_t scale = scale_bytes(scale_dtype);
    return scale + (kind == qk::ZeroKind::uint8 ? 1 : kind == qk::ZeroKind::offsets ? scale : 0);
}

inline int64_t packed_rows(int64_t N, bool per_tensor) {
    // A per-tensor scale has to live somewhere even when there are no rows.
    return round_up(N == 0 && per_tensor ? 1 : N, qk::kRowUnit);
}

inline int64_t panel_rows(const qk::PackedView& view, int64_t panel) {
    const int64_t left = round_up(view.N, qk::kRowUnit) - panel * qk::kPanelRows;
    return left < qk::kPanelRows ? left : qk::kPanelRows;
}

// Fills the sizes that follow from the groups; group_start, bits, kinds and groups are set already.
inline void derive_sizes(qk::PackedView* view) {
    view->padded_K = 0;
    view->blocks = 0;
    for (int64_t g = 0; g < view->groups; ++g) {
        const int64_t columns = view->group_start[g + 1] - view->group_start[g];
        view->padded_K += padded_columns(columns, view->bits);
        view->blocks += (columns + qk::kBlockColumns - 1) / qk::kBlockColumns;
    }
    view->row_bytes = view->groups * group_head_bytes(view->scale_dtype, view->zero_kind) +
                      view->padded_K * view->bits / 8;
    view->panel_count = (view->N + qk::kPanelRows - 1) / qk::kPanelRows;
}

// What int8_matmul reads: 8-bit codes of one group. A panel is then one head and one run of quads.
inline bool is_int8_weight(const qk::PackedView& view) {
    return view.bits == 8 && view.zero_kind != qk::ZeroKind::codebook && view.groups == 1 && !view.permutation;
}

// Checks a blob against its size and describes it. Null when it is sound, else what is wrong with it.
inline const char* parse_packed(const uint8_t* blob, int64_t bytes, qk::PackedView* view) {
    qk::PackedHeader header;
    if (bytes < static_cast<int64_t>(sizeof header)) return "it is shorter than its header";
    memcpy(&header, blob, sizeof header);
    if (memcmp(header.magic, qk::kPackedMagic, sizeof header.magic) != 0) return "its magic number is not cpu.k4x16's";
    if (header.version != qk::kPackedVersion) return "its version is not the one this build writes";
    if (header.total_bytes != bytes) return "its size is not the one in its header";
    const int bits = header.bits;
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return "its bits are not 2, 3, 4 or 8";
    if (header.zero_kind < 0 || header.zero_kind > 3) return "its kind of zero point is unknown";
    if (header.zero_kind == 3 && bits != 4) return "a codebook has 4 bits";
    for (const float value : header.table) {
        if (header.zero_kind == 3 && !(value >= -1.0f && value <= 1.0f)) return "its codebook leaves -1..1";
    }
    if (header.scale_dtype < 0 || header.scale_dtype > 2) return "its scale dtype is unknown";
    constexpr int64_t kLimit = int64_t{1} << 31;
    if (header.K < 0 || header.K >= kLimit || header.N < 0 || header.N >= kLimit || header.groups < 0 ||
        header.groups >= kLimit) {
        return "its shape is out of range";
    }
    const int64_t starts_end = static_cast<int64_t>(sizeof header) + 4 * (header.groups + 1);
    if (starts_end > bytes) return "its group table exceeds it";
    if (reinterpret_cast<uintptr_t>(blob) % 4 != 0) return "its address is not a multiple of 4";
    const auto* starts = reinterpret_cast<const int32_t*>(blob + sizeof header);
    if (starts[0] != 0 || starts[header.groups] != header.K) return "its groups do not cover its columns";
    for (int64_t g = 0; g < header.groups; ++g) {
        if (starts[g] > starts[g + 1]) return "its group table is not ascending";
    }
    view->N = header.N;
    view->K = header.K;
    view->groups = header.groups;
    view->bits = bits;
    view->zero_kind = static_cast<qk::ZeroKind>(header.zero_kind);
    view->scale_dtype = static_cast<qk::DType>(header.scale_dtype);
    view->group_start = starts;
    view->permutation = nullptr;
    if (header.permutation_offset != 0) {
        const int64_t at = header.permutation_offset;
        if (at < starts_end || at % 4 != 0 || at > bytes || 4 * header.K > bytes - at) {
            return "its permutation exceeds it";
        }
        view->permutation = reinterpret_cast<const int32_t*>(blob + at);
        for (int64_t k = 0; k < header.K; ++k) {
            if (view->permutation[k] < 0 || view->permutation[k] >= header.K) return "its permutation is out of range";
        }
    }
    derive_sizes(view);
    const int64_t rows = packed_rows(header.N, header.per_tensor != 0);
    const int64_t at = header.panels_offset;
    if (at < starts_end || at > bytes) return "its panels exceed it";
    // rows < 2^31 + 16; a division keeps the product from overflowing.
    if (view->row_bytes != 0 && rows > (bytes - at) / view->row_bytes) return "its panels exceed it";
    if (header.extra_bytes < 0 || header.extra_offset < 0 || header.extra_offset > bytes ||
        header.extra_bytes > bytes - header.extra_offset) {
        return "its extra section exceeds it";
    }
    view->panels = blob + at;
    view->table = reinterpret_cast<const float*>(blob + offsetof(qk::PackedHeader, table));
    size_t spelled = 0;
    while (spelled < sizeof header.scheme && header.scheme[spelled] != '\0') ++spelled;
    view->per_token = is_int8_weight(*view) && spelled > 2 && memcmp(header.scheme + spelled - 2, "a8", 2) == 0;
    return nullptr;
}

}  // namespace
