#include <pybind11/pybind11.h>

#include <atomic>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/parallel.h"

namespace py = pybind11;

void bind_quantize_groupwise(py::module_& module) {
    module.def(
        "quantize_groupwise",
        [](uintptr_t weight, int dtype, int64_t N, int64_t K, int64_t row_stride, int64_t group_size, int bits,
           bool asymmetric, int scale_dtype, uintptr_t codes, uintptr_t scales, uintptr_t zeros, int threads) {
            qk::QuantizeArgs args{};
            args.weight = reinterpret_cast<const void*>(weight);
            args.dtype = static_cast<qk::DType>(dtype);
            args.row_stride = row_stride;
            args.K = K;
            args.group_size = group_size;
            args.bits = bits;
            args.asymmetric = asymmetric;
            args.scale_dtype = static_cast<qk::DType>(scale_dtype);
            args.codes = reinterpret_cast<uint32_t*>(codes);
            args.code_words = (K * bits + 31) / 32;
            args.scales = reinterpret_cast<void*>(scales);
            args.zeros = reinterpret_cast<uint8_t*>(zeros);
            const auto kernel = qk::kernels().quantize_groupwise;
            std::atomic<bool> finite{true};
            {
                py::gil_scoped_release release;
                qk::parallel_for(N, 8, threads, [&](int64_t begin, int64_t end) {
                    if (kernel(args, begin, end) != qk::Status::ok) finite.store(false, std::memory_order_relaxed);
                });
            }
            return finite.load();
        },
        py::arg("weight"), py::arg("dtype"), py::arg("N"), py::arg("K"), py::arg("row_stride"),
        py::arg("group_size"), py::arg("bits"), py::arg("asymmetric"), py::arg("scale_dtype"), py::arg("codes"),
        py::arg("scales"), py::arg("zeros"), py::arg("threads"),
        "Quantize rows to codes, scales and zeros; False if a weight is NaN or Inf.");
}
