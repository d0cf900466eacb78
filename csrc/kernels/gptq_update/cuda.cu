// One column block of GPTQ, four lanes a row. README.md beside this file has the formula and why it is cut this way.
#include <math.h>

#include "qkern/codebooks.h"
#include "qkern/cuda/kernels.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

using namespace qk::gpu;

constexpr int kLanes = 4;  // of a row: column c of a panel is in lane c % kLanes, register c / kLanes
constexpr int kThreads = 128;
constexpr int kBlockRows = kThreads / kLanes;
constexpr int kColumnBits = 7, kColumns = 1 << kColumnBits;  // most columns of a panel
constexpr int kRegisters = kColumns / kLanes;
constexpr int kStep = 8;  // registers that a row is shorter by when the loop over its columns changes

// What is added to and taken from a small float to round it to an integer, ties to even.
constexpr float kRounder = 12582912.0f;
constexpr uint32_t kRounderBits = 0x4b400000u;

// Within these bounds no step of `divide_fast` overflows, and none loses bits to underflow.
constexpr float kLargest = 1099511627776.0f;      // 2^40: weights, scales, the diagonal
constexpr float kSmallest = 1.0f / kLargest;      // scales, the diagonal
constexpr float kSmallestError = kSmallest * kSmallest;

struct Params {
    GptqUpdateArgs args;
    int panel_bits;  // 1 << panel_bits columns go together: kColumns, or half as many if shared memory is small
    float threshold[32];
    int32_t below[32];
    float sorted[16];
    float codes[16];
};

// Of the 32 cells of a codebook and its 16 entries those of this lane; Codebook in codebooks.h.
struct Cell {
    float threshold, level;
    int below, code;
};

// A row's group. `shift` makes a code of the bits of a rounded level + kRounder.
struct Grid {
    int group = -1;
    float scale, inverse, low, high;
    uint32_t shift;
};

// x / y, given y's reciprocal rounded to nearest: a quotient within 1.5 units of the last place, corrected to one
// within one, corrected to the nearest (Markstein's theorem). Each remainder is exact, and negated so that zeros keep
// their sign for a positive y.
QK_DEVICE float divide_fast(float x, float y, float inverse) {
    float q = mul(x, inverse);
    q = fused(fused(y, q, -x), -inverse, q);
    return fused(fused(y, q, -x), -inverse, q);
}

QK_DEVICE bool in_range(float x) { return fabsf(x) >= kSmallest && fabsf(x) <= kLargest; }

// Four lanes of a warp and their row.
template <bool kBook>
struct Row {
    const Params& p;
    const float* tile;     // hinv of the panel, [panel, panel]
    const float* inverse;  // reciprocals of its diagonal
    int64_t first;         // column of the panel
    int columns;           // of the panel that exist
    int64_t row;
    bool live;  // no row beyond the last one
    int lane;
    Cell cell;
    Grid grid{};
    float loss = 0.0f;
    bool bad = false;  // something was out of range of divide_fast

    QK_DEVICE int group_of(int c) const {
        return load_once(p.args.group_index + first + (c < columns ? c : columns - 1));
    }

    QK_DEVICE void read_grid(int group) {
        const int64_t at = row * p.args.groups + group;
        grid.group = group;
        grid.scale = load_once(p.args.scales + at);
        grid.inverse = divide(1.0f, grid.scale);
        bad = bad || !in_range(grid.scale);
        if constexpr (!kBook) {
            const uint32_t zero = load_once(p.args.zeros + at);
            grid.low = 0.0f - static_cast<float>(zero);
            grid.high = grid.low + static_cast<float>((1 << p.args.bits) - 1);
            grid.shift = zero - kRounderBits;
        }
    }

    // The level of x / scale before the scale, and its code. A NaN becomes the lowest.
    template <bool kFast>
    QK_DEVICE float level_of(float x, uint32_t& code) const {
        // Below half a step this quotient may be off, and the sign of its zero; neither is seen after rounding.
        const float q = kFast ? divide_fast(x, grid.scale, grid.inverse) : divide(x, grid.scale);
        if constexpr (kBook) {
            const float bounded = fminf(fmaxf(q, -1.0f), 0.96875f);  // no threshold lies beyond
            const int at = static_cast<int>(floorf(mul(bounded, 16.0f))) & 31;
            const int position = shuffle(cell.below, at) + (bounded > shuffle(cell.threshold, at) ? 1 : 0);
            code = static_cast<uint32_t>(shuffle(cell.code, position));
            return shuffle(cell.level, position);
        } else {
            // The ends of the grid are integers: clamping first gives the same.
            const float sum = add(fminf(fmaxf(q, grid.low), grid.high), kRounder);
            code = as_bits(sum) + grid.shift;
            return sub(sum, kRounder);
        }
    }

