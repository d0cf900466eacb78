#include <pybind11/pybind11.h>

#include "call.h"
#include "qkern/cuda/kernels.h"

namespace py = pybind11;

void bind_cuda_dequantize_groupwise(py::module_& module) {
    module.def(
        "dequantize_groupwise",
        [](uintptr_t codes, int64_t rows, int64_t K, int64_t group_size, int64_t groups, int bits, uintptr_t table,
           int scale_dtype, uintptr_t scales, uintptr_t zeros, uintptr_t offsets, uintptr_t group_index,
           int64_t rows_per_scale, uintptr_t out, int out_dtype, int64_t out_stride, uintptr_t stream) {
            using qk::cuda::pointer;
            qk::cuda::DequantizeArgs args{};
            args.codes = static_cast<const uint32_t*>(pointer(codes));
            args.code_words = (K * bits + 31) / 32;
            args.rows = rows;
            args.K = K;
            args.group_size = group_size;
            args.groups = groups;
            args.bits = bits;
            args.table = static_cast<const float*>(pointer(table));
            args.scale_dtype = static_cast<qk::DType>(scale_dtype);
            args.scales = pointer(scales);
            args.zeros = static_cast<const uint8_t*>(pointer(zeros));
            args.offsets = pointer(offsets);
            args.group_index = static_cast<const int32_t*>(pointer(group_index));
            args.rows_per_scale = rows_per_scale;
            args.out = pointer(out);
            args.out_dtype = static_cast<qk::DType>(out_dtype);
            args.out_stride = out_stride;
            qk::cuda::check(qk::cuda::dequantize_groupwise(args, pointer(stream)), "dequantize_groupwise");
        },
        py::arg("codes"), py::arg("rows"), py::arg("K"), py::arg("group_size"), py::arg("groups"), py::arg("bits"),
        py::arg("table"), py::arg("scale_dtype"), py::arg("scales"), py::arg("zeros"), py::arg("offsets"),
        py::arg("group_index"), py::arg("rows_per_scale"), py::arg("out"), py::arg("out_dtype"), py::arg("out_stride"),
        py::arg("stream"), "Rows of codes to floats.");
}
