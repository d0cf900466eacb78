// Runs a kernel over a range of rows on several threads.
#pragma once
#include <stdint.h>

#include <type_traits>

namespace qk {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Less work than this is not worth a thread: about what waking one costs.
constexpr int64_t kPieceWork = int64_t{1} << 15;

// Calls fn over [0, total) in pieces that start at multiples of `unit`, on at most `threads` threads:
// torch's OpenMP pool when this process has one, else a small pool of our own. `work` is what one index
// costs, counted in elements that are loaded, computed on and stored once; a piece has at least kPieceWork
// of them. Serial when threads is 1, when the range is one piece, inside a parallel region, in a forked
// child, and when another call holds the pool. fn must not throw.
void parallel_for(int64_t total, int64_t unit, int64_t work, int threads, RangeFn fn, void* context);

// Which pool parallel_for would use: "gomp", "kmp" or "own".
const char* pool_name();

template <class F>
void parallel_for(int64_t total, int64_t unit, int64_t work, int threads, F&& body) {
    using Body = std::remove_reference_t<F>;
    parallel_for(
        total, unit, work, threads,
        [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

}  // namespace qk
