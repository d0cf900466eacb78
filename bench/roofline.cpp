// What the machine can do: loops that only read, only copy or only multiply. Compiled by roofline.py for
// the machine it runs on; no part of the package.
//
// Every function runs `threads` threads, the caller among them, and returns when all are done.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

template <class Work>
void on_threads(int threads, Work work) {
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([=] { work(t); });
    work(0);
    for (auto& other : others) other.join();
}

// Hides from the compiler what a value is, without a store: sums that are used, operands that it cannot fold.
template <class Value>
inline void hide(Value& value) {
#if defined(__x86_64__) || defined(__i386__)
    asm volatile("" : "+x"(value));
#elif defined(__ARM_NEON)
    asm volatile("" : "+w"(value));
#else
    asm volatile("" : "+m"(value));
#endif
}

// Wide registers: the line of 64 bytes in as few as the machine has.
#if defined(__AVX512F__)
using Wide = __m512i;
inline Wide load(const char* p) { return _mm512_load_si512(p); }
inline Wide mix(Wide a, Wide b) { return _mm512_xor_si512(a, b); }
inline void stream(char* p, Wide v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v); }
inline void store(char* p, Wide v) { _mm512_store_si512(p, v); }
inline Wide nothing() { return _mm512_setzero_si512(); }
#elif defined(__AVX2__)
using Wide = __m256i;
inline Wide load(const char* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
inline Wide mix(Wide a, Wide b) { return _mm256_xor_si256(a, b); }
inline void stream(char* p, Wide v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v); }
inline void store(char* p, Wide v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
inline Wide nothing() { return _mm256_setzero_si256(); }
#elif defined(__ARM_NEON)
using Wide = uint8x16_t;
inline Wide load(const char* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
inline Wide mix(Wide a, Wide b) { return veorq_u8(a, b); }
inline void store(char* p, Wide v) { vst1q_u8(reinterpret_cast<uint8_t*>(p), v); }
inline void stream(char* p, Wide v) { store(p, v); }
inline Wide nothing() { return vdupq_n_u8(0); }
#else
using Wide = uint64_t;
inline Wide load(const char* p) {
    Wide v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline Wide mix(Wide a, Wide b) { return a ^ b; }
inline void store(char* p, Wide v) { std::memcpy(p, &v, sizeof v); }
inline void stream(char* p, Wide v) { store(p, v); }
inline Wide nothing() { return 0; }
#endif
constexpr std::size_t kLine = 64, kRegisters = kLine / sizeof(Wide);

// Reads `bytes` (a multiple of 256 * Streams) as `Streams` sequences side by side.
template <int Streams, bool Prefetch>
void read_part(const char* source, std::size_t bytes) {
    constexpr std::size_t kStep = 256, kAhead = 2048;
    const std::size_t length = bytes / Streams;
    Wide sum[4];
    for (auto& s : sum) s = nothing();
    for (std::size_t i = 0; i < length; i += kStep)
        for (int s = 0; s < Streams; ++s) {
            const char* p = source + s * length + i;
            for (std::size_t line = 0; line < kStep / kLine; ++line) {
                if (Prefetch) __builtin_prefetch(p + line * kLine + kAhead, 0, 3);
                for (std::size_t r = 0; r < kRegisters; ++r)
                    sum[line] = mix(sum[line], load(p + line * kLine + r * sizeof(Wide)));
            }
        }
    Wide total = mix(mix(sum[0], sum[1]), mix(sum[2], sum[3]));
    hide(total);
}

template <bool Stream>
void copy_part(char* target, const char* source, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; i += sizeof(Wide))
        Stream ? stream(target + i, load(source + i)) : store(target + i, load(source + i));
}

// Sixteen independent chains: enough for the latency of every multiply below.
constexpr int kChains = 16;
template <class Sum, class Step>
void chains(std::int64_t rounds, Sum zero, Step step) {
    Sum sum[kChains];
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) hide(sum[c] = zero);
    for (std::int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 16
        for (int c = 0; c < kChains; ++c) sum[c] = step(sum[c]);
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) hide(sum[c]);
}

struct Peak {
    const char* name;
    double operations;  // multiplications and additions of one step of one chain
    void (*run)(std::int64_t rounds);
};

const Peak kPeaks[] = {
#if defined(__AVX512VNNI__)
        {"int8 zmm", 128,
          [](std::int64_t rounds) {
              const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
              chains(rounds, _mm512_setzero_si512(), [=](__m512i s) { return _mm512_dpbusd_epi32(s, a, b); });
          }},
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
        {"int8 ymm", 64,
          [](std::int64_t rounds) {
              const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2);
              chains(rounds, _mm256_setzero_si256(), [=](__m256i s) { return _mm256_dpbusd_epi32(s, a, b); });
          }},
#elif defined(__AVXVNNI__)
        {"int8 ymm", 64,
          [](std::int64_t rounds) {
              const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2);
              chains(rounds, _mm256_setzero_si256(), [=](__m256i s) { return _mm256_dpbusd_avx_epi32(s, a, b); });
          }},
