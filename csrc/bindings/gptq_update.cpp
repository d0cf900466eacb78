#include <pybind11/pybind11.h>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/parallel.h"
#include "workspace.h"

namespace py = pybind11;

namespace {

template <class T>
void gather_row(const T* row, const int64_t* columns, int64_t K, T* out) {
    for (int64_t k = 0; k < K; ++k) out[k] = row[columns[k]];
}

}  // namespace

void bind_gptq_update(py::module_& module) {
    module.attr("GPTQ_MAX_COLUMNS") = qk::kGptqMaxColumns;
    module.def(
        "gptq_update",
        [](uintptr_t weight, int64_t weight_stride, int64_t N, int64_t B, uintptr_t hinv, uintptr_t scales,
           uintptr_t zeros, int64_t groups, uintptr_t group_index, int bits, int codebook, uintptr_t codes,
           int64_t codes_stride, uintptr_t errors, int threads, uintptr_t origin, int64_t origin_stride,
           uintptr_t change, int64_t change_stride, uintptr_t losses, uintptr_t candidate_scales, int64_t candidates,
           uintptr_t local, int fits, int scale_dtype) {
            qk::GptqArgs args{};
            args.weight = reinterpret_cast<const float*>(weight);
            args.weight_stride = weight_stride;
            args.B = B;
            args.hinv = reinterpret_cast<const float*>(hinv);
            args.scales = reinterpret_cast<float*>(scales);
            args.zeros = reinterpret_cast<const uint8_t*>(zeros);
            args.groups = groups;
            args.group_index = reinterpret_cast<const int32_t*>(group_index);
            args.bits = bits;
            args.codebook = codebook;
            args.codes = reinterpret_cast<uint8_t*>(codes);
            args.codes_stride = codes_stride;
            args.errors = reinterpret_cast<float*>(errors);
            args.origin = reinterpret_cast<const float*>(origin);
            args.origin_stride = origin_stride;
            args.change = reinterpret_cast<float*>(change);
            args.change_stride = change_stride;
            args.losses = reinterpret_cast<float*>(losses);
            args.candidate_scales = reinterpret_cast<const float*>(candidate_scales);
            args.candidates = candidates;
            args.candidate_stride = N;
            args.local = reinterpret_cast<const float*>(local);
            args.fits = fits;
            args.scale_dtype = static_cast<qk::DType>(scale_dtype);
            const qk::KernelTable& table = qk::kernels();
            const auto kernel = local ? table.gptq_improve : candidates ? table.gptq_search : table.gptq_update;
            // Every column corrects those behind it; the products of an improvement cost as much.
            const int64_t runs = local ? 2 + 3 * fits : candidates + 1;
            py::gil_scoped_release release;
            // Two vectors of rows go together.
            qk::parallel_for(N, 32, runs * (B + 1) * B / 2, threads,
                             [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        },
        py::arg("weight"), py::arg("weight_stride"), py::arg("N"), py::arg("B"), py::arg("hinv"), py::arg("scales"),
        py::arg("zeros"), py::arg("groups"), py::arg("group_index"), py::arg("bits"), py::arg("codebook"),
        py::arg("codes"), py::arg("codes_stride"), py::arg("errors"), py::arg("threads"), py::arg("origin") = 0,
        py::arg("origin_stride") = 0, py::arg("change") = 0, py::arg("change_stride") = 0, py::arg("losses") = 0,
        py::arg("candidate_scales") = 0, py::arg("candidates") = 0, py::arg("local") = 0, py::arg("fits") = 0,
        py::arg("scale_dtype") = 0,
        "Quantize the columns of a block one by one, spreading each column's error over those behind it; with "
        "candidates, at the scale that loses least; with local, where it betters the codes there are.");
    module.def(
        "gptq_product",
        [](uintptr_t a, int64_t a_stride, int64_t N, int64_t K, uintptr_t b, int64_t b_row_stride,
           int64_t b_column_stride, int64_t columns, uintptr_t base, int64_t base_stride, uintptr_t out,
           int64_t out_stride, bool fixed, int threads) {
            const qk::KernelTable& table = qk::kernels();
            const bool can = fixed && K > 0 && table.fixed_product.multiply;
            const qk::ProductKernel& kernel = can ? table.fixed_product : table.product;
            if (!kernel.multiply) return false;
            const int64_t panels = (columns + kernel.width - 1) / kernel.width;
            const int64_t slices = (K + qk::kProductDepth - 1) / qk::kProductDepth;
            py::gil_scoped_release release;
            void* packed = qk::workspace(static_cast<size_t>(slices * panels * kernel.panel_bytes));
            const qk::ProductPackArgs pack{reinterpret_cast<const float*>(b), b_row_stride, b_column_stride, K, columns,
                                           packed};
            qk::parallel_for(slices, 1, qk::kProductDepth * columns, threads,
                             [&](int64_t begin, int64_t end) { kernel.pack(pack, begin, end); });
            const qk::ProductArgs args{reinterpret_cast<const float*>(a), a_stride, K, packed, columns,
                                       reinterpret_cast<const float*>(base), base_stride,
                                       reinterpret_cast<float*>(out), out_stride};
            // Few pieces: each fetches all of b, from L3 or from memory.
            const int64_t tiles = (N + kernel.height - 1) / kernel.height;
            const int64_t piece = (tiles + 2 * threads - 1) / (2 * threads) * kernel.height;
            qk::parallel_for(N, piece, K * columns / 8 + 1, threads,
                             [&](int64_t begin, int64_t end) { kernel.multiply(args, begin, end); });
            return true;
        },
        py::arg("a"), py::arg("a_stride"), py::arg("N"), py::arg("K"), py::arg("b"), py::arg("b_row_stride"),
        py::arg("b_column_stride"), py::arg("columns"), py::arg("base"), py::arg("base_stride"), py::arg("out"),
        py::arg("out_stride"), py::arg("fixed"), py::arg("threads"),
        "out = base + a @ b in fp32 or, with fixed and where that is faster, in 16-bit fixed point; false, and nothing "
        "is done, if the active tier leaves products to torch.");
    module.def(
        "gptq_gather",
        [](uintptr_t matrix, int64_t row_bytes, int item_bytes, uintptr_t rows, int64_t N, uintptr_t columns, int64_t K,
           uintptr_t out, int threads) {
            const auto* from = reinterpret_cast<const char*>(matrix);
            const auto* row_index = reinterpret_cast<const int64_t*>(rows);
            const auto* column_index = reinterpret_cast<const int64_t*>(columns);
            auto* to = reinterpret_cast<char*>(out);
            py::gil_scoped_release release;
            qk::parallel_for(N, 1, 2 * K, threads, [&](int64_t begin, int64_t end) {
                for (int64_t n = begin; n < end; ++n) {
                    const char* row = from + (row_index ? row_index[n] : n) * row_bytes;
                    if (item_bytes == 4) {
                        gather_row(reinterpret_cast<const uint32_t*>(row), column_index, K,
                                   reinterpret_cast<uint32_t*>(to) + n * K);
                    } else {
                        gather_row(reinterpret_cast<const uint8_t*>(row), column_index, K,
                                   reinterpret_cast<uint8_t*>(to) + n * K);
                    }
                }
            });
        },
        py::arg("matrix"), py::arg("row_bytes"), py::arg("item_bytes"), py::arg("rows"), py::arg("N"),
        py::arg("columns"), py::arg("K"), py::arg("out"), py::arg("threads"),
        "out[n, k] = matrix[rows[n], columns[k]] for items of 1 or 4 bytes; rows 0: all in their order.");
}
