#include <pybind11/pybind11.h>

#include <atomic>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/parallel.h"
#include "qkern/stream.h"

namespace py = pybind11;

void bind_quantize_groupwise(py::module_& module) {
    module.def(
        "quantize_groupwise",
        [](uintptr_t weight, int dtype, int64_t N, int64_t K, int64_t row_stride, int64_t group_size, int64_t groups,
           int bits, bool asymmetric, int codebook, bool search_mse, uintptr_t importance, int64_t importance_stride,
           int scale_dtype, uintptr_t scales, uintptr_t zeros, bool grid_given, int64_t rows_per_grid,
           uintptr_t codes, int threads) {
            qk::QuantizeArgs args{};
            args.weight = reinterpret_cast<const void*>(weight);
            args.dtype = static_cast<qk::DType>(dtype);
            args.row_stride = row_stride;
            args.K = K;
            args.group_size = group_size;
            args.groups = groups;
            args.bits = bits;
            args.asymmetric = asymmetric;
            args.codebook = codebook;
            args.search_mse = search_mse;
            args.importance = reinterpret_cast<const float*>(importance);
            args.importance_stride = importance_stride;
            args.scale_dtype = static_cast<qk::DType>(scale_dtype);
            args.scales = reinterpret_cast<void*>(scales);
            args.zeros = reinterpret_cast<uint8_t*>(zeros);
            args.grid_given = grid_given;
            args.rows_per_grid = rows_per_grid;
            args.codes = reinterpret_cast<uint32_t*>(codes);
            args.code_words = (K * bits + 31) / 32;
            args.streamed = N * args.code_words * 4 >= kStreamedBytes;
            const auto kernel = qk::kernels().quantize_groupwise;
            // The search fits every group to about sixty-four grids.
            const int64_t row_work = search_mse && !grid_given ? 64 * K : K;
            std::atomic<int> worst{0};
            {
                py::gil_scoped_release release;
                qk::parallel_for(N, 1, row_work, threads, [&](int64_t begin, int64_t end) {
                    const auto status = static_cast<int>(kernel(args, begin, end));
                    if (status != 0) worst.store(status, std::memory_order_relaxed);
                });
            }
            return worst.load();
        },
        py::arg("weight"), py::arg("dtype"), py::arg("N"), py::arg("K"), py::arg("row_stride"),
        py::arg("group_size"), py::arg("groups"), py::arg("bits"), py::arg("asymmetric"), py::arg("codebook"),
        py::arg("search_mse"), py::arg("importance"), py::arg("importance_stride"), py::arg("scale_dtype"),
        py::arg("scales"), py::arg("zeros"), py::arg("grid_given"), py::arg("rows_per_grid"), py::arg("codes"),
        py::arg("threads"), "Quantize rows to codes, scales and zeros; returns a qk::Status.");
}
