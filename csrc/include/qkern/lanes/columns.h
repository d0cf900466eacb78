// What a grid of groups means for every column of a chunk, so that loops over columns know no groups.
// Included after a lanes/<isa>.h.
#pragma once

namespace {

constexpr int64_t kChunk = 256;  // columns: a whole number of words for any bits

// Filled in by whole Lanes: the last ones may run over.
struct Columns {
    alignas(64) float scale[kChunk + kLanes], zero[kChunk + kLanes], offset[kChunk + kLanes];
};

// The groups of a row, from its first column on.
struct Groups {
    const void* scales;  // of the first group
    qk::DType dtype;
    const uint8_t* zeros;  // or null: columns keep the zero point they have
    const void* offsets;   // of the scales' dtype, or null
    int64_t count;
    int64_t size;

    int64_t g = -1, end = 0;  // the group of the column before, and the column after it
    alignas(64) float scale[kLanes] = {}, zero[kLanes] = {}, offset[kLanes] = {};  // of kLanes groups, g among them

    static void fill(float* to, int64_t first, int64_t last, float value) {
        for (; first < last; first += kLanes) store(to + first, splat(value));
    }

    void next_group() {
        end += size;
        if (++g % kLanes != 0) return;
        const int64_t n = count - g < kLanes ? count - g : kLanes;
        store(scale, load_floats(scales, dtype, g, n));
        if (zeros) {
            uint8_t bytes[kLanes] = {};
            memcpy(bytes, zeros + g, static_cast<size_t>(n));
            store(zero, load_codes(bytes));
        }
        if (offsets) store(offset, load_floats(offsets, dtype, g, n));
    }

    // Columns [first, last), at most a chunk of them; calls follow one another along the row.
    void expand(int64_t first, int64_t last, Columns& columns) {
        for (int64_t k = first; k < last;) {
            if (k == end) next_group();
            const int64_t from = k - first, to = (end < last ? end : last) - first;
            fill(columns.scale, from, to, scale[g % kLanes]);
            if (zeros) fill(columns.zero, from, to, zero[g % kLanes]);
            if (offsets) fill(columns.offset, from, to, offset[g % kLanes]);
            k = first + to;
        }
    }
};

}  // namespace
