// Runs kernels on cases from a file, so that the Python references can be the oracle of a machine without
// Python: tests/driver_cases.py writes the cases, starts this (under an emulator, if need be) and compares.
//
//   qkern_driver tiers                      names of the usable tiers, one a line
//   qkern_driver TIER CASES OUTPUTS         every case on that tier
//
// A case file is a sequence of cases, little endian, strings and buffers with a u64 length before them:
//   op, u64 count of numbers, (name, i64)..., u64 count of buffers, (name, u8 is_output, bytes)...
// The output file holds, for each case, an i64 status and then its output buffers without lengths.
//
// To add an op: write run_<op> and add it to kOps.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "qkern/cpu.h"
#include "qkern/kernels.h"
#include "qkern/packed_weight.h"
#include "qkern/parallel.h"

namespace {

class Case {
  public:
    std::string op;
    std::map<std::string, int64_t> numbers;
    struct Buffer {
        std::string name;
        bool output;
        std::vector<char> bytes;
    };
    std::vector<Buffer> buffers;

    int64_t number(const char* name) const {
        const auto found = numbers.find(name);
        if (found == numbers.end()) throw std::runtime_error(op + ": the case has no number " + name);
        return found->second;
    }

    int integer(const char* name) const { return static_cast<int>(number(name)); }
    qk::DType dtype(const char* name) const { return static_cast<qk::DType>(number(name)); }

