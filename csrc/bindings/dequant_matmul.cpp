// Packing, and the handle that runs a packed weight: validated once, then called with pointers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "int8_matmul.h"
#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/packed_weight.h"
#include "qkern/parallel.h"
#include "workspace.h"

namespace py = pybind11;

namespace {

template <class T>
T* at_address(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Products that cost as much as one element elsewhere: a vector instruction does up to 64.
constexpr int64_t kProductsPerElement = 8;

// Weights of one call.
constexpr int kMaxProducts = 8;

// A product of a call: a weight, and where its part of the result goes.
struct Product {
    const qk::PackedView* view;
    char* out;
    const void* bias;
    qk::DType bias_dtype;
};

// Rows of x that a call multiplies.
struct Activations {
    const char* x;
    qk::DType dtype;
    int64_t M;
    int64_t row_stride;
};

// Of the activations: see qk::PrepareArgs.
enum class Form { int8, floats, pairs, digits };

Form form_of(const qk::KernelTable& kernels, const qk::PackedView& view, qk::DType type, int64_t M, bool int8) {
    if (int8) return Form::int8;
    if (type == qk::DType::bf16 && kernels.matmul_run_pairs) return Form::pairs;
    const bool integers = view.zero_kind != qk::ZeroKind::codebook;
    return integers && M <= qk::kDigitRows && kernels.matmul_run_digits ? Form::digits : Form::floats;
}

// Whether activations that are prepared for one weight serve the other.
bool read_alike(const qk::PackedView& a, const qk::PackedView& b) {
    const auto same = [](const int32_t* x, const int32_t* y, int64_t count) {
        return (x == nullptr) == (y == nullptr) && (!x || std::memcmp(x, y, static_cast<size_t>(4 * count)) == 0);
    };
    const auto wants_sums = [](qk::ZeroKind kind) { return kind == qk::ZeroKind::uint8 || kind == qk::ZeroKind::offsets; };
    const auto codebook = [](qk::ZeroKind kind) { return kind == qk::ZeroKind::codebook; };
    return a.K == b.K && a.bits == b.bits && a.groups == b.groups && !a.per_token && !b.per_token &&
           codebook(a.zero_kind) == codebook(b.zero_kind) && wants_sums(a.zero_kind) == wants_sums(b.zero_kind) &&
           same(a.group_start, b.group_start, a.groups + 1) && same(a.permutation, b.permutation, a.K);
}

// x times each of `count` weights that read alike: x is prepared once, and the threads share all products.
void run_products(const Product* products, int count, const Activations& a, bool int8, int threads) {
    const qk::KernelTable& kernels = qk::kernels();
    const qk::PackedView& view = *products[0].view;
    const int64_t element = a.dtype == qk::DType::f32 ? 4 : 2;
    const Form form = form_of(kernels, view, a.dtype, a.M, int8);
    const int digits = form != Form::digits ? 1 : a.dtype == qk::DType::f32 ? 4 : 3;
    const qk::PrepareFn prepare_rows = form == Form::pairs    ? kernels.matmul_prepare_pairs
                                       : form == Form::digits ? kernels.matmul_prepare_digits
                                                              : kernels.matmul_prepare;
    const qk::MatmulFn run_tiles = form == Form::pairs    ? kernels.matmul_run_pairs
                                   : form == Form::digits ? kernels.matmul_run_digits
                                                          : kernels.matmul_run;
    const int64_t tile_rows = form == Form::pairs ? qk::kPairRows : qk::kMatmulRows;
    const int64_t row_bytes = form == Form::pairs    ? 2 * view.padded_K + 4 * view.blocks
                              : form == Form::floats ? 4 * view.padded_K
                                                     : digits * (view.padded_K + 8 * view.blocks);
    const int64_t fitting = qk::kWorkspaceBytes / std::max<int64_t>(row_bytes, 1) / tile_rows;
    const int64_t step = std::max<int64_t>(fitting, 1) * tile_rows;
    for (int64_t first = 0; first < a.M; first += step) {
        const int64_t rows = std::min(step, a.M - first);
        char* buffer = qk::workspace(static_cast<size_t>(rows * row_bytes));
        qk::PrepareArgs prepare{};
        prepare.view = &view;
        prepare.x = a.x + first * a.row_stride * element;
        prepare.dtype = a.dtype;
        prepare.M = rows;
        prepare.row_stride = a.row_stride;
        prepare.digits = digits;
        const int64_t elements = rows * digits * view.blocks;
        if (form == Form::floats) {
            prepare.values = reinterpret_cast<float*>(buffer);
        } else if (form == Form::pairs) {
            prepare.pair_sums = reinterpret_cast<float*>(buffer);
            prepare.pairs = reinterpret_cast<uint16_t*>(buffer + 4 * elements);
        } else {
            prepare.scales = reinterpret_cast<float*>(buffer);
            prepare.sums = reinterpret_cast<int32_t*>(buffer + 4 * elements);
            prepare.codes = reinterpret_cast<int8_t*>(buffer + 8 * elements);
        }
        qk::parallel_for(rows, 1, view.K, threads,
                         [&](int64_t begin, int64_t end) { prepare_rows(prepare, begin, end); });
        qk::MatmulArgs args[kMaxProducts] = {};
        int64_t tiles[kMaxProducts + 1] = {0};
        const int64_t chunks = qk::matmul_chunks(rows, tile_rows);
        for (int i = 0; i < count; ++i) {
            const qk::PackedView& one = *products[i].view;
            args[i].view = &one;
            args[i].M = rows;
            args[i].codes = prepare.codes;
            args[i].scales = prepare.scales;
            args[i].sums = prepare.sums;
            args[i].digits = digits;
            args[i].values = prepare.values;
            args[i].pairs = prepare.pairs;
            args[i].pair_sums = prepare.pair_sums;
            args[i].out = products[i].out + first * one.N * element;
            args[i].out_dtype = a.dtype;
            args[i].out_stride = one.N;
            args[i].bias = products[i].bias;
            args[i].bias_dtype = products[i].bias_dtype;
            tiles[i + 1] = tiles[i] + one.panel_count * chunks;
        }
        const int64_t chunk_rows = qk::matmul_chunk_rows(rows, tile_rows);
        const int64_t tile_work = qk::kPanelRows * chunk_rows * view.K / kProductsPerElement;
        qk::parallel_for(tiles[count], 1, tile_work, threads, [&](int64_t begin, int64_t end) {
            for (int i = 0; i < count; ++i) {
                const int64_t from = std::max(begin, tiles[i]), to = std::min(end, tiles[i + 1]);
                if (from < to) run_tiles(args[i], from - tiles[i], to - tiles[i]);
            }
        });
    }
}

class Linear {
  public:
    Linear(uintptr_t blob, int64_t bytes) {
        const char* reason = parse_packed(at_address<const uint8_t>(blob), bytes, &view_);
        if (reason) throw std::invalid_argument(reason);
    }

    void call(uintptr_t x, int dtype, int64_t M, int64_t row_stride, uintptr_t out, uintptr_t bias, int bias_dtype,
              bool int8, int threads) const {
        const auto type = static_cast<qk::DType>(dtype);
        if (int8 && view_.per_token) return call_per_token(x, type, M, row_stride, out, bias, bias_dtype, threads);
        const Product product{&view_, at_address<char>(out), at_address<const void>(bias),
                              static_cast<qk::DType>(bias_dtype)};
        py::gil_scoped_release release;
        run_products(&product, 1, {at_address<const char>(x), type, M, row_stride}, int8, threads);
    }

    void decode(uintptr_t out, int dtype, int64_t out_stride, int64_t first_row, int64_t rows, int threads) const {
        if (first_row < 0 || first_row % qk::kPanelRows != 0 || rows < 0 || rows > view_.N - first_row ||
            out_stride < round_up(rows, qk::kRowUnit) ||
            (rows % qk::kPanelRows != 0 && first_row + rows != view_.N)) {
            throw std::invalid_argument("decode: rows must be whole panels inside the weight");
        }
        qk::DecodeArgs args{};
        args.view = &view_;
        args.out = at_address<void>(out);
        args.dtype = static_cast<qk::DType>(dtype);
        args.out_stride = out_stride;
        args.first_row = first_row;
        const int64_t first = first_row / qk::kPanelRows;
        const int64_t count = (rows + qk::kPanelRows - 1) / qk::kPanelRows;
        const auto kernel = qk::kernels().matmul_decode;
        py::gil_scoped_release release;
        qk::parallel_for(count, 1, qk::kPanelRows * view_.K, threads,
                         [&](int64_t begin, int64_t end) { kernel(args, first + begin, first + end); });
    }

    const qk::PackedView& view() const { return view_; }

  private:
    void call_per_token(uintptr_t x, qk::DType dtype, int64_t M, int64_t row_stride, uintptr_t out, uintptr_t bias,
                        int bias_dtype, int threads) const {
        qk::Int8Call whole{};
        whole.M = M;
        whole.quantize = true;
        whole.x = at_address<const void>(x);
        whole.x_dtype = whole.out_dtype = dtype;
        whole.row_stride = row_stride;
        whole.bias = at_address<const void>(bias);
        whole.bias_dtype = static_cast<qk::DType>(bias_dtype);
        whole.out = at_address<void>(out);
        py::gil_scoped_release release;
        qk::run_int8(view_, whole, threads);
    }

    qk::PackedView view_;
};

// Weights that read the same x, and run as one call.
class LinearGroup {
  public:
    explicit LinearGroup(const std::vector<const Linear*>& linears) {
        if (linears.empty() || linears.size() > kMaxProducts) throw std::invalid_argument("a group has 1 to 8 weights");
        for (const Linear* linear : linears) {
            if (!linear) throw std::invalid_argument("a weight of a group is None");
            if (!read_alike(linears[0]->view(), linear->view())) {
                throw std::invalid_argument("the weights of a group must share K, bits, groups and column order");
            }
            views_.push_back(linear->view());
        }
    }

    void call(uintptr_t x, int dtype, int64_t M, int64_t row_stride, const std::vector<uintptr_t>& outs,
              const std::vector<std::pair<uintptr_t, int>>& biases, bool int8, int threads) const {
        const size_t count = views_.size();
        if (outs.size() != count || biases.size() != count) {
            throw std::invalid_argument("a group takes an output and a bias for each of its weights");
        }
        Product products[kMaxProducts];
        for (size_t i = 0; i < count; ++i) {
            products[i] = {&views_[i], at_address<char>(outs[i]), at_address<const void>(biases[i].first),
                           static_cast<qk::DType>(biases[i].second)};
        }
        py::gil_scoped_release release;
        run_products(products, static_cast<int>(count),
                     {at_address<const char>(x), static_cast<qk::DType>(dtype), M, row_stride}, int8, threads);
    }

  private:
    std::vector<qk::PackedView> views_;
};

// Sizes and offsets of a blob before it exists.
struct Plan {
    qk::PackedView view;
    int64_t permutation_offset, panels_offset, extra_offset, total;
};

Plan plan(int64_t N, int64_t K, int64_t groups, int bits, int zero_kind, int scale_dtype, bool per_tensor,
          uintptr_t group_start, bool permuted, int64_t extra_bytes) {
    Plan p{};
    p.view.N = N;
    p.view.K = K;
    p.view.groups = groups;
    p.view.bits = bits;
    p.view.zero_kind = static_cast<qk::ZeroKind>(zero_kind);
    p.view.scale_dtype = static_cast<qk::DType>(scale_dtype);
    p.view.group_start = at_address<const int32_t>(group_start);
    derive_sizes(&p.view);
    int64_t at = round_up(static_cast<int64_t>(sizeof(qk::PackedHeader)) + 4 * (groups + 1), 64);
    p.permutation_offset = permuted ? at : 0;
    if (permuted) at = round_up(at + 4 * K, 64);
    p.panels_offset = at;
    at = round_up(at + packed_rows(N, per_tensor) * p.view.row_bytes, 64);
    p.extra_offset = at;
    p.total = at + extra_bytes;
    return p;
}

qk::PackArgs pack_args(const qk::PackedView& view, bool per_tensor, uintptr_t codes, uintptr_t scales,
                       uintptr_t zeros) {
    qk::PackArgs args{};
    args.view = &view;
    args.codes = at_address<uint32_t>(codes);
    args.code_words = (view.K * view.bits + 31) / 32;
    args.scales = at_address<void>(scales);
    args.zeros = at_address<void>(zeros);
    args.scale_row_stride = per_tensor ? 0 : view.groups;
    args.panels = const_cast<uint8_t*>(view.panels);
    return args;
}

int64_t panels_to_move(const qk::PackedView& view, bool per_tensor) {
    return (packed_rows(view.N, per_tensor) + qk::kPanelRows - 1) / qk::kPanelRows;
}

qk::PackedHeader header_of(uintptr_t blob) {
    qk::PackedHeader header;
    std::memcpy(&header, at_address<const void>(blob), sizeof header);
    return header;
}

}  // namespace

void bind_dequant_matmul(py::module_& module) {
    module.def(
        "packed_bytes",
        [](int64_t N, int64_t K, int64_t groups, int bits, int zero_kind, int scale_dtype, bool per_tensor,
           uintptr_t group_start, bool permuted, int64_t extra_bytes) {
            return plan(N, K, groups, bits, zero_kind, scale_dtype, per_tensor, group_start, permuted, extra_bytes)
                .total;
        },
        py::arg("N"), py::arg("K"), py::arg("groups"), py::arg("bits"), py::arg("zero_kind"), py::arg("scale_dtype"),
        py::arg("per_tensor"), py::arg("group_start"), py::arg("permuted"), py::arg("extra_bytes"),
        "Size of the blob that pack_weight fills.");
    module.def(
        "pack_weight",
        [](uintptr_t blob, int64_t N, int64_t K, int64_t groups, int bits, int zero_kind, int scale_dtype,
           bool per_tensor, bool has_index, uintptr_t group_start, uintptr_t permutation, uintptr_t codes,
           uintptr_t scales, uintptr_t zeros, uintptr_t table, const std::string& scheme, uintptr_t extra,
           int64_t extra_bytes, int threads) {
            Plan p = plan(N, K, groups, bits, zero_kind, scale_dtype, per_tensor, group_start, permutation != 0,
                          extra_bytes);
            auto* bytes = at_address<uint8_t>(blob);
            qk::PackedHeader header{};
            std::memcpy(header.magic, qk::kPackedMagic, sizeof header.magic);
            header.version = qk::kPackedVersion;
            header.bits = bits;
            header.total_bytes = p.total;
            header.N = N;
            header.K = K;
            header.groups = groups;
            header.zero_kind = zero_kind;
            header.scale_dtype = scale_dtype;
            header.per_tensor = per_tensor;
            header.has_index = has_index;
            header.permutation_offset = p.permutation_offset;
            header.panels_offset = p.panels_offset;
            header.extra_offset = p.extra_offset;
            header.extra_bytes = extra_bytes;
            if (table) std::memcpy(header.table, at_address<const void>(table), sizeof header.table);
            if (scheme.size() >= sizeof header.scheme) throw std::invalid_argument("the scheme's spelling is too long");
            std::memcpy(header.scheme, scheme.data(), scheme.size());
            const auto kernel = qk::kernels().pack_panels;
            py::gil_scoped_release release;
            // Everything before the panels, gaps included: a blob is a function of its weight.
            std::memset(bytes, 0, static_cast<size_t>(p.panels_offset));
            std::memcpy(bytes, &header, sizeof header);
            std::memcpy(bytes + sizeof header, p.view.group_start, static_cast<size_t>(4 * (groups + 1)));
            if (permutation) {
                p.view.permutation = at_address<const int32_t>(permutation);
                std::memcpy(bytes + p.permutation_offset, p.view.permutation, static_cast<size_t>(4 * K));
            }
            const int64_t panels_end = p.panels_offset + packed_rows(N, per_tensor) * p.view.row_bytes;
            std::memset(bytes + panels_end, 0, static_cast<size_t>(p.extra_offset - panels_end));
            if (extra_bytes > 0) {
                std::memcpy(bytes + p.extra_offset, at_address<const void>(extra), static_cast<size_t>(extra_bytes));
            }
            p.view.panels = bytes + p.panels_offset;
            const qk::PackArgs args = pack_args(p.view, per_tensor, codes, scales, zeros);
            qk::parallel_for(panels_to_move(p.view, per_tensor), 1, qk::kPanelRows * K, threads,
                             [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        },
        py::arg("blob"), py::arg("N"), py::arg("K"), py::arg("groups"), py::arg("bits"), py::arg("zero_kind"),
        py::arg("scale_dtype"), py::arg("per_tensor"), py::arg("has_index"), py::arg("group_start"),
        py::arg("permutation"), py::arg("codes"), py::arg("scales"), py::arg("zeros"), py::arg("table"),
        py::arg("scheme"), py::arg("extra"), py::arg("extra_bytes"), py::arg("threads"),
        "Write a form-2 weight as cpu.k4x16 into a blob of packed_bytes bytes.");
    module.def(
        "packed_header",
        [](uintptr_t blob, int64_t bytes) {
            const Linear checked(blob, bytes);
            const qk::PackedHeader header = header_of(blob);
            py::dict out;
            out["N"] = header.N;
            out["K"] = header.K;
            out["groups"] = header.groups;
            out["bits"] = header.bits;
            out["zero_kind"] = header.zero_kind;
            out["scale_dtype"] = header.scale_dtype;
            out["per_tensor"] = header.per_tensor != 0;
            out["has_index"] = header.has_index != 0;
            out["extra_offset"] = header.extra_offset;
            out["extra_bytes"] = header.extra_bytes;
            out["scheme"] = std::string(header.scheme, strnlen(header.scheme, sizeof header.scheme));
            return out;
        },
        py::arg("blob"), py::arg("bytes"), "What a blob holds; ValueError says what is wrong with a corrupt one.");
    module.def(
        "unpack_weight",
        [](uintptr_t blob, int64_t bytes, uintptr_t codes, uintptr_t scales, uintptr_t zeros, uintptr_t group_index,
           int threads) {
            const Linear checked(blob, bytes);
            const qk::PackedView& view = checked.view();
            const bool per_tensor = header_of(blob).per_tensor != 0;
            const qk::PackArgs args = pack_args(view, per_tensor, codes, scales, zeros);
            const auto kernel = qk::kernels().unpack_panels;
            py::gil_scoped_release release;
            std::memset(args.codes, 0, static_cast<size_t>(4 * view.N * args.code_words));
            if (auto* index = at_address<int32_t>(group_index)) {
                for (int64_t g = 0; g < view.groups; ++g) {
                    for (int64_t k = view.group_start[g]; k < view.group_start[g + 1]; ++k) {
                        index[view.permutation ? view.permutation[k] : k] = static_cast<int32_t>(g);
                    }
                }
            }
            // A lone per-tensor scale is written by panel 0 only, so panels stay independent.
            qk::parallel_for(panels_to_move(view, per_tensor), 1, qk::kPanelRows * view.K, threads,
                             [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
        },
        py::arg("blob"), py::arg("bytes"), py::arg("codes"), py::arg("scales"), py::arg("zeros"),
        py::arg("group_index"), py::arg("threads"), "The inverse of pack_weight, bit for bit.");
    py::class_<Linear>(module, "Linear", "A validated blob; the caller keeps its memory alive.")
        .def(py::init<uintptr_t, int64_t>(), py::arg("blob"), py::arg("bytes"))
        .def_property_readonly("shape", [](const Linear& self) { return std::make_pair(self.view().N, self.view().K); })
        .def("__call__", &Linear::call, py::arg("x"), py::arg("dtype"), py::arg("M"), py::arg("row_stride"),
             py::arg("out"), py::arg("bias"), py::arg("bias_dtype"), py::arg("int8"), py::arg("threads"),
             "out[M, N] = x @ W.T + bias, contiguous, in x's dtype.")
        .def("decode", &Linear::decode, py::arg("out"), py::arg("dtype"), py::arg("out_stride"), py::arg("first_row"),
             py::arg("rows"), py::arg("threads"), "Rows of the weight as floats, transposed: [K, out_stride].");
    py::class_<LinearGroup>(module, "LinearGroup", "Weights that read the same x; the caller keeps their memory alive.")
        .def(py::init<const std::vector<const Linear*>&>(), py::arg("linears"),
             "ValueError where activations prepared for one would not serve another.")
        .def("__call__", &LinearGroup::call, py::arg("x"), py::arg("dtype"), py::arg("M"), py::arg("row_stride"),
             py::arg("outs"), py::arg("biases"), py::arg("int8"), py::arg("threads"),
             "outs[i][M, N_i] = x @ W_i.T + bias_i, contiguous, in x's dtype; a bias is its address and dtype.");
}
