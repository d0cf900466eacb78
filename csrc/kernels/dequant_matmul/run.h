// The entry of a tier: tiles of the product, by the compute that the activations were prepared for.
#pragma once
#include "float.h"
#include "int8.h"

namespace {

void run_tiles(const qk::MatmulArgs& args, int64_t begin, int64_t end) {
    const int64_t panels = args.view->panel_count;
    const int64_t chunk = qk::matmul_chunk_rows(args.M);
    for (int64_t t = begin; t < end; ++t) {
        const int64_t first_m = t / panels * chunk;
        const int64_t M = args.M - first_m < chunk ? args.M - first_m : chunk;
        if (args.values) {
            run_float(args, t % panels, first_m, M);
        } else {
            run_int8(args, t % panels, first_m, M);
        }
    }
}

}  // namespace