    // Null if the case has no such buffer.
    template <class T>
    T* data(const char* name) {
        for (Buffer& buffer : buffers) {
            if (buffer.name == name) return reinterpret_cast<T*>(buffer.bytes.data());
        }
        return nullptr;
    }
};

// Runs `kernel(begin, end)`, which returns a status, on two threads; the worst status of all pieces.
template <class Kernel>
int64_t run_rows(int64_t rows, int64_t unit, Kernel&& kernel) {
    std::atomic<int64_t> worst{0};
    qk::parallel_for(rows, unit, qk::kPieceWork, 2, [&](int64_t begin, int64_t end) {
        const auto status = static_cast<int64_t>(kernel(begin, end));
        if (status != 0) worst.store(status);
    });
    return worst.load();
}

int64_t run_quantize_groupwise(Case& c) {
    qk::QuantizeArgs args{};
    args.weight = c.data<const void>("weight");
    args.dtype = c.dtype("dtype");
    args.K = args.row_stride = c.number("K");
    args.group_size = c.number("group_size");
    args.groups = c.number("groups");
    args.bits = c.integer("bits");
    args.asymmetric = c.number("asymmetric") != 0;
    args.codebook = c.integer("codebook");
    args.search_mse = c.number("search_mse") != 0;
    args.importance = c.data<const float>("importance");
    args.importance_stride = args.K;
    args.scale_dtype = c.dtype("scale_dtype");
    args.scales = c.data<void>("scales");
    args.zeros = c.data<uint8_t>("zeros");
    args.rows_per_grid = 1;
    args.codes = c.data<uint32_t>("codes");
    args.code_words = (args.K * args.bits + 31) / 32;
    const auto kernel = qk::kernels().quantize_groupwise;
    return run_rows(c.number("N"), 8, [&](int64_t begin, int64_t end) { return kernel(args, begin, end); });
}

int64_t run_dequantize_groupwise(Case& c) {
    qk::DequantizeArgs args{};
    args.codes = c.data<const uint32_t>("codes");
    args.K = args.out_stride = c.number("K");
    args.bits = c.integer("bits");
    args.code_words = (args.K * args.bits + 31) / 32;
    args.group_size = c.number("group_size");
    args.groups = c.number("groups");
    args.codebook = c.integer("codebook");
    args.scale_dtype = c.dtype("scale_dtype");
    args.scales = c.data<const void>("scales");
    args.zeros = c.data<const uint8_t>("zeros");
    args.offsets = c.data<const void>("offsets");
    args.group_index = c.data<const int32_t>("group_index");
    args.rows_per_scale = 1;
    args.out_dtype = c.dtype("out_dtype");
    args.out = c.data<void>("out");
    const auto kernel = qk::kernels().dequantize_groupwise;
    return run_rows(c.number("N"), 4, [&](int64_t begin, int64_t end) {
        kernel(args, begin, end);
        return qk::Status::ok;
    });
}

qk::BitsArgs bits_args(Case& c) {
    qk::BitsArgs args{};
    args.codes = c.data<uint8_t>("codes");
    args.N = c.number("N");
    args.K = args.codes_stride = c.number("K");
    args.bits = c.integer("bits");
    args.layout = static_cast<qk::BitLayout>(c.number("layout"));
    args.packed = c.data<uint32_t>("packed");
    return args;
}

int64_t run_pack_bits(Case& c) {
    const qk::BitsArgs args = bits_args(c);
    const auto kernel = qk::kernels().pack_bits;
    return run_rows(args.N, 16, [&](int64_t begin, int64_t end) { return kernel(args, begin, end); });
}

int64_t run_unpack_bits(Case& c) {
    const qk::BitsArgs args = bits_args(c);
    const auto kernel = qk::kernels().unpack_bits;
    return run_rows(args.N, 16, [&](int64_t begin, int64_t end) {
        kernel(args, begin, end);
        return qk::Status::ok;
    });
}

int64_t run_gptq_update(Case& c) {
    qk::GptqArgs args{};
    args.weight = c.data<const float>("weight");
    args.B = args.weight_stride = c.number("B");
    args.hinv = c.data<const float>("hinv");
    args.scales = c.data<float>("scales");
    args.zeros = c.data<const uint8_t>("zeros");
    args.groups = c.number("groups");
    args.group_index = c.data<const int32_t>("group_index");
    args.bits = c.integer("bits");
    args.codebook = c.integer("codebook");
    args.codes = c.data<uint8_t>("codes");
    args.codes_stride = args.B;
    args.errors = c.data<float>("errors");
    const auto kernel = qk::kernels().gptq_update;
    return run_rows(c.number("N"), 32, [&](int64_t begin, int64_t end) {
        kernel(args, begin, end);
        return qk::Status::ok;
    });
}

int64_t run_quantize_activations(Case& c) {
    qk::QuantizeActivationsArgs args{};
    args.x = c.data<const void>("x");
    args.dtype = c.dtype("dtype");
    args.K = args.row_stride = c.number("K");
    args.group_size = c.number("group_size");
    args.scale = c.data<const float>("scale");
    args.zero = args.scale ? c.integer("zero") : 0;
    args.codes = c.data<int8_t>("codes");
    args.scales = c.data<float>("scales");
    const auto kernel = qk::kernels().quantize_activations;
    return run_rows(c.number("M"), 4, [&](int64_t begin, int64_t end) {
        kernel(args, begin, end);
        return qk::Status::ok;
    });
}

// A blob that is not sound, or not of the shape that the caller believes, is refused as the bindings refuse it.
bool read_blob(Case& c, qk::PackedView* view) {
    return !parse_packed(c.data<const uint8_t>("blob"), c.number("bytes"), view) && view->N == c.number("N") &&
           view->K == c.number("K");
}

// Panels to form 2 and back: the codes, scales and zeros, then the same panels once more.
int64_t run_panels(Case& c) {
    qk::PackedView view;
    if (!read_blob(c, &view) || view.bits != c.integer("bits") || view.groups != c.number("groups")) return -1;
    const qk::KernelTable& kernels = qk::kernels();
    const bool per_tensor = c.number("per_tensor") != 0;
    const int64_t rows = packed_rows(view.N, per_tensor);
    std::vector<uint8_t> panels(static_cast<size_t>(rows * view.row_bytes), 0xee);
    qk::PackArgs args{};
    args.view = &view;
    args.codes = c.data<uint32_t>("codes");
    args.code_words = (view.K * view.bits + 31) / 32;
    args.scales = c.data<void>("scales");
    args.zeros = c.data<void>("zeros");
    args.scale_row_stride = per_tensor ? 0 : view.groups;
    args.panels = const_cast<uint8_t*>(view.panels);
    if (view.N > 0) memset(args.codes, 0, static_cast<size_t>(4 * view.N * args.code_words));
    const int64_t count = (rows + qk::kPanelRows - 1) / qk::kPanelRows;
    run_rows(count, 1, [&](int64_t begin, int64_t end) {
        kernels.unpack_panels(args, begin, end);
        return qk::Status::ok;
    });
    args.panels = panels.data();
    run_rows(count, 1, [&](int64_t begin, int64_t end) {
        kernels.pack_panels(args, begin, end);
        return qk::Status::ok;
    });
    return panels.empty() || memcmp(panels.data(), view.panels, panels.size()) == 0 ? 0 : -2;
}

// Of the activations, see qk::PrepareArgs; the numbers are those of tests/driver_cases.py. A tier without pairs or
// digits takes floats.
enum class Form { int8, floats, pairs, digits };

int64_t run_dequant_matmul(Case& c) {
    qk::PackedView view;
    if (!read_blob(c, &view)) return -1;
    const qk::KernelTable& kernels = qk::kernels();
    const int64_t M = c.number("M");
    Form form = static_cast<Form>(c.number("form"));
    if (form == Form::pairs && !kernels.matmul_run_pairs) form = Form::floats;
    const bool codebook = view.zero_kind == qk::ZeroKind::codebook;
    if (form == Form::digits && (!kernels.matmul_run_digits || codebook)) form = Form::floats;
    qk::PrepareArgs prepare{};
    prepare.view = &view;
    prepare.x = c.data<const void>("x");
    prepare.dtype = c.dtype("dtype");
    prepare.M = M;
    prepare.row_stride = view.K;
    prepare.digits = form != Form::digits ? 1 : prepare.dtype == qk::DType::f32 ? 4 : 3;
    const auto columns = static_cast<size_t>(M * prepare.digits * view.padded_K);
    const auto blocks = static_cast<size_t>(M * prepare.digits * view.blocks);
    std::vector<int8_t> codes(columns);
    std::vector<float> scales(blocks), values(columns);
    std::vector<int32_t> sums(blocks);
    std::vector<uint16_t> pairs(columns);
    prepare.codes = codes.data();
    prepare.scales = prepare.pair_sums = scales.data();
    prepare.sums = sums.data();
    prepare.values = form == Form::floats ? values.data() : nullptr;
    prepare.pairs = pairs.data();
    const qk::PrepareFn prepare_rows = form == Form::pairs    ? kernels.matmul_prepare_pairs
                                       : form == Form::digits ? kernels.matmul_prepare_digits
                                                              : kernels.matmul_prepare;
    run_rows(M, 4, [&](int64_t begin, int64_t end) {
        prepare_rows(prepare, begin, end);
        return qk::Status::ok;
    });
    qk::MatmulArgs args{};
    args.view = &view;
    args.M = M;
    args.codes = prepare.codes;
    args.scales = args.pair_sums = prepare.scales;
    args.sums = prepare.sums;
    args.digits = prepare.digits;
    args.values = prepare.values;
    args.pairs = prepare.pairs;
    args.out = c.data<void>("out");
    args.out_dtype = prepare.dtype;
    args.out_stride = view.N;
    args.bias = c.data<const void>("bias");
    args.bias_dtype = qk::DType::f32;
    const qk::MatmulFn run_tiles = form == Form::pairs    ? kernels.matmul_run_pairs
                                   : form == Form::digits ? kernels.matmul_run_digits
                                                          : kernels.matmul_run;
    const int64_t chunks = qk::matmul_chunks(M, form == Form::pairs ? qk::kPairRows : qk::kMatmulRows);
    run_rows(view.panel_count * chunks, 1, [&](int64_t begin, int64_t end) {
        run_tiles(args, begin, end);
        return qk::Status::ok;
    });
    qk::DecodeArgs decode{};
    decode.view = &view;
    decode.out = c.data<void>("decoded");
    decode.dtype = qk::DType::f32;
    decode.out_stride = round_up(view.N, qk::kRowUnit);
    return run_rows(view.panel_count, 1, [&](int64_t begin, int64_t end) {
        kernels.matmul_decode(decode, begin, end);
        return qk::Status::ok;
    });
}

int64_t run_gguf_encode(Case& c) {
    const auto kernel = qk::kernels().gguf_encode;
    return run_rows(c.number("N"), 1, [&](int64_t begin, int64_t end) {
        return kernel(static_cast<qk::GgufType>(c.number("type")), c.data<const float>("x"),
                      c.data<const float>("importance"), c.data<uint8_t>("out"), c.number("K"), begin, end);
    });
}

int64_t run_gguf_decode(Case& c) {
    const auto kernel = qk::kernels().gguf_decode;
    return run_rows(c.number("N"), 1, [&](int64_t begin, int64_t end) {
        kernel(static_cast<qk::GgufType>(c.number("type")), c.data<const uint8_t>("raw"), c.data<float>("out"),
               c.number("K"), begin, end);
        return qk::Status::ok;
    });
}

// Twice: from int8 codes with scales and zero points, and the integer sums alone.
int64_t run_int8_matmul(Case& c) {
    qk::PackedView view;
    if (parse_packed(c.data<const uint8_t>("blob"), c.number("bytes"), &view) || !is_int8_weight(view)) return -1;
    const qk::KernelTable& kernels = qk::kernels();
    const int64_t M = c.number("M");
    const int64_t stride = round_up(view.padded_K * kernels.int8_bytes, 64);
    std::vector<char> quads(static_cast<size_t>((M + 1) * stride));
    std::vector<int32_t> sums(static_cast<size_t>(M));
    qk::Int8PrepareArgs prepare{};
    prepare.K = view.K;
    prepare.segment = round_up(view.K, 128);
    prepare.quads = quads.data() + M * stride;
    prepare.quads_stride = stride;
    kernels.int8_prepare(prepare, 0, 1);  // ones
    prepare.quads = quads.data();
    prepare.codes = c.data<const int8_t>("x");
    prepare.row_stride = view.K;
    prepare.sums = sums.data();
    run_rows(M, 4, [&](int64_t begin, int64_t end) {
        kernels.int8_prepare(prepare, begin, end);
        return qk::Status::ok;
    });
    qk::Int8MatmulArgs args{};
    args.view = &view;
    args.M = M;
    args.segment = prepare.segment;
    args.quads = quads.data();
    args.quads_stride = stride;
    args.sums = sums.data();
    args.scales = c.data<const float>("scales");
    args.zeros = c.data<const int32_t>("zeros");
    args.ones = quads.data() + M * stride;
    args.out = c.data<void>("out");
    args.out_dtype = c.dtype("out_dtype");
    args.out_stride = view.N;
    args.bias = c.data<const void>("bias");
    args.bias_dtype = qk::DType::f32;
    const int64_t tiles = view.panel_count * qk::matmul_chunks(M);
    const auto multiply = [&](int64_t begin, int64_t end) {
        kernels.int8_matmul(args, begin, end);
        return qk::Status::ok;
    };
    run_rows(tiles, 1, multiply);
    args.int_out = c.data<int32_t>("int_out");
    return run_rows(tiles, 1, multiply);
}

const std::map<std::string, int64_t (*)(Case&)> kOps = {
    {"quantize_groupwise", &run_quantize_groupwise},
    {"dequantize_groupwise", &run_dequantize_groupwise},
    {"pack_bits", &run_pack_bits},
    {"unpack_bits", &run_unpack_bits},
    {"gptq_update", &run_gptq_update},
    {"quantize_activations", &run_quantize_activations},
    {"panels", &run_panels},
    {"dequant_matmul", &run_dequant_matmul},
    {"gguf_encode", &run_gguf_encode},
    {"gguf_decode", &run_gguf_decode},
    {"int8_matmul", &run_int8_matmul},
};

// ---- the file -----------------------------------------------------------------------------------------

class Reader {
  public:
    explicit Reader(const char* path) : file_(path, std::ios::binary) {
        if (!file_) throw std::runtime_error(std::string("cannot read ") + path);
    }

