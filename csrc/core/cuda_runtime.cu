// What _cuda asks of the CUDA runtime beside launching.
#include <string>

#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {
QK_KERNEL void nothing() {}
}  // namespace

#if defined(__CUDACC__)

int probe() {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, nothing);
    if (status != cudaSuccess) cudaGetLastError();  // not to be met by the next call
    return status;
}

int compiled_for() {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, nothing) == cudaSuccess ? attributes.ptxVersion : 0;
}

std::string error_name(int status) {
    if (status == 0) return "";
    const auto error = static_cast<cudaError_t>(status);
    return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

#else

int compiled_for() { return 90; }

int probe() { return gpu::launch(gpu::Launch{dim3(1), 32}, nothing); }

std::string error_name(int status) {
    if (status == gpu::kErrorBadLaunch) return "a launch that no device takes";
    if (status == gpu::kErrorDeadlock) return "threads wait for others that do not come";
    return "";
}

void set_seed(uint64_t seed) { gpu::emulator().seed = seed; }
void set_small(bool small) { gpu::emulator().small = small; }

#endif

}  // namespace qk::cuda
