#include <pybind11/pybind11.h>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/parallel.h"

namespace py = pybind11;

void bind_quantize_activations(py::module_& module) {
    module.def(
        "quantize_activations",
        [](uintptr_t x, int dtype, int64_t M, int64_t K, int64_t row_stride, int64_t group_size, uintptr_t scale,
           int zero, uintptr_t codes, uintptr_t scales, int threads) {
            qk::QuantizeActivationsArgs args{};
            args.x = reinterpret_cast<const void*>(x);
            args.dtype = static_cast<qk::DType>(dtype);
            args.row_stride = row_stride;
            args.K = K;
            args.group_size = group_size;
            args.scale = reinterpret_cast<const float*>(scale);
            args.zero = zero;
            args.codes = reinterpret_cast<int8_t*>(codes);
            args.scales = reinterpret_cast<float*>(scales);
            const auto kernel = qk::kernels().quantize_activations;
            py::gil_scoped_release release;
            qk::parallel_for(M, 1, K, threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        },
        py::arg("x"), py::arg("dtype"), py::arg("M"), py::arg("K"), py::arg("row_stride"), py::arg("group_size"),
        py::arg("scale"), py::arg("zero"), py::arg("codes"), py::arg("scales"), py::arg("threads"),
        "Rows to int8 codes and f32 scales, a scale every group_size columns or one given for all.");
}
