// The 4-bit codebooks. The same numbers as python/qkern/ops/codebooks.py; a test compares them.
#pragma once
#include <math.h>
#include <stdint.h>

namespace {

// Thresholds by cells of a sixteenth: cell c, from c / 16 up to (c + 1) / 16, is at c mod 32.
struct Cells {
    float threshold[32];  // the only one in the cell, or infinite
    int32_t below[32];    // thresholds below the cell
};

struct Codebook {
    float values[16];       // by code
    float sorted[16];       // ascending, unused entries zero
    float thresholds[15];   // position of x in `sorted` = how many of these x is above
    float codes[16];        // code of each position
    Cells cells;            // of the thresholds
};

constexpr Codebook with_cells(Codebook book) {
    for (int at = 0; at < 32; ++at) {
        const float first = static_cast<float>(at < 16 ? at : at - 32) / 16.0f;
        book.cells.threshold[at] = HUGE_VALF;
        book.cells.below[at] = 0;
        for (float threshold : book.thresholds) {
            if (threshold < first) ++book.cells.below[at];
            else if (threshold < first + 0.0625f) book.cells.threshold[at] = threshold;
        }
    }
    return book;
}

// Every threshold is in a cell of its own.
constexpr bool cells_suffice(const Codebook& book) {
    int left = 0;
    for (float threshold : book.thresholds) left += threshold < HUGE_VALF ? 1 : 0;
    for (float threshold : book.cells.threshold) left -= threshold < HUGE_VALF ? 1 : 0;
    return left == 0;
}

// NF4: the 16 quantiles of QLoRA; codes are in ascending order. Thresholds are the midpoints.
constexpr Codebook kNf4 = with_cells({
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
     1.0f},
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
     -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
     0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
     1.0f},
    {-0.8480963706970215f, -0.6106328964233398f, -0.4599952697753906f, -0.33967941999435425f,
     -0.23460739850997925f, -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f,
     0.120255246758461f, 0.2035212516784668f, 0.2920137643814087f, 0.3893125355243683f, 0.5016634464263916f,
     0.6427869200706482f, 0.8614784479141235f},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {},
});

// FP4: sign, then the magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4 by the low three bits. Code 8 (minus
// zero) is never chosen. A tie goes to the smaller magnitude: a negative threshold is the float below the
// midpoint, so that "above" includes the midpoint itself.
constexpr Codebook kFp4 = with_cells({
    {0.0f, 0.0052083334885537624f, 0.6666666865348816f, 1.0f, 0.3333333432674408f, 0.5f, 0.1666666716337204f,
     0.25f, -0.0f, -0.0052083334885537624f, -0.6666666865348816f, -1.0f, -0.3333333432674408f, -0.5f,
     -0.1666666716337204f, -0.25f},
    {-1.0f, -0.6666666865348816f, -0.5f, -0.3333333432674408f, -0.25f, -0.1666666716337204f,
     -0.0052083334885537624f, 0.0f, 0.0052083334885537624f, 0.1666666716337204f, 0.25f, 0.3333333432674408f,
     0.5f, 0.6666666865348816f, 1.0f, 0.0f},
    {-0.833333432674408f, -0.583333432674408f, -0.416666716337204f, -0.291666716337204f, -0.208333358168602f,
     -0.0859375074505806f, -0.002604166977107525f, 0.0026041667442768812f, 0.0859375f, 0.2083333432674408f,
     0.2916666865348816f, 0.4166666865348816f, 0.5833333730697632f, 0.8333333730697632f, HUGE_VALF},
    {11, 10, 13, 12, 15, 14, 9, 0, 1, 6, 7, 4, 5, 2, 3, 0},
    {},
});

static_assert(cells_suffice(kNf4) && cells_suffice(kFp4), "two thresholds share a cell");

}  // namespace
