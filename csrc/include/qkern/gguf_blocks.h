// GGUF block types as they lie in a file: the on-disk truth, little-endian. Numbers are ggml's type ids.
//
//   type  weights  bytes  value of weight k
//   Q4_0    32      18    d * (q - 8)
//   Q4_1    32      20    d * q + m
//   Q5_0    32      22    d * (q - 16)
//   Q5_1    32      24    d * q + m
//   Q8_0    32      34    d * q
//   IQ4_NL  32      18    d * kIq4Values[q]
//   Q2_K   256      84    (d * scale[j]) * q - (dmin * min[j])      j = k / 16
//   Q3_K   256     110    (d * (scale[j] - 32)) * (q - 4)           j = k / 16
//   Q4_K   256     144    (d * scale[j]) * q - (dmin * min[j])      j = k / 32
//   Q5_K   256     176    (d * scale[j]) * q - (dmin * min[j])      j = k / 32
//   Q6_K   256     210    (d * scale[j]) * (q - 32)                 j = k / 16
//   IQ4_XS 256     136    (d * (scale[j] - 32)) * kIq4Values[q]     j = k / 32
//
// Nibbles: in a 32-block, and a run of 32 of IQ4_XS, byte i holds weight i (low) and weight i + 16 (high). In
// Q4_K and Q5_K byte 32 p + i holds weights 64 p + i (low) and 64 p + 32 + i (high). Fifth bits: bit i of qh
// in Q5_0 and Q5_1; bit j of qh[i] belongs to weight 32 j + i in Q5_K. Q6_K works in halves of 128: ql[64 h +
// i] holds weights 128 h + i and 128 h + 64 + i, bits 2 f and 2 f + 1 of qh[32 h + i] belong to weight 128 h
// + 32 f + i.
// The 6-bit scales and minima of Q4_K and Q5_K: bytes 0..3 and 4..7 hold scale[0..3] and min[0..3] in their
// low 6 bits and the top 2 bits of scale[4..7] and min[4..7] above them; bytes 8..11 hold the low nibbles
// of scale[4..7] (low) and min[4..7] (high).
// Q2_K and Q3_K work in halves of 128 too: bits 2 f and 2 f + 1 of qs[32 h + i] are the low bits of weight
// 128 h + 32 f + i; its third bit in Q3_K is bit 4 h + f of hmask[i]. A byte of scales of Q2_K is scale[j] (low) and
// min[j] (high). In Q3_K bytes 0..7 hold the low nibbles of scale[0..7] (low) and scale[8..15] (high), and bits 2 g
// and 2 g + 1 of byte 8 + i the top bits of scale[4 g + i]. In IQ4_XS nibble j of scales_l and bits 2 j and 2 j + 1
// of scales_h are scale[j].
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
    q2_k = 10,
    q3_k = 11,
    q4_k = 12,
    q5_k = 13,
    q6_k = 14,
    iq4_nl = 20,
    iq4_xs = 23,
    bf16 = 30,
};

// What the codes of IQ4_NL and IQ4_XS stand for: denser near zero, as weights are.
constexpr int kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

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

struct BlockIQ4_NL {
    uint16_t d;
    uint8_t qs[16];
};
static_assert(sizeof(BlockIQ4_NL) == 18 && offsetof(BlockIQ4_NL, qs) == 2, "IQ4_NL");

struct BlockQ2_K {
    uint8_t scales[16];
    uint8_t qs[64];
    uint16_t d, dmin;
};
static_assert(sizeof(BlockQ2_K) == 84 && offsetof(BlockQ2_K, qs) == 16 && offsetof(BlockQ2_K, d) == 80, "Q2_K");

struct BlockQ3_K {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint16_t d;
};
static_assert(sizeof(BlockQ3_K) == 110 && offsetof(BlockQ3_K, qs) == 32 && offsetof(BlockQ3_K, scales) == 96 &&
                  offsetof(BlockQ3_K, d) == 108,
              "Q3_K");

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

struct BlockIQ4_XS {
    uint16_t d;
    uint16_t scales_h;
    uint8_t scales_l[4];
    uint8_t qs[128];
};
static_assert(sizeof(BlockIQ4_XS) == 136 && offsetof(BlockIQ4_XS, scales_l) == 4 && offsetof(BlockIQ4_XS, qs) == 8,
              "IQ4_XS");

}  // namespace qk
