#include <pybind11/pybind11.h>

#include <atomic>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/parallel.h"

namespace py = pybind11;

void bind_gguf_encode(py::module_& module) {
    module.def(
        "gguf_encode",
        [](int type, uintptr_t x, uintptr_t importance, uintptr_t out, int64_t rows, int64_t K, int threads) {
            const auto kernel = qk::kernels().gguf_encode;
            // A block's scale is searched for among about sixteen candidates.
            constexpr int64_t kCandidates = 16;
            std::atomic<bool> finite{true};
            {
                py::gil_scoped_release release;
                qk::parallel_for(rows, 1, kCandidates * K, threads, [&](int64_t begin, int64_t end) {
                    const auto status = kernel(static_cast<qk::GgufType>(type), reinterpret_cast<const float*>(x),
                                               reinterpret_cast<const float*>(importance),
                                               reinterpret_cast<uint8_t*>(out), K, begin, end);
                    if (status != qk::Status::ok) finite.store(false, std::memory_order_relaxed);
                });
            }
            return finite.load();
        },
        py::arg("type"), py::arg("x"), py::arg("importance"), py::arg("out"), py::arg("rows"), py::arg("K"),
        py::arg("threads"), "Encode rows to GGUF blocks; False if a value is not finite or beyond fp16 scales.");
}