    // Columns of the panel in fours, from the r-th until the `stop`-th; w[i] holds those of four r + i, in kLeft
    // registers. x is the next column in all lanes.
    template <bool kFast, int kLeft>
    QK_DEVICE void advance(float (&w)[kRegisters], float& x, int& r, int stop) {
        const int mine = lane % kLanes, lead = lane - mine;
        int group = r < stop ? group_of(kLanes * r) : 0;
        for (; r < stop; ++r) {
            const int c = kLanes * r;
            if (group != grid.group) read_grid(group);
            if (kFast) group = group_of(c + kLanes);
            float my_error = 0.0f;
            uint32_t my_code = 0;
            QK_UNROLL for (int o = 0; o < kLanes; ++o) {
                const float* h = tile + ((c + o) << p.panel_bits) + c;
                // Broadcast before its last update, which then does not wait for it.
                const float next = shuffle(o + 1 < kLanes ? w[0] : w[1], lead + (o + 1) % kLanes);
                uint32_t code;
                const float level = level_of<kFast>(x, code);
                const float off = sub(x, mul(level, grid.scale));
                float error;
                if constexpr (kFast) {
                    bad = bad || !(fabsf(x) <= kLargest) || (fabsf(off) < kSmallestError && off != 0.0f);
                    error = divide_fast(off, h[o], inverse[c + o]);
                } else {
                    error = divide(off, h[o]);
                }
                x = sub(next, mul(error, h[o + 1]));
                QK_UNROLL for (int i = 0; i < kLeft; ++i) {
                    const float corrected = sub(w[i], mul(error, h[kLanes * i + mine]));
                    if (o + 1 < kLanes) {
                        w[i] = corrected;
                    } else if (i > 0) {
                        w[i - 1] = corrected;
                    }
                }
                if (c + o < columns) loss = add(loss, mul(error, error));
                my_error = mine == o ? error : my_error;
                my_code = mine == o ? code : my_code;
                if (!kFast) {
                    group = group_of(c + o + 1);
                    if (o + 1 < kLanes && group != grid.group) read_grid(group);
                }
            }
            if (live && c + mine < columns) {
                const int64_t column = first + c + mine;
                p.args.errors[row * p.args.B + column] = my_error;
                p.args.codes[row * p.args.codes_stride + column] = static_cast<uint8_t>(my_code);
            }
        }
    }

    // False if divide_fast was not exact: then nothing that was written or summed is valid. The same for all lanes.
    QK_DEVICE bool run_fast(float (&w)[kRegisters]) {
        for (int c = lane; c < columns; c += kWarp) {
            const float diagonal = tile[(c << p.panel_bits) + c];
            bad = bad || !(diagonal > 0.0f) || !in_range(diagonal);
            // Four columns share what is read of their group.
            bad = bad || group_of(c) != group_of(c - c % kLanes);
        }
        if (any(bad)) return false;
        const int all = (columns + kLanes - 1) / kLanes;
        float x = shuffle(w[0], lane - lane % kLanes);
        int r = 0;
        advance<true, kRegisters>(w, x, r, all - (kRegisters - kStep));
        advance<true, kRegisters - kStep>(w, x, r, all - (kRegisters - 2 * kStep));
        advance<true, kRegisters - 2 * kStep>(w, x, r, all - kStep);
        advance<true, kStep>(w, x, r, all);
        return !any(bad);
    }

    QK_DEVICE void run_exact(float (&w)[kRegisters]) {
        float x = shuffle(w[0], lane - lane % kLanes);
        int r = 0;
        advance<false, kRegisters>(w, x, r, (columns + kLanes - 1) / kLanes);
    }

    static QK_DEVICE bool any(bool mine) {
        int found = mine ? 1 : 0;
        QK_UNROLL for (int mask = kWarp / 2; mask; mask /= 2) found |= shuffle_xor(found, mask);
        return found != 0;
    }
};

static_assert(kRegisters == 4 * kStep, "run_fast has four loops");

