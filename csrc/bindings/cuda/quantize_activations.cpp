#include <pybind11/pybind11.h>

#include "call.h"
#include "qkern/cuda/kernels.h"

namespace py = pybind11;

void bind_cuda_quantize_activations(py::module_& module) {
    module.def(
        "quantize_activations",
        [](uintptr_t x, int dtype, int64_t M, int64_t K, int64_t x_stride, int64_t group_size, int64_t groups,
           uintptr_t scale, int zero, uintptr_t codes, uintptr_t scales, uintptr_t stream) {
            using qk::cuda::pointer;
            qk::cuda::QuantizeActivationsArgs args{};
            args.x = pointer(x);
            args.dtype = static_cast<qk::DType>(dtype);
            args.M = M;
            args.K = K;
            args.x_stride = x_stride;
            args.group_size = group_size;
            args.groups = groups;
            args.scale = static_cast<const float*>(pointer(scale));
            args.zero = zero;
            args.codes = static_cast<int8_t*>(pointer(codes));
            args.scales = static_cast<float*>(pointer(scales));
            qk::cuda::check(qk::cuda::quantize_activations(args, pointer(stream)), "quantize_activations");
        },
        py::arg("x"), py::arg("dtype"), py::arg("M"), py::arg("K"), py::arg("x_stride"), py::arg("group_size"),
        py::arg("groups"), py::arg("scale"), py::arg("zero"), py::arg("codes"), py::arg("scales"), py::arg("stream"),
        "Rows of floats to int8 and a scale a group; or with the scale that is given.");
}
