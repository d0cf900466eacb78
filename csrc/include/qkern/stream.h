// Stores that pass the caches by, for results that do not fit in them: a line is then not read before it is
// written. The including tier's flags choose the instructions; elsewhere these are plain copies.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// A result of this many bytes is streamed: the next to read it would not find it in a core's own cache.
constexpr int64_t kStreamedBytes = int64_t{1} << 22;

inline bool whole_lines(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 63) == 0; }

// Into the second cache: lines a power of two apart have more room there.
inline void fetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

// A line at an aligned address from anywhere.
inline void stream_line(void* to, const void* from) {
#if defined(__AVX512F__)
    _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
    for (int i = 0; i < 2; ++i) {
        _mm256_stream_si256(static_cast<__m256i*>(to) + i, _mm256_loadu_si256(static_cast<const __m256i*>(from) + i));
    }
#elif defined(__SSE2__)
    for (int i = 0; i < 4; ++i) {
        _mm_stream_si128(static_cast<__m128i*>(to) + i, _mm_loadu_si128(static_cast<const __m128i*>(from) + i));
    }
#else
    memcpy(to, from, 64);
#endif
}

// Whole lines of `to` are streamed when asked to; its ends, and everything else, are copied.
inline void copy_out(void* to, const void* from, int64_t bytes, bool streamed) {
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
    if (streamed && whole_lines(out)) {
        for (; bytes >= 64; bytes -= 64, out += 64, in += 64) stream_line(out, in);
    }
    memcpy(out, in, static_cast<size_t>(bytes));
}

// After the last streamed store, before anybody else reads.
inline void end_stream() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace
