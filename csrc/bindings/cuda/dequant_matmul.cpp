#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "call.h"
#include "linear.h"
#include "qkern/cuda/kernels.h"

namespace py = pybind11;

namespace {

using qk::cuda::check;
using qk::cuda::Linear;
using qk::cuda::pointer;

}  // namespace

void bind_cuda_dequant_matmul(py::module_& module) {
    module.attr("FEW_TOKENS") = qk::cuda::kFewTokens;
    module.attr("MATMUL_TOKENS") = qk::cuda::kMatmulTokens;
    // Local: the emulated module of the tests has the same type.
    py::class_<Linear>(module, "Linear", py::module_local(),
                       "A weight in the layout cuda.m64, on the device; the caller keeps its memory.")
        .def(py::init([](uintptr_t codes, uintptr_t scales, uintptr_t shifts, int64_t N, int64_t groups,
                         int64_t group_columns, int bits, int shift, int scale_dtype, uintptr_t table,
                         std::array<std::array<uint32_t, 8>, 2> tables) {
                 Linear linear{};
                 linear.weight.codes = static_cast<const uint8_t*>(pointer(codes));
                 linear.weight.scales = pointer(scales);
                 linear.weight.shifts = pointer(shifts);
                 linear.weight.N = N;
                 linear.weight.groups = groups;
                 linear.weight.group_columns = group_columns;
                 linear.weight.bits = bits;
                 linear.weight.shift = static_cast<qk::cuda::Shift>(shift);
                 linear.weight.scale_dtype = static_cast<qk::DType>(scale_dtype);
                 linear.weight.codebook = table != 0;
                 linear.table = table;
                 linear.tables = tables;
                 return linear;
             }),
             py::arg("codes"), py::arg("scales"), py::arg("shifts"), py::arg("N"), py::arg("groups"),
             py::arg("group_columns"), py::arg("bits"), py::arg("shift"), py::arg("scale_dtype"), py::arg("table"),
             py::arg("tables"))
        .def(
            "__call__",
            [](const Linear& linear, uintptr_t x, int dtype, int64_t M, int64_t K, int64_t x_stride, uintptr_t bias,
               int bias_dtype, uintptr_t out, uintptr_t partials, int splits, uintptr_t stream) {
                qk::cuda::MatmulArgs args{};
                args.weight = linear.weight;
                args.dtype = static_cast<qk::DType>(dtype);
                const auto& table = linear.tables[args.dtype == qk::DType::f16 ? 0 : 1];
                for (size_t i = 0; i < table.size(); ++i) args.weight.table[i] = table[i];
                args.x = pointer(x);
                args.M = M;
                args.K = K;
                args.x_stride = x_stride;
                args.bias = pointer(bias);
                args.bias_dtype = static_cast<qk::DType>(bias_dtype);
                args.out = pointer(out);
                args.partials = static_cast<float*>(pointer(partials));
                args.splits = splits;
                check(qk::cuda::dequant_matmul(args, pointer(stream)), "dequant_matmul");
            },
            py::arg("x"), py::arg("dtype"), py::arg("M"), py::arg("K"), py::arg("x_stride"), py::arg("bias"),
            py::arg("bias_dtype"), py::arg("out"), py::arg("partials"), py::arg("splits"), py::arg("stream"),
            "out = x @ W.T + bias for at most MATMUL_TOKENS rows of x; of a weight with offsets FEW_TOKENS.")
        .def(
            "decode",
            [](const Linear& linear, uintptr_t out, int dtype, int64_t first_row, int64_t rows, uintptr_t stream) {
                qk::cuda::DecodeArgs args{};
                args.weight = linear.weight;
                args.table = static_cast<const float*>(pointer(linear.table));
                args.first_row = first_row;
                args.rows = rows;
                args.out = pointer(out);
                args.dtype = static_cast<qk::DType>(dtype);
                check(qk::cuda::decode_weight(args, pointer(stream)), "the decoding of a weight");
            },
            py::arg("out"), py::arg("dtype"), py::arg("first_row"), py::arg("rows"), py::arg("stream"),
            "Rows of the weight as floats, in the layout's order of columns.");
    module.def(
        "gather_columns",
        [](uintptr_t x, int64_t M, int64_t K, int64_t x_stride, uintptr_t columns, int64_t padded, uintptr_t out,
           uintptr_t stream) {
            const qk::cuda::GatherArgs args{pointer(x), M, K, x_stride, static_cast<const int32_t*>(pointer(columns)),
                                            padded, pointer(out)};
            check(qk::cuda::gather_columns(args, pointer(stream)), "gather_columns");
        },
        py::arg("x"), py::arg("M"), py::arg("K"), py::arg("x_stride"), py::arg("columns"), py::arg("padded"),
        py::arg("out"), py::arg("stream"),
        "out[m, i] = x[m, columns[i]] for 2-byte items, zero where that is -1; columns 0: their own order.");
}
