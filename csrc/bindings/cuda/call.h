// What the bindings of `_cuda` share: a CUDA error becomes a Python exception.
#pragma once
#include <stdint.h>

#include <stdexcept>
#include <string>

namespace qk::cuda {

int probe();
int compiled_for();
std::string error_name(int status);  // empty for 0
void set_seed(uint64_t seed);
void set_small(bool small);

inline void check(int status, const char* op) {
    if (status != 0) throw std::runtime_error(std::string("CUDA could not launch ") + op + ": " + error_name(status));
}

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace qk::cuda
