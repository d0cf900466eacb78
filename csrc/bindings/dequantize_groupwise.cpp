#include <pybind11/pybind11.h>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/parallel.h"
#include "qkern/stream.h"

namespace py = pybind11;

void bind_dequantize_groupwise(py::module_& module) {
    module.def(
        "dequantize_groupwise",
        [](uintptr_t codes, int64_t begin, int64_t end, int64_t K, int64_t group_size, int64_t groups, int bits,
           int codebook, int scale_dtype, uintptr_t scales, uintptr_t zeros, uintptr_t offsets, uintptr_t group_index,
           int64_t rows_per_scale, int out_dtype, uintptr_t out, int64_t out_stride, int threads) {
            qk::DequantizeArgs args{};
            args.codes = reinterpret_cast<const uint32_t*>(codes);
            args.code_words = (K * bits + 31) / 32;
            args.K = K;
            args.group_size = group_size;
            args.groups = groups;
            args.bits = bits;
            args.codebook = codebook;
            args.scale_dtype = static_cast<qk::DType>(scale_dtype);
            args.scales = reinterpret_cast<const void*>(scales);
            args.zeros = reinterpret_cast<const uint8_t*>(zeros);
            args.offsets = reinterpret_cast<const void*>(offsets);
            args.group_index = reinterpret_cast<const int32_t*>(group_index);
            args.rows_per_scale = rows_per_scale;
            args.out_dtype = static_cast<qk::DType>(out_dtype);
            args.out = reinterpret_cast<void*>(out);
            args.out_stride = out_stride;
            args.first_row = begin;
            args.streamed = (end - begin) * K * (args.out_dtype == qk::DType::f32 ? 4 : 2) >= kStreamedBytes;
            const auto kernel = qk::kernels().dequantize_groupwise;
            py::gil_scoped_release release;
            qk::parallel_for(end - begin, 1, K, threads,
                             [&](int64_t from, int64_t to) { kernel(args, begin + from, begin + to); });
        },
        py::arg("codes"), py::arg("begin"), py::arg("end"), py::arg("K"), py::arg("group_size"), py::arg("groups"),
        py::arg("bits"), py::arg("codebook"), py::arg("scale_dtype"), py::arg("scales"), py::arg("zeros"),
        py::arg("offsets"), py::arg("group_index"), py::arg("rows_per_scale"), py::arg("out_dtype"), py::arg("out"),
        py::arg("out_stride"), py::arg("threads"),
        "Write rows [begin, end) of a quantized weight to out, rows out_stride elements apart.");
}
