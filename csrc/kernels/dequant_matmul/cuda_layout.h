// The CUDA layout of a quantized weight, "cuda.m64": one copy for every number of activations.
//
//   codes | scales | zeros or offsets           each at a multiple of 256 bytes
//
// Columns are in group order, every group padded with zeros of x to the same multiple of 32, all of them to whole
// tiles of 64. A panel is 64 rows; its tiles follow one another along K, so a warp reads one run of memory. A tile is
// `bits` lines of 32 lanes of 16 bytes, each lane's codes being those of its registers in the mma instructions that
// multiply the tile: block i of 16 rows, step s of 16 columns, register j (a0 .. a3), its low and its high half.
// With g = lane / 4 and t = lane % 4 such a half is
//
//   row     16 i + g + 8 (j % 2)
//   column  32 (s / 2) + 8 t + 4 (s % 2) + 2 (j / 2) + (1 if the high half)
//
// so that a lane reads eight adjacent columns of x at a time. Where the code lies, word w of line u:
//
//   8 bits   u = 2 i + s / 2      w = 2 (s % 2) + j / 2          byte 2 (j % 2), the high half in the next
//   4 bits   u = i                w = s                          nibble j, the high half at j + 4
//   a codebook                    the same word                  nibble 2 j, the high half in the next
//   2 bits   u = i / 2            w = 2 (i % 2) + s / 2          bits 2 (4 (s % 2) + j) and the next, the high half
//                                                                16 bits further
//   3 bits   two bits as above, the third in line 2, word i, at bit third_bit(4 s + j), the high half 16 further
//
// so that one AND leaves two codes where a 16-bit float has the end of its fraction. Scales, zeros and offsets are
// [panel][group][g][2 i + (1 for the rows from 8)]: what a lane needs is adjacent.
#pragma once
#include <stdint.h>

namespace qk::cuda {

constexpr int kPanelRows = 64;
constexpr int kTileColumns = 64;
constexpr int kBlocks = 4;  // of 16 rows
constexpr int kSteps = 4;   // of 16 columns

// Register r = 0 .. 15: four lie two bits apart, right above where the low two bits of the same registers are masked;
// the others one, eight or nine bits further, around the end.
constexpr int third_bit(int r) { return (2 + 2 * (r % 4) + (r / 4) % 2 + 8 * (r / 8)) % 16; }

constexpr int64_t tile_bytes(int bits) { return int64_t{512} * bits; }
constexpr int64_t tiles_of(int64_t groups, int64_t group_columns) {
    return (groups * group_columns + kTileColumns - 1) / kTileColumns;
}

}  // namespace qk::cuda
