// The entry of a tier: tiles of the product, by the compute that the activations were prepared for.
#pragma once
#include "float.h"
#include "int8.h"

namespace {

void run_tiles(const qk::MatmulArgs& args, int64_t begin, int64_t end) {
    const int64_t chunks = args.M <= qk::kMatmulRows ? 1 : (args.M + qk::kMatmulRows - 1) / qk::kMatmulRows;
    for (int64_t t = begin; t < end; ++t) {
        const int64_t first_m = t % chunks * qk::kMatmulRows;
        const int64_t M = args.M - first_m < qk::kMatmulRows ? args.M - first_m : qk::kMatmulRows;
        if (args.values) {
            run_float(args, t / chunks, first_m, M);
        } else {
            run_int8(args, t / chunks, first_m, M);
        }
    }
}

}  // namespace