#endif
#if defined(__AVX2__)
        // What a machine without VNNI has; widening to 32 bits can wait for several of these.
        {"int8 maddubs", 64,
          [](std::int64_t rounds) {
              const __m256i b = _mm256_set1_epi8(-2);
              __m256i a = _mm256_set1_epi8(3);
              chains(rounds, _mm256_setzero_si256(), [&](__m256i s) {
                  hide(a);  // or the product would be taken out of the loop
                  return _mm256_add_epi16(s, _mm256_maddubs_epi16(a, b));
              });
          }},
#endif
#if defined(__AVX512BF16__)
        {"bf16", 64,
          [](std::int64_t rounds) {
              const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.5f), _mm512_set1_ps(0.5f));
              chains(rounds, _mm512_setzero_ps(), [=](__m512 s) { return _mm512_dpbf16_ps(s, a, a); });
          }},
#endif
#if defined(__AVX512F__)
        {"fp32", 32,
          [](std::int64_t rounds) {
              const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.5f);
              chains(rounds, _mm512_setzero_ps(), [=](__m512 s) { return _mm512_fmadd_ps(s, a, b); });
          }},
#elif defined(__FMA__)
        {"fp32", 16,
          [](std::int64_t rounds) {
              const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.5f);
              chains(rounds, _mm256_setzero_ps(), [=](__m256 s) { return _mm256_fmadd_ps(s, a, b); });
          }},
#elif defined(__ARM_NEON)
        {"fp32", 8,
          [](std::int64_t rounds) {
              const float32x4_t a = vdupq_n_f32(0.5f), b = vdupq_n_f32(1.5f);
              chains(rounds, vdupq_n_f32(0), [=](float32x4_t s) { return vfmaq_f32(b, s, a); });
          }},
#else
        {"fp32", 2,
          [](std::int64_t rounds) { chains(rounds, 0.0f, [](float s) { return s * 0.5f + 1.5f; }); }},
#endif
#if defined(__ARM_FEATURE_DOTPROD)
        {"int8 dotprod", 32,
          [](std::int64_t rounds) {
              const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(-2);
              chains(rounds, vdupq_n_s32(0), [=](int32x4_t s) { return vdotq_s32(s, a, b); });
          }},
#elif defined(__ARM_NEON)
        {"int8 mlal", 16,
          [](std::int64_t rounds) {
              const int8x8_t a = vdup_n_s8(3), b = vdup_n_s8(-2);
              chains(rounds, vdupq_n_s16(0), [=](int16x8_t s) { return vmlal_s8(s, a, b); });
          }},
#endif
};

}  // namespace

extern "C" {

// `bytes` is a multiple of 4096 * threads and both addresses of 64. Patterns: 0 one sequence a thread, 1 four
// side by side, 2 four with prefetches, 3 eight, 4 sixteen.
void roofline_read(const char* source, std::size_t bytes, int threads, int pattern) {
    on_threads(threads, [=](int t) {
        const std::size_t part = bytes / threads;
        const char* begin = source + t * part;
        if (pattern == 0) read_part<1, false>(begin, part);
        if (pattern == 1) read_part<4, false>(begin, part);
        if (pattern == 2) read_part<4, true>(begin, part);
        if (pattern == 3) read_part<8, false>(begin, part);
        if (pattern == 4) read_part<16, false>(begin, part);
    });
}

void roofline_copy(char* target, const char* source, std::size_t bytes, int threads, int streaming) {
    on_threads(threads, [=](int t) {
        const std::size_t part = bytes / threads;
        if (streaming)
            copy_part<true>(target + t * part, source + t * part, part);
        else
            copy_part<false>(target + t * part, source + t * part, part);
    });
}

int roofline_peaks() { return sizeof kPeaks / sizeof kPeaks[0]; }
const char* roofline_peak_name(int which) { return kPeaks[which].name; }

// Operations done: that of `rounds` rounds in each thread.
double roofline_peak(int which, std::int64_t rounds, int threads) {
    on_threads(threads, [=](int) { kPeaks[which].run(rounds); });
    return kPeaks[which].operations * kChains * static_cast<double>(rounds) * threads;
}
}