// Rows [j, j + panel) and columns [k, k + panel) of hinv, zeros beyond its end; of a block on the diagonal not all of
// what lies below it.
QK_DEVICE void read_tile(const Params& p, int64_t j, int64_t k, float* tile) {
    const GptqUpdateArgs& args = p.args;
    const int panel = 1 << p.panel_bits, thread = static_cast<int>(threadIdx.x);
    if (args.B % 4 == 0 && reinterpret_cast<uintptr_t>(args.hinv) % 16 == 0) {
        const int line_bits = p.panel_bits - 2;
        for (int i = thread; i < panel << line_bits; i += kThreads) {
            const int row = i >> line_bits, column = 4 * (i - (row << line_bits));
            if (j == k && column + 3 < row) continue;
            const bool valid = j + row < args.B && k + column < args.B;
            const float* from = valid ? args.hinv + (j + row) * args.B + k + column : args.hinv;
            copy_async(reinterpret_cast<uint4*>(tile) + i, reinterpret_cast<const uint4*>(from), valid);
        }
        close_batch();
        wait_batches<0>();
    } else {
        for (int i = thread; i < panel * panel; i += kThreads) {
            const int64_t row = j + (i >> p.panel_bits), column = k + (i & (panel - 1));
            tile[i] = row < args.B && column < args.B ? load_once(args.hinv + row * args.B + column) : 0.0f;
        }
    }
}

// Shared memory: the tile, then as many floats as a register beyond the last column may be read from.
constexpr int tile_floats(int panel) { return panel * panel + kColumns; }

template <bool kBook>
QK_KERNEL void QK_BOUNDS(kThreads) update_rows(const Params p) {
    const GptqUpdateArgs& args = p.args;
    float* const tile = &shared<float>();
    const int panel = 1 << p.panel_bits;
    float* const inverse = tile + panel * panel;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, mine = lane % kLanes;
    const int64_t place = int64_t{blockIdx.x} * kBlockRows + thread / kLanes;
    const bool live = place < args.N;
    const int64_t n = live ? place : args.N - 1;
    Cell cell{};
    if (kBook) {
        cell = {p.threshold[lane], p.sorted[lane % 16], p.below[lane], static_cast<int>(p.codes[lane % 16])};
    }
    float loss = 0.0f;
    for (int64_t first = 0; first < args.B; first += panel) {
        const int columns = first + panel < args.B ? panel : static_cast<int>(args.B - first);
        float w[kRegisters];
        QK_UNROLL for (int i = 0; i < kRegisters; ++i) {
            const int c = kLanes * i + mine;
            w[i] = c < columns ? args.weight[n * args.weight_stride + first + c] : 0.0f;
        }
        // The errors of earlier panels, which these threads have written.
        for (int64_t earlier = 0; earlier < first; earlier += panel) {
            sync_block();
            read_tile(p, earlier, first, tile);
            sync_block();
            for (int j = 0; j < panel; ++j) {
                const float error = live ? args.errors[n * args.B + earlier + j] : 0.0f;
                const float* h = tile + j * panel + mine;
                QK_UNROLL for (int i = 0; i < kRegisters; ++i) w[i] = sub(w[i], mul(error, h[kLanes * i]));
            }
        }
        sync_block();
        read_tile(p, first, first, tile);
        sync_block();
        if (thread < panel) {
            float& diagonal = tile[thread * panel + thread];
            if (thread >= columns) diagonal = 1.0f;
            inverse[thread] = divide(1.0f, diagonal);
        }
        sync_block();
        Row<kBook> row{p, tile, inverse, first, columns, n, live, lane, cell};
        row.loss = loss;
        float copy[kRegisters];
        QK_UNROLL for (int i = 0; i < kRegisters; ++i) copy[i] = w[i];
        if (!row.run_fast(copy)) {
            row.loss = loss;
            row.run_exact(w);
        }
        loss = row.loss;
    }
    if (args.losses && live && mine == 0) args.losses[n] = loss;
}

}  // namespace

int gptq_update(const GptqUpdateArgs& args, void* stream) {
    if (args.N == 0 || args.B == 0) return 0;
    Params p{};
    p.args = args;
    p.panel_bits = kColumnBits;
    const auto bytes = [&] { return sizeof(float) * static_cast<size_t>(tile_floats(1 << p.panel_bits)); };
    if (args.narrow || bytes() > static_cast<size_t>(shared_limit())) p.panel_bits = kColumnBits - 1;
    const ::Codebook& book = args.codebook == 2 ? kFp4 : kNf4;
    for (int i = 0; i < 32; ++i) {
        p.threshold[i] = book.cells.threshold[i];
        p.below[i] = book.cells.below[i];
    }
    for (int i = 0; i < 16; ++i) {
        p.sorted[i] = book.sorted[i];
        p.codes[i] = book.codes[i];
    }
    Launch how{};
    how.grid = dim3(static_cast<unsigned>((args.N + kBlockRows - 1) / kBlockRows));
    how.threads = kThreads;
    how.shared_bytes = bytes();
    how.stream = static_cast<Stream>(stream);
    return args.codebook ? launch(how, update_rows<true>, p) : launch(how, update_rows<false>, p);
}

}  // namespace qk::cuda
