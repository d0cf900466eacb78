#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <vector>

#include "call.h"
#include "qkern/cuda/kernels.h"

namespace py = pybind11;

void bind_cuda_quantize_groupwise(py::module_& module) {
    module.def(
        "quantize_groupwise",
        [](uintptr_t weight, int dtype, int64_t N, int64_t K, int64_t row_stride, int64_t group_size, int64_t groups,
           int bits, bool asymmetric, const std::vector<float>& ordered, const std::vector<float>& thresholds,
           const std::vector<int>& codebook_codes, bool search_mse, uintptr_t importance, int64_t importance_stride,
           int scale_dtype, uintptr_t scales, uintptr_t zeros, bool grid_given, int64_t rows_per_grid, uintptr_t codes,
           uintptr_t flags, uintptr_t stream) {
            using qk::cuda::pointer;
            qk::cuda::QuantizeArgs args{};
            args.weight = pointer(weight);
            args.dtype = static_cast<qk::DType>(dtype);
            args.rows = N;
            args.row_stride = row_stride;
            args.K = K;
            args.group_size = group_size;
            args.groups = groups;
            args.bits = bits;
            args.asymmetric = asymmetric;
            if (ordered.size() > 16 || codebook_codes.size() != ordered.size() || thresholds.size() > 15) {
                throw std::invalid_argument("a codebook has at most 16 entries");
            }
            args.codebook.entries = static_cast<int>(ordered.size());
            for (float& threshold : args.codebook.thresholds) threshold = std::numeric_limits<float>::infinity();
            for (size_t i = 0; i < thresholds.size(); ++i) args.codebook.thresholds[i] = thresholds[i];
            for (size_t i = 0; i < ordered.size(); ++i) {
                args.codebook.ordered[i] = ordered[i];
                args.codebook.codes[i] = static_cast<uint8_t>(codebook_codes[i]);
            }
            args.search_mse = search_mse;
            args.importance = static_cast<const float*>(pointer(importance));
            args.importance_stride = importance_stride;
            args.scale_dtype = static_cast<qk::DType>(scale_dtype);
            args.scales = pointer(scales);
            args.zeros = static_cast<uint8_t*>(pointer(zeros));
            args.grid_given = grid_given;
            args.rows_per_grid = rows_per_grid;
            args.codes = static_cast<uint32_t*>(pointer(codes));
            args.code_words = (K * bits + 31) / 32;
            args.flags = static_cast<int*>(pointer(flags));
            qk::cuda::check(qk::cuda::quantize_groupwise(args, pointer(stream)), "quantize_groupwise");
        },
        py::arg("weight"), py::arg("dtype"), py::arg("N"), py::arg("K"), py::arg("row_stride"), py::arg("group_size"),
        py::arg("groups"), py::arg("bits"), py::arg("asymmetric"), py::arg("ordered"), py::arg("thresholds"),
        py::arg("codebook_codes"), py::arg("search_mse"), py::arg("importance"), py::arg("importance_stride"),
        py::arg("scale_dtype"), py::arg("scales"), py::arg("zeros"), py::arg("grid_given"), py::arg("rows_per_grid"),
        py::arg("codes"), py::arg("flags"), py::arg("stream"), "Rows of floats to scales, zero points and codes.");
}
