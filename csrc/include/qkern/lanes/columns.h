// Groups of columns: the extremes of each, and what its grid means for every column of a chunk, so that loops over
// columns know no groups.
// Included after a lanes/<isa>.h.
#pragma once

namespace {

constexpr int64_t kColumns = 512;  // columns: a whole number of cache lines for any bits

// Halves in the upper 16 bits to what they stand for: bf16 already is.
template <qk::DType D>
inline Lanes from_upper(const Lanes& a) {
    if (D != qk::DType::f16) return a;
    alignas(64) float bits[kLanes];
    uint16_t halves[kLanes];
    store(bits, a);
    for (int i = 0; i < kLanes; ++i) halves[i] = static_cast<uint16_t>(bits_of(bits[i]) >> 16);
    return load_f16(halves);
}

// Sixteen running maxima of each of `count` groups from column k of a row on: of the numbers in `up` and of the
// negated ones in `down`, or of the magnitudes in `up`. Halves are ordered like what they stand for, and stay in the
// upper 16 bits: largest_of_each makes numbers of them. Returns the largest of all; a NaN is above every number.
// kSize: the columns of every group, if known.
template <qk::DType D, bool kBoth, int kSize = 0>
inline Lanes extremes(const void* row, int64_t k, int64_t K, int64_t group_size, int64_t count, Lanes (&up)[kLanes],
                      Lanes (&down)[kLanes]) {
    constexpr bool kHalves = D != qk::DType::f32;
    constexpr qk::DType kUpper = kHalves ? qk::DType::bf16 : D;  // how to load what stays half
    Lanes largest = splat(0.0f);
    for (int64_t i = 0; i < kLanes; ++i) {
        Lanes high = splat(0.0f), drop = splat(0.0f);
        if (i < count) {
            const int64_t end = kSize ? k + kSize : K - k < group_size ? K : k + group_size;
            if (kHalves) {
                for (; k + 2 * kLanes <= end; k += 2 * kLanes) {
                    const Lanes w = load_lanes<qk::DType::f32>(static_cast<const uint16_t*>(row) + k, 0);
                    high = max_halves(high, kBoth ? w : magnitude_halves(w));
                    if (kBoth) drop = max_halves(drop, flip_sign_halves(w));
                }
                high = upper_of_pairs(high);
                if (kBoth) drop = upper_of_pairs(drop);
            }
            const auto take = [&](const Lanes& w) {
                high = max_bits(high, kBoth ? w : magnitude(w));
                if (kBoth) drop = max_bits(drop, flip_sign(w));
            };
            for (; k + kLanes <= end; k += kLanes) take(load_lanes<kUpper>(row, k));
            if (k < end) take(load_some<kUpper>(row, k, end - k));
            k = end;
        }
        up[i] = high;
        if (kBoth) down[i] = drop;
        largest = max_bits(largest, kBoth ? max_bits(high, drop) : high);
    }
    return from_upper<D>(largest);
}

template <qk::DType D>
inline Lanes largest_of_each(const Lanes (&rows)[kLanes]) {
    return from_upper<D>(max_of_each(rows));
}

inline bool all_finite(const Lanes& a) { return !any_bit(sub(a, a)); }

// 1 for 0, of numbers that are at least 0. Also where the processor takes denormal numbers as 0.
inline Lanes one_for_zero(const Lanes& a) { return where_above(a, splat(0.0f), a, splat(1.0f)); }

// Filled in by whole Lanes: the last ones may run over.
struct Columns {
    alignas(64) float scale[kColumns + kLanes], zero[kColumns + kLanes], offset[kColumns + kLanes];
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

    // Columns [first, last), at most a chunk of them; calls follow one another along the row. One value for every
    // kStep columns, of which a group must have a whole number.
    template <int kStep = 1>
    void expand(int64_t first, int64_t last, Columns& columns) {
        for (int64_t k = first; k < last;) {
            if (k == end) next_group();
            const int64_t next = end < last ? end : last;
            const int64_t from = (k - first) / kStep, to = (next - first + kStep - 1) / kStep;
            fill(columns.scale, from, to, scale[g % kLanes]);
            if (zeros) fill(columns.zero, from, to, zero[g % kLanes]);
            if (offsets) fill(columns.offset, from, to, offset[g % kLanes]);
            k = next;
        }
    }
};

}  // namespace
