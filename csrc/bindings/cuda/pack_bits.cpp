#include <pybind11/pybind11.h>

#include "call.h"
#include "qkern/cuda/kernels.h"

namespace py = pybind11;

namespace {

using qk::cuda::check;
using qk::cuda::pointer;

qk::cuda::PackBitsArgs pack_args(uintptr_t codes, int64_t codes_stride, int64_t N, int64_t K, int bits, int layout,
                                 uintptr_t packed, uintptr_t flag) {
    qk::cuda::PackBitsArgs args{};
    args.codes = static_cast<uint8_t*>(pointer(codes));
    args.codes_stride = codes_stride;
    args.N = N;
    args.K = K;
    args.bits = bits;
    args.layout = static_cast<qk::BitLayout>(layout);
    args.packed = static_cast<uint32_t*>(pointer(packed));
    args.flag = static_cast<int*>(pointer(flag));
    return args;
}

}  // namespace

void bind_cuda_pack_bits(py::module_& module) {
    module.def(
        "pack_bits",
        [](uintptr_t codes, int64_t codes_stride, int64_t N, int64_t K, int bits, int layout, uintptr_t packed,
           uintptr_t flag, uintptr_t stream) {
            const auto args = pack_args(codes, codes_stride, N, K, bits, layout, packed, flag);
            check(qk::cuda::pack_bits(args, pointer(stream)), "pack_bits");
        },
        py::arg("codes"), py::arg("codes_stride"), py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("layout"),
        py::arg("packed"), py::arg("flag"), py::arg("stream"),
        "Codes, one to a byte, to words of a layout; the flag becomes 1 if a code does not fit.");
    module.def(
        "unpack_bits",
        [](uintptr_t codes, int64_t codes_stride, int64_t N, int64_t K, int bits, int layout, uintptr_t packed,
           uintptr_t stream) {
            const auto args = pack_args(codes, codes_stride, N, K, bits, layout, packed, 0);
            check(qk::cuda::unpack_bits(args, pointer(stream)), "unpack_bits");
        },
        py::arg("codes"), py::arg("codes_stride"), py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("layout"),
        py::arg("packed"), py::arg("stream"), "Words of a layout to codes, one to a byte.");
}
