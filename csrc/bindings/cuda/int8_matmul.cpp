#include <pybind11/pybind11.h>

#include "call.h"
#include "linear.h"
#include "qkern/cuda/kernels.h"

namespace py = pybind11;

namespace {

using qk::cuda::check;
using qk::cuda::Linear;
using qk::cuda::pointer;

qk::cuda::Int8Output output_of(uintptr_t x_scales, uintptr_t x_sums, uintptr_t bias, int bias_dtype, uintptr_t out,
                               int dtype) {
    qk::cuda::Int8Output output{};
    output.x_scales = static_cast<const float*>(pointer(x_scales));
    output.x_sums = static_cast<const float*>(pointer(x_sums));
    output.bias = pointer(bias);
    output.bias_dtype = static_cast<qk::DType>(bias_dtype);
    output.out = pointer(out);
    output.dtype = static_cast<qk::DType>(dtype);
    return output;
}

}  // namespace

void bind_cuda_int8_matmul(py::module_& module) {
    module.def(
        "int8_matmul",
        [](const Linear& linear, uintptr_t x, int64_t M, int64_t K, int64_t x_stride, uintptr_t x_zeros,
           uintptr_t partials, int64_t segment_tiles, int segments, int splits, uintptr_t x_scales, uintptr_t x_sums,
           uintptr_t bias, int bias_dtype, uintptr_t out, int dtype, uintptr_t stream) {
            qk::cuda::Int8MatmulArgs args{};
            args.weight = linear.weight;
            args.x = static_cast<const int8_t*>(pointer(x));
            args.M = M;
            args.K = K;
            args.x_stride = x_stride;
            args.x_zeros = static_cast<const int8_t*>(pointer(x_zeros));
            args.output = output_of(x_scales, x_sums, bias, bias_dtype, out, dtype);
            args.partials = static_cast<int32_t*>(pointer(partials));
            args.segment_tiles = segment_tiles;
            args.segments = segments;
            args.splits = splits;
            check(qk::cuda::int8_matmul(args, pointer(stream)), "int8_matmul");
        },
        py::arg("weight"), py::arg("x"), py::arg("M"), py::arg("K"), py::arg("x_stride"), py::arg("x_zeros"),
        py::arg("partials"), py::arg("segment_tiles"), py::arg("segments"), py::arg("splits"), py::arg("x_scales"),
        py::arg("x_sums"), py::arg("bias"), py::arg("bias_dtype"), py::arg("out"), py::arg("dtype"), py::arg("stream"),
        "Rows of int8 by a weight of 8 bits: scaled, or, where x_scales is 0, the int32 sums.");
    module.def(
        "scale_sums",
        [](const Linear& linear, uintptr_t sums, int64_t sums_stride, int segments, int64_t M, int64_t first_row,
           int64_t rows, uintptr_t x_zeros, uintptr_t activations, uintptr_t codes, uintptr_t x_scales, uintptr_t x_sums,
           uintptr_t bias, int bias_dtype, uintptr_t out, int dtype, uintptr_t stream) {
            qk::cuda::ScaleSumsArgs args{};
            args.sums = static_cast<const int32_t*>(pointer(sums));
            args.sums_stride = sums_stride;
            args.segments = segments;
            args.splits = 1;
            args.weight = linear.weight;
            args.M = M;
            args.first_row = first_row;
            args.rows = rows;
            args.x_zeros = static_cast<const int8_t*>(pointer(x_zeros));
            args.activations = static_cast<const int32_t*>(pointer(activations));
            args.codes = static_cast<const int32_t*>(pointer(codes));
            args.output = output_of(x_scales, x_sums, bias, bias_dtype, out, dtype);
            check(qk::cuda::scale_sums(args, pointer(stream)), "the scaling of int8_matmul");
        },
        py::arg("weight"), py::arg("sums"), py::arg("sums_stride"), py::arg("segments"), py::arg("M"),
        py::arg("first_row"), py::arg("rows"), py::arg("x_zeros"), py::arg("activations"), py::arg("codes"),
        py::arg("x_scales"), py::arg("x_sums"), py::arg("bias"), py::arg("bias_dtype"), py::arg("out"),
        py::arg("dtype"), py::arg("stream"),
        "int32 sums of a few rows of the weight to results.");
    module.def(
        "decode_codes",
        [](const Linear& linear, int64_t first_row, int64_t rows, uintptr_t out, uintptr_t stream) {
            const qk::cuda::DecodeCodesArgs args{linear.weight, first_row, rows, static_cast<int8_t*>(pointer(out))};
            check(qk::cuda::decode_codes(args, pointer(stream)), "the decoding of codes");
        },
        py::arg("weight"), py::arg("first_row"), py::arg("rows"), py::arg("out"), py::arg("stream"),
        "Rows of a weight of 8 bits as q - 128, whole panels and tiles.");
}
