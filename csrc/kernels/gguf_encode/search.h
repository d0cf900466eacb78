// What every search needs to begin with.
#pragma once
#include "lanes.h"

namespace {

constexpr float kNoFit = 3.0e38f;

struct Range {
    float low, high;
    // The value of largest magnitude, with its sign.
    float extreme() const { return -low > high ? low : high; }
};

inline Range range_of(const float* x, int n) {
    Lanes low = load(x), high = low;
    for (int i = kLanes; i < n; i += kLanes) {
        const Lanes v = load(x + i);
        low = select_less(v, low, v, low);
        high = select_less(high, v, v, high);
    }
    Range range{lane(low, 0), lane(high, 0)};
    for (int c = 1; c < kLanes; ++c) {
        range.low = lane(low, c) < range.low ? lane(low, c) : range.low;
        range.high = lane(high, c) > range.high ? lane(high, c) : range.high;
    }
    return range;
}

}  // namespace