    bool at_end() { return file_.peek() == std::ifstream::traits_type::eof(); }

    template <class T>
    T value() {
        T result;
        if (!file_.read(reinterpret_cast<char*>(&result), sizeof result)) throw std::runtime_error("truncated case");
        return result;
    }

    std::vector<char> bytes() {
        std::vector<char> result(value<uint64_t>());
        if (!file_.read(result.data(), static_cast<std::streamsize>(result.size()))) {
            throw std::runtime_error("truncated case");
        }
        return result;
    }

    std::string text() {
        const std::vector<char> raw = bytes();
        return {raw.begin(), raw.end()};
    }

    Case next() {
        Case c;
        c.op = text();
        for (uint64_t left = value<uint64_t>(); left > 0; --left) {
            const std::string name = text();
            c.numbers[name] = value<int64_t>();
        }
        for (uint64_t left = value<uint64_t>(); left > 0; --left) {
            Case::Buffer buffer;
            buffer.name = text();
            buffer.output = value<uint8_t>() != 0;
            buffer.bytes = bytes();
            c.buffers.push_back(std::move(buffer));
        }
        return c;
    }

  private:
    std::ifstream file_;
};

bool activate(const std::string& name) {
    for (int i = 0; i < qk::kTierCount; ++i) {
        const auto tier = static_cast<qk::Tier>(i);
        if (name == qk::tier_name(tier)) return qk::set_active_tier(tier);
    }
    return false;
}

void run_cases(const char* cases, const char* outputs) {
    Reader reader(cases);
    std::ofstream out(outputs, std::ios::binary);
    while (!reader.at_end()) {
        Case c = reader.next();
        const auto op = kOps.find(c.op);
        if (op == kOps.end()) throw std::runtime_error("unknown op " + c.op);
        const int64_t status = op->second(c);
        out.write(reinterpret_cast<const char*>(&status), sizeof status);
        for (const Case::Buffer& buffer : c.buffers) {
            if (buffer.output) out.write(buffer.bytes.data(), static_cast<std::streamsize>(buffer.bytes.size()));
        }
    }
    if (!out.flush()) throw std::runtime_error(std::string("cannot write ") + outputs);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 2 && std::string(argv[1]) == "tiers") {
        for (int i = 0; i < qk::kTierCount; ++i) {
            const auto tier = static_cast<qk::Tier>(i);
            if (qk::tier_compiled(tier) && qk::tier_supported(tier)) std::cout << qk::tier_name(tier) << "\n";
        }
        return 0;
    }
    if (argc != 4) {
        std::cerr << "usage: qkern_driver tiers | qkern_driver TIER CASES OUTPUTS\n";
        return 2;
    }
    try {
        if (!activate(argv[1])) throw std::runtime_error(std::string("this machine cannot run tier ") + argv[1]);
        run_cases(argv[2], argv[3]);
    } catch (const std::exception& error) {
        std::cerr << "qkern_driver: " << error.what() << "\n";
        return 1;
    }
    return 0;
}
