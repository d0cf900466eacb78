// GGUF block types as they lie in a file: the on-disk truth, little-endian. Numbers are ggml's type ids.
//
//   type  weights  bytes  value of weight k
//   Q4_0    32      18    d * (q - 8)
//   Q4_1    32      20    d * q + m
//   Q5_0    32      22    d * (q - 16)
//   Q5_1    32      24    d * q + m
//   Q8_0    32      34    d * q
//   Q4_K   256     144    (d * scale[j]) * q - (dmin * min[j])      j = k / 32
//   Q5_K   256     176    (d * scale[j]) * q - (dmin * min[j])      j = k / 32
//   Q6_K   256     210    (d * scale[j]) * (q - 32)                 j = k / 16
//
// Nibbles: in a 32-block byte i holds weight i (low) and weight i + 16 (high). In Q4_K and Q5_K byte
// 32 p + i holds weights 64 p + i (low) and 64 p + 32 + i (high). Fifth bits: bit i of qh in Q5_0 and Q5_1;
// bit j of qh[i] belongs to weight 32 j + i in Q5_K. Q6_K works in halves of 128: ql[64 h + i] holds weights
// 128 h + i and 128 h + 64 + i, bits 2 f and 2 f + 1 of qh[32 h + i] belong to weight 128 h + 32 f + i.
// The 6-bit scales and minima of Q4_K and Q5_K: bytes 0..3 and 4..7 hold scale[0..3] and min[0..3] in their
// low 6 bits and the top 2 bits of scale[4..7] and min[4..7] above them; bytes 8..11 hold the low nibbles
// of scale[4..7] (low) and min[4..7] (high).
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace qk {

enum class GgufType : int {
    f16 = 1,
    q4_0 = 2,
    q4_1 = 3,
    q5_0 = 6,
    q5_1 = 7,
    q8_0 = 8,
    q4_k = 12,
    q5_k = 13,
    q6_k = 14,
    bf16 = 30,
};

struct BlockQ4_0 {
    uint16_t d;
    uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_0) == 18 && offsetof(BlockQ4_0, qs) == 2, "Q4_0");

struct BlockQ4_1 {
    uint16_t d, m;
    uint8_t qs[16];
};
static_assert(sizeof(BlockQ4_1) == 20 && offsetof(BlockQ4_1, qs) == 4, "Q4_1");

struct BlockQ5_0 {
    uint16_t d;
    uint8_t qh[4];
    uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_0) == 22 && offsetof(BlockQ5_0, qh) == 2 && offsetof(BlockQ5_0, qs) == 6, "Q5_0");

struct BlockQ5_1 {
    uint16_t d, m;
    uint8_t qh[4];
    uint8_t qs[16];
};
static_assert(sizeof(BlockQ5_1) == 24 && offsetof(BlockQ5_1, qh) == 4 && offsetof(BlockQ5_1, qs) == 8, "Q5_1");

struct BlockQ8_0 {
    uint16_t d;
    int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34 && offsetof(BlockQ8_0, qs) == 2, "Q8_0");

struct BlockQ4_K {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qs[128];
};
static_assert(sizeof(BlockQ4_K) == 144 && offsetof(BlockQ4_K, scales) == 4 && offsetof(BlockQ4_K, qs) == 16, "Q4_K");

struct BlockQ5_K {
    uint16_t d, dmin;
    uint8_t scales[12];
    uint8_t qh[32];
    uint8_t qs[128];
};
static_assert(sizeof(BlockQ5_K) == 176 && offsetof(BlockQ5_K, qh) == 16 && offsetof(BlockQ5_K, qs) == 48, "Q5_K");

struct BlockQ6_K {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;
};
static_assert(sizeof(BlockQ6_K) == 210 && offsetof(BlockQ6_K, qh) == 128 && offsetof(BlockQ6_K, scales) == 192 &&
                  offsetof(BlockQ6_K, d) == 208,
              "Q6_K");

}  // namespace qk
