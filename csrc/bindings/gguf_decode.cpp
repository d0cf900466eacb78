#include <pybind11/pybind11.h>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/parallel.h"

namespace py = pybind11;

void bind_gguf_decode(py::module_& module) {
    module.def(
        "gguf_decode",
        [](int type, uintptr_t raw, uintptr_t out, int64_t rows, int64_t K, int threads) {
            const auto kernel = qk::kernels().gguf_decode;
            py::gil_scoped_release release;
            qk::parallel_for(rows, 1, K, threads, [&](int64_t begin, int64_t end) {
                kernel(static_cast<qk::GgufType>(type), reinterpret_cast<const uint8_t*>(raw),
                       reinterpret_cast<float*>(out), K, begin, end);
            });
        },
        py::arg("type"), py::arg("raw"), py::arg("out"), py::arg("rows"), py::arg("K"), py::arg("threads"),
        "Decode rows of GGUF blocks.");
}
