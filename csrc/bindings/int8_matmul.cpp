#include "int8_matmul.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>

#include "qkern/cpu.h"
#include "qkern/parallel.h"
#include "workspace.h"

namespace py = pybind11;

namespace {

// Products that cost as much as one element elsewhere: a vector instruction does 64.
constexpr int64_t kProductsPerElement = 16;

template <class T>
T* at_address(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

qk::PackedView view_of(uintptr_t blob, int64_t bytes) {
    qk::PackedView view;
    const char* reason = parse_packed(at_address<const uint8_t>(blob), bytes, &view);
    if (reason) throw std::invalid_argument(reason);
    if (!is_int8_weight(view)) throw std::invalid_argument("it does not hold 8-bit codes in one group");
    return view;
}

}  // namespace

namespace qk {

int64_t exact_columns(const PackedView& view, bool x_zero) {
    const int64_t weight = view.zero_kind == ZeroKind::midpoint ? 128 : 255;
    return INT32_MAX / (weight * (x_zero ? 255 : 128));
}

void run_int8(const PackedView& view, const Int8Call& call, int threads) {
    const KernelTable& table = kernels();
    const int64_t K = view.K, element = call.x_dtype == DType::f32 ? 4 : 2;
    const int64_t exact = exact_columns(view, call.zeros != nullptr);
    const int64_t segment = K <= exact ? round_up(std::max<int64_t>(K, 1), 128) : exact / 128 * 128;
    const int64_t segments = (K + segment - 1) / segment;
    // 64 bytes more than a multiple of them: rows whose distance is a power of two would share cache sets.
    const int64_t stride = round_up(view.padded_K * table.int8_bytes, 64) + 64;
    const int64_t row_bytes = stride + 4 * segments + 4;
    const int64_t step = std::max<int64_t>(kWorkspaceBytes / row_bytes / kMatmulRows, 1) * kMatmulRows;
    const int64_t most = std::min(step, call.M);
    char* buffer = workspace(static_cast<size_t>(most * row_bytes + stride));
    char* ones = buffer + most * stride;
    Int8PrepareArgs prepare{};
    prepare.K = K;
    prepare.segment = segment;
    prepare.quads_stride = stride;
    if (call.zeros) {
        prepare.quads = ones;
        table.int8_prepare(prepare, 0, 1);
    }
    prepare.quads = buffer;
    prepare.sums = reinterpret_cast<int32_t*>(ones + stride);
    auto* scales = reinterpret_cast<float*>(prepare.sums + most * segments);
    prepare.scales = call.quantize ? scales : nullptr;
    prepare.dtype = call.x_dtype;
    prepare.row_stride = call.row_stride;
    for (int64_t first = 0; first < call.M; first += step) {
        const int64_t rows = std::min(step, call.M - first);
        if (call.quantize) {
            prepare.x = static_cast<const char*>(call.x) + first * call.row_stride * element;
        } else {
            prepare.codes = call.codes + first * call.row_stride;
        }
        parallel_for(rows, 1, K, threads,
                     [&](int64_t begin, int64_t end) { table.int8_prepare(prepare, begin, end); });
        Int8MatmulArgs args{};
        args.view = &view;
        args.M = rows;
        args.segment = segment;
        args.quads = buffer;
        args.quads_stride = stride;
        args.sums = prepare.sums;
        args.scales = call.quantize ? scales : call.scales ? call.scales + first : nullptr;
        args.zeros = call.zeros ? call.zeros + first : nullptr;
        args.ones = ones;
        args.out_dtype = call.out_dtype;
        args.out_stride = view.N;
        if (call.int_out) {
            args.int_out = static_cast<int32_t*>(call.out) + first * view.N;
        } else {
            args.out = static_cast<char*>(call.out) + first * view.N * (call.out_dtype == DType::f32 ? 4 : 2);
        }
        args.bias = call.bias;
        args.bias_dtype = call.bias_dtype;
        const int64_t work = kPanelRows * matmul_chunk_rows(rows) * K / kProductsPerElement;
        parallel_for(view.panel_count * matmul_chunks(rows), 1, work, threads,
                     [&](int64_t begin, int64_t end) { table.int8_matmul(args, begin, end); });
    }
}

}  // namespace qk

void bind_int8_matmul(py::module_& module) {
    module.def(
        "int8_matmul",
        [](uintptr_t blob, int64_t bytes, int64_t N, int64_t K, uintptr_t codes, int64_t M, int64_t row_stride, uintptr_t scales,
           uintptr_t zeros, uintptr_t bias, int bias_dtype, uintptr_t out, int out_dtype, bool int_out, int threads) {
            const qk::PackedView view = view_of(blob, bytes);
            if (view.N != N || view.K != K) throw std::invalid_argument("it is of another shape");
            if (int_out && view.zero_kind == qk::ZeroKind::offsets) {
                throw std::invalid_argument("with float offsets it has no int32 sums; ask for a float out_dtype");
            }
            if (int_out && K > qk::exact_columns(view, zeros != 0)) {
                throw std::invalid_argument("its int32 sums could overflow; ask for a float out_dtype");
            }
            qk::Int8Call call{};
            call.M = M;
            call.codes = at_address<const int8_t>(codes);
            call.row_stride = row_stride;
            call.scales = at_address<const float>(scales);
            call.zeros = at_address<const int32_t>(zeros);
            call.bias = at_address<const void>(bias);
            call.bias_dtype = static_cast<qk::DType>(bias_dtype);
            call.out = at_address<void>(out);
            call.out_dtype = static_cast<qk::DType>(out_dtype);
            call.int_out = int_out;
            py::gil_scoped_release release;
            qk::run_int8(view, call, threads);
        },
        py::arg("blob"), py::arg("bytes"), py::arg("N"), py::arg("K"), py::arg("codes"), py::arg("M"),
        py::arg("row_stride"), py::arg("scales"), py::arg("zeros"), py::arg("bias"), py::arg("bias_dtype"), py::arg("out"), py::arg("out_dtype"),
        py::arg("int_out"), py::arg("threads"), "int8 activations by an 8-bit weight: [M, N], scaled or int32 sums.");
}
