#include <pybind11/pybind11.h>

#include <atomic>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/parallel.h"

namespace py = pybind11;

namespace {

// One tile of the transposing layouts.
int64_t tile_rows(qk::BitLayout layout) { return layout == qk::BitLayout::awq ? 128 : 64; }

qk::BitsArgs pack_args(uintptr_t codes, int64_t codes_stride, int64_t N, int64_t K, int bits, int layout,
                       uintptr_t packed) {
    qk::BitsArgs args{};
    args.codes = reinterpret_cast<uint8_t*>(codes);
    args.codes_stride = codes_stride;
    args.N = N;
    args.K = K;
    args.bits = bits;
    args.layout = static_cast<qk::BitLayout>(layout);
    args.packed = reinterpret_cast<uint32_t*>(packed);
    return args;
}

}  // namespace

void bind_pack_bits(py::module_& module) {
    module.def(
        "pack_bits",
        [](uintptr_t codes, int64_t codes_stride, int64_t N, int64_t K, int bits, int layout, uintptr_t packed,
           int threads) {
            const qk::BitsArgs args = pack_args(codes, codes_stride, N, K, bits, layout, packed);
            const auto kernel = qk::kernels().pack_bits;
            std::atomic<int> worst{0};
            {
                py::gil_scoped_release release;
                qk::parallel_for(N, tile_rows(args.layout), K, threads, [&](int64_t begin, int64_t end) {
                    const auto status = static_cast<int>(kernel(args, begin, end));
                    if (status != 0) worst.store(status, std::memory_order_relaxed);
                });
            }
            return worst.load();
        },
        py::arg("codes"), py::arg("codes_stride"), py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("layout"),
        py::arg("packed"), py::arg("threads"), "Codes, one to a byte, to words of a layout; returns a qk::Status.");
    module.def(
        "unpack_bits",
        [](uintptr_t codes, int64_t codes_stride, int64_t N, int64_t K, int bits, int layout, uintptr_t packed,
           int threads) {
            const qk::BitsArgs args = pack_args(codes, codes_stride, N, K, bits, layout, packed);
            const auto kernel = qk::kernels().unpack_bits;
            py::gil_scoped_release release;
            qk::parallel_for(N, tile_rows(args.layout), K, threads,
                             [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        },
        py::arg("codes"), py::arg("codes_stride"), py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("layout"),
        py::arg("packed"), py::arg("threads"), "Words of a layout to codes, one to a byte.");
}
