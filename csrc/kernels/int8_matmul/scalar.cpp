// Plain C++: the fallback of every CPU.
#include "qkern/lanes/scalar.h"

namespace {

struct Isa {
    static constexpr int kRows = 4;
    static constexpr int kVectors = 1;
    static constexpr int kTileM = 1;
    static constexpr int kBias = 0;

    using X = int8_t;
    struct I {
        int32_t lane[kRows];
    };
    struct Codes {
        uint8_t byte[4 * kRows];
    };
    struct Quad {
        int8_t byte[4];
    };

    static void place(const int8_t* codes, int64_t n, X* out) { memcpy(out, codes, static_cast<size_t>(n)); }
    static I load(const int32_t* at) {
        I out;
        memcpy(&out, at, sizeof out);
        return out;
    }
    static void store(int32_t* at, const I& value) { memcpy(at, &value, sizeof value); }
    static I zero() { return {}; }
    static I add(I a, const I& b) {
        for (int i = 0; i < kRows; ++i) {
            a.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i]));
        }
        return a;
    }
    static Codes load_codes(const uint8_t* at) {
        Codes out;
        memcpy(&out, at, sizeof out);
        return out;
    }
    static Quad load_quad(const X* at) {
        Quad out;
        memcpy(&out, at, sizeof out);
        return out;
    }
    static I dot(I sum, const Codes& codes, const Quad& quad) {
        for (int i = 0; i < kRows; ++i) {
            int32_t products = 0;
            for (int b = 0; b < 4; ++b) products += codes.byte[4 * i + b] * quad.byte[b];
            // Modulo 2^32 as in every tier: a sum on the way may pass what its end fits.
            sum.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(sum.lane[i]) + static_cast<uint32_t>(products));
        }
        return sum;
    }
};

}  // namespace

#include "tiles.h"

extern "C" void qk_enter_int8_matmul_scalar(qk::KernelTable* table) {
    table->int8_prepare = &prepare_int8;
    table->int8_matmul = &multiply_int8;
    table->int8_bytes = sizeof(X);
}
