// Loads and stores of Lanes that depend on the dtype or touch fewer than 16 elements. Included at the end
// of every lanes/<isa>.h.
#pragma once
#include "qkern/bitstream.h"
#include "qkern/codebooks.h"

namespace {

template <qk::DType D>
inline Lanes load_lanes(const void* data, int64_t i) {
    if (D == qk::DType::f32) return load(static_cast<const float*>(data) + i);
    const uint16_t* half = static_cast<const uint16_t*>(data) + i;
    return D == qk::DType::f16 ? load_f16(half) : load_bf16(half);
}

template <qk::DType D>
inline void store_lanes(void* data, int64_t i, const Lanes& a) {
    if (D == qk::DType::f32) {
        store(static_cast<float*>(data) + i, a);
    } else if (D == qk::DType::f16) {
        store_f16(static_cast<uint16_t*>(data) + i, a);
    } else {
        store_bf16(static_cast<uint16_t*>(data) + i, a);
    }
}

// The first `count` of 16 elements, 1..16; the other lanes are zero.
template <qk::DType D>
inline Lanes load_some(const void* data, int64_t i, int64_t count) {
    if (count >= kLanes) return load_lanes<D>(data, i);
    constexpr int64_t size = D == qk::DType::f32 ? 4 : 2;
    alignas(64) char part[kLanes * size] = {};
    memcpy(part, static_cast<const char*>(data) + i * size, static_cast<size_t>(count * size));
    return load_lanes<D>(part, 0);
}

template <qk::DType D>
inline void store_some(void* data, int64_t i, int64_t count, const Lanes& a) {
    if (count >= kLanes) return store_lanes<D>(data, i, a);
    constexpr int64_t size = D == qk::DType::f32 ? 4 : 2;
    alignas(64) char part[kLanes * size];
    store_lanes<D>(part, 0, a);
    memcpy(static_cast<char*>(data) + i * size, part, static_cast<size_t>(count * size));
}

// Scales: the dtype is known at run time only.
inline Lanes load_floats(const void* data, qk::DType dtype, int64_t i, int64_t count) {
    switch (dtype) {
        case qk::DType::f32: return load_some<qk::DType::f32>(data, i, count);
        case qk::DType::f16: return load_some<qk::DType::f16>(data, i, count);
        default: return load_some<qk::DType::bf16>(data, i, count);
    }
}

inline void store_floats(void* data, qk::DType dtype, int64_t i, int64_t count, const Lanes& a) {
    switch (dtype) {
        case qk::DType::f32: return store_some<qk::DType::f32>(data, i, count, a);
        case qk::DType::f16: return store_some<qk::DType::f16>(data, i, count, a);
        default: return store_some<qk::DType::bf16>(data, i, count, a);
    }
}

// Lanes at or beyond `count` become zero.
inline Lanes keep_first(const Lanes& a, int64_t count) {
    if (count >= kLanes) return a;
    alignas(64) float part[kLanes];
    store(part, a);
    for (int64_t i = count; i < kLanes; ++i) part[i] = 0.0f;
    return load(part);
}

inline Lanes clamp_codes(const Lanes& q, const Lanes& top) { return min(max(q, splat(0.0f)), top); }

#ifndef QK_LANES_BLOCKS
// Four Lanes of integers 0..255.
inline void store_codes(uint8_t* p, const Lanes (&a)[4]) {
    for (int i = 0; i < 4; ++i) store_codes(p + kLanes * i, a[i]);
}

// Lane i: the largest of rows[i], all of them finite and at least +0.
inline Lanes max_of_each(const Lanes (&rows)[kLanes]) {
    alignas(64) float largest[kLanes];
    for (int i = 0; i < kLanes; ++i) largest[i] = reduce_max(rows[i]);
    return load(largest);
}

// How many of a codebook's thresholds x is above; a NaN counts as anything.
inline Lanes rank(const Codebook& book, const Lanes& x) {
    Lanes position = splat(0.0f);
    for (float threshold : book.thresholds) position = count_above(position, x, splat(threshold));
    return position;
}

// Codes of 64 quotients as 2 * B words: clamp(rint(x) + zero, 0, 2^B - 1), zero being integers 0..255.
template <int B>
inline void store_on_grid(uint32_t* words, const Lanes (&x)[4], const Lanes (&zero)[4]) {
    const Lanes top = splat(static_cast<float>((1 << B) - 1));
    Lanes q[4];
    for (int i = 0; i < 4; ++i) q[i] = clamp_codes(add(round_even(x[i]), zero[i]), top);
    alignas(64) uint8_t codes[4 * kLanes];
    store_codes(codes, q);
    pack_blocks<B>(codes, 2, words);
}

inline void store_on_book(uint32_t* words, const Lanes (&x)[4], const Codebook& book) {
    alignas(64) uint8_t codes[4 * kLanes];
    Lanes q[4];
    for (int i = 0; i < 4; ++i) q[i] = rank(book, x[i]);
    store_codes(codes, q);
    for (uint8_t& code : codes) code = static_cast<uint8_t>(book.codes[code]);
    pack_blocks<4>(codes, 2, words);
}
#endif

}  // namespace
