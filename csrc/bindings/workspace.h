// Memory that a call needs while it runs.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <memory>

namespace qk {

// Activations are prepared in pieces of this size, so that a long prompt does not need a copy of itself.
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

// At least `bytes` at a multiple of 64. Grows, never shrinks, one a thread: a call does not allocate once the
// largest shape has been seen.
inline char* workspace(size_t bytes) {
    thread_local std::unique_ptr<char[]> buffer;
    thread_local size_t size = 0;
    if (bytes + 64 > size) {
        buffer.reset();
        size = 0;
        buffer.reset(new char[bytes + 64]);
        size = bytes + 64;
    }
    const auto at = reinterpret_cast<uintptr_t>(buffer.get());
    return reinterpret_cast<char*>((at + 63) / 64 * 64);
}

}  // namespace qk
