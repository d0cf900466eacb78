#include <pybind11/pybind11.h>

#include "call.h"
#include "qkern/cuda/kernels.h"

namespace py = pybind11;

using qk::cuda::pointer;

void bind_cuda_gptq_update(py::module_& module) {
    module.def(
        "gptq_update",
        [](uintptr_t weight, int64_t weight_stride, int64_t N, int64_t B, uintptr_t hinv, uintptr_t scales,
           uintptr_t zeros, int64_t groups, uintptr_t group_index, int bits, int codebook, uintptr_t codes,
           int64_t codes_stride, uintptr_t errors, uintptr_t losses, uintptr_t stream, bool narrow) {
            qk::cuda::GptqUpdateArgs args{};
            args.weight = static_cast<const float*>(pointer(weight));
            args.weight_stride = weight_stride;
            args.N = N;
            args.B = B;
            args.hinv = static_cast<const float*>(pointer(hinv));
            args.scales = static_cast<const float*>(pointer(scales));
            args.zeros = static_cast<const uint8_t*>(pointer(zeros));
            args.groups = groups;
            args.group_index = static_cast<const int32_t*>(pointer(group_index));
            args.bits = bits;
            args.codebook = codebook;
            args.codes = static_cast<uint8_t*>(pointer(codes));
            args.codes_stride = codes_stride;
            args.errors = static_cast<float*>(pointer(errors));
            args.losses = static_cast<float*>(pointer(losses));
            args.narrow = narrow;
            qk::cuda::check(qk::cuda::gptq_update(args, pointer(stream)), "gptq_update");
        },
        py::arg("weight"), py::arg("weight_stride"), py::arg("N"), py::arg("B"), py::arg("hinv"), py::arg("scales"),
        py::arg("zeros"), py::arg("groups"), py::arg("group_index"), py::arg("bits"), py::arg("codebook"),
        py::arg("codes"), py::arg("codes_stride"), py::arg("errors"), py::arg("losses"), py::arg("stream"),
        py::arg("narrow") = false,
        "Codes and errors of one column block of GPTQ; losses: 0, or the squared error of each row.");
}
