#include <pybind11/pybind11.h>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/parallel.h"

namespace py = pybind11;

void bind_gptq_update(py::module_& module) {
    module.attr("GPTQ_MAX_COLUMNS") = qk::kGptqMaxColumns;
    module.def(
        "gptq_update",
        [](uintptr_t weight, int64_t weight_stride, int64_t N, int64_t B, uintptr_t hinv, uintptr_t scales,
           uintptr_t zeros, int64_t groups, uintptr_t group_index, int bits, int codebook, uintptr_t codes,
           uintptr_t errors, int threads) {
            qk::GptqArgs args{};
            args.weight = reinterpret_cast<const float*>(weight);
            args.weight_stride = weight_stride;
            args.B = B;
            args.hinv = reinterpret_cast<const float*>(hinv);
            args.scales = reinterpret_cast<const float*>(scales);
            args.zeros = reinterpret_cast<const uint8_t*>(zeros);
            args.groups = groups;
            args.group_index = reinterpret_cast<const int32_t*>(group_index);
            args.bits = bits;
            args.codebook = codebook;
            args.codes = reinterpret_cast<uint8_t*>(codes);
            args.errors = reinterpret_cast<float*>(errors);
            const auto kernel = qk::kernels().gptq_update;
            py::gil_scoped_release release;
            // Sixteen rows side by side; every column corrects those behind it.
            qk::parallel_for(N, 16, (B + 1) * B / 2, threads,
                             [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        },
        py::arg("weight"), py::arg("weight_stride"), py::arg("N"), py::arg("B"), py::arg("hinv"), py::arg("scales"),
        py::arg("zeros"), py::arg("groups"), py::arg("group_index"), py::arg("bits"), py::arg("codebook"),
        py::arg("codes"), py::arg("errors"), py::arg("threads"),
        "Quantize the columns of a block one by one, spreading each column's error over those behind it.");
}
