// Plain C++: the fallback of every CPU, and the packing that all tiers share.
#include "pack.h"
#include "prepare.h"
#include "qkern/kernels.h"

namespace {

struct Isa {
    static constexpr int kRows = 4;
    static constexpr int kVectors = 1;
    static constexpr int kDirectM = 1;
    static constexpr int kDirectRows = 1;
    static constexpr int kTileM = 1;
    static constexpr int kFloatM = 1;
    static constexpr int kPairQuads = 0;
    static constexpr bool kSignedWide = false;

    struct I {
        uint32_t lane[kRows];
    };
    struct F {
        float lane[kRows];
    };
    struct Table {
        const float* values;
    };

    template <class Function>
    static I each(Function function) {
        I out;
        for (int i = 0; i < kRows; ++i) out.lane[i] = function(i);
        return out;
    }
    template <class Function>
    static F each_f(Function function) {
        F out;
        for (int i = 0; i < kRows; ++i) out.lane[i] = function(i);
        return out;
    }

    static I load(const uint8_t* at) {
        I out;
        memcpy(&out, at, sizeof out);
        return out;
    }
    static I load_i(const int32_t* at) { return load(reinterpret_cast<const uint8_t*>(at)); }
    static void store(uint8_t* at, I value) { memcpy(at, &value, sizeof value); }
    static I splat(int32_t value) {
        return each([=](int) { return static_cast<uint32_t>(value); });
    }
    static I splat_byte(int value) { return splat(static_cast<int32_t>(0x01010101u * static_cast<uint32_t>(value))); }
    static I bit_and(I a, I b) {
        return each([&](int i) { return a.lane[i] & b.lane[i]; });
    }
    static I or_and(I a, I b, I c) {
        return each([&](int i) { return a.lane[i] | (b.lane[i] & c.lane[i]); });
    }
    static I bit_xor(I a, I b) {
        return each([&](int i) { return a.lane[i] ^ b.lane[i]; });
    }
    template <int SHIFT>
    static I shift_right(I a) {
        return each([&](int i) { return a.lane[i] >> SHIFT; });
    }
    template <int SHIFT>
    static I shift_left(I a) {
        return each([&](int i) { return a.lane[i] << SHIFT; });
    }
    static I sub(I a, I b) {
        return each([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    static I mul(I a, I b) {
        return each([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    template <int BYTE>
    static I byte(I a) {
        return each([&](int i) { return a.lane[i] >> (8 * BYTE) & 255u; });
    }
    static I load_quad(const int8_t* at) { return splat(static_cast<int32_t>(load_word(reinterpret_cast<const uint8_t*>(at)))); }
    template <bool WIDE>
    static I dot4(I sum, I codes, I quad) {
        return each([&](int i) {
            int32_t total = static_cast<int32_t>(sum.lane[i]);
            for (int b = 0; b < 4; ++b) {
                total += static_cast<int32_t>(codes.lane[i] >> (8 * b) & 255u) * static_cast<int8_t>(quad.lane[i] >> (8 * b));
            }
            return static_cast<uint32_t>(total);
        });
    }
    static I load_table(const uint8_t* bytes) {
        I out = splat(0);
        memcpy(&out, bytes, 16);
        return out;
    }
    static I lookup_bytes(I table, I codes) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(&table);
        return each([&](int i) {
            uint32_t out = 0;
            for (int b = 0; b < 4; ++b) out |= static_cast<uint32_t>(bytes[codes.lane[i] >> (8 * b) & 15u]) << (8 * b);
            return out;
        });
    }

    static F load_f(const float* at) {
        F out;
        memcpy(&out, at, sizeof out);
        return out;
    }
    static void store_f(float* at, F value) { memcpy(at, &value, sizeof value); }
    static F load_as_float(const uint8_t* at, qk::DType dtype) {
        return each_f([=](int i) { return load_float(at, dtype, i); });
    }
    static void store_as(void* at, qk::DType dtype, F value) {
        for (int i = 0; i < kRows; ++i) store_float(at, dtype, i, value.lane[i]);
    }
    static F splat_f(float value) {
        return each_f([=](int) { return value; });
    }
    static F to_float(I a) {
        return each_f([&](int i) { return static_cast<float>(static_cast<int32_t>(a.lane[i])); });
    }
    static F add(F a, F b) {
        return each_f([&](int i) { return a.lane[i] + b.lane[i]; });
    }
    static F sub_f(F a, F b) {
        return each_f([&](int i) { return a.lane[i] - b.lane[i]; });
    }
    static F mul_f(F a, F b) {
        return each_f([&](int i) { return a.lane[i] * b.lane[i]; });
    }
    static F fma(F a, F b, F c) {
        return each_f([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static Table load_float_table(const float* table) { return {table}; }
    template <int BYTE>
    static F lookup_floats(Table table, I codes) {
        return each_f([&](int i) { return table.values[codes.lane[i] >> (8 * BYTE) & 15u]; });
    }
};

}  // namespace

#include "run.h"

extern "C" void qk_enter_dequant_matmul_scalar(qk::KernelTable* table) {
    table->pack_panels = &move_panels<true>;
    table->unpack_panels = &move_panels<false>;
    table->matmul_prepare = &prepare_rows;
    table->matmul_run = &run_tiles;
    table->matmul_decode = &decode_panels;
}
