// pack_bits and unpack_bits. A warp takes a strip of one row, each lane 16 adjacent codes of it (8 where a code has
// three bits, so that four lanes have three words between them). Where words of one row are adjacent they go straight
// to memory; where words of adjacent rows are, a tile of them is turned in shared memory. README.md has the layouts.
#include "qkern/cuda/kernels.h"
#include "qkern/cuda/simt.h"

namespace qk::cuda {
namespace {

using namespace qk::gpu;

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kStrip = 16 * kWarp;  // codes
constexpr int kStripsOfWarp = 2;    // loads of both are on their way before the first is packed
constexpr int kTens = 10, kTensStrip = kTens * kWarp;
constexpr int kTurnedRows = kWarp;
constexpr int kAwqWords = kWarp, kAwqColumns = 128;

// Adjacent codes of a lane, read and written at once.
constexpr int codes_of_lane(int bits) { return bits == 3 ? 8 : 16; }

struct Params {
    uint8_t* codes;
    int64_t codes_stride, N, K;
    uint32_t* packed;
    int64_t words;     // of a row; of awq: of a column
    int* flag;         // null: nobody asks
    bool whole_codes;  // a lane's codes lie at a multiple of their size
    bool whole_words;  // so do the words that it makes of them
    unsigned tiles;    // blocks along the rows of codes, or, of turned layouts, along N
    int across;        // log2 of the warps that share a row
};

// ---- codes to bits and back ----------------------------------------------------------------------------

// Four codes, one to a byte, to 4 B adjacent bits.
template <int B>
QK_DEVICE uint32_t squeeze(uint32_t x) {
    if constexpr (B == 8) {
        return x;
    } else {
        constexpr uint32_t pair = (1u << (2 * B)) - 1, quad = (1u << (4 * B)) - 1;
        x = (x | x >> (8 - B)) & (pair * 0x00010001u);
        return (x | x >> (16 - 2 * B)) & quad;
    }
}

// The lowest 4 B bits to four codes.
template <int B>
QK_DEVICE uint32_t spread(uint32_t x) {
    if constexpr (B == 8) {
        return x;
    } else {
        constexpr uint32_t one = (1u << B) - 1, pair = (1u << (2 * B)) - 1, quad = (1u << (4 * B)) - 1;
        x &= quad;
        x = (x | x << (16 - 2 * B)) & (pair * 0x00010001u);
        return (x | x << (8 - B)) & (one * 0x01010101u);
    }
}

QK_DEVICE uint32_t squeeze_threes(const uint32_t* codes) { return squeeze<3>(codes[0]) | squeeze<3>(codes[1]) << 12; }

// Four lanes with 24 bits each hold three words: the word of lanes 0, 1 and 2 of four.
QK_DEVICE uint32_t join_lanes(uint32_t bits, int lane) {
    const uint32_t next = shuffle(bits, (lane + 1) % kWarp);
    const int j = lane % 4;
    return bits >> (8 * j) | next << (24 - 8 * j);
}

// The mirror image: lanes 0, 1 and 2 of four have a word, all get their 24 bits.
QK_DEVICE uint32_t split_lanes(uint32_t word, int lane) {
    const uint32_t before = shuffle(word, (lane + kWarp - 1) % kWarp);
    const uint64_t both = static_cast<uint64_t>(word) << 32 | before;
    return static_cast<uint32_t>(both << (8 * (lane % 4)) >> 32) & 0xffffffu;
}

// Four bytes of each of four words to four words of the first, second, third and fourth bytes.
QK_DEVICE void turn_bytes(uint32_t (&w)[4]) {
    const uint32_t a = byte_permute(w[0], w[1], 0x5140), b = byte_permute(w[2], w[3], 0x5140);
    const uint32_t c = byte_permute(w[0], w[1], 0x7362), d = byte_permute(w[2], w[3], 0x7362);
    w[0] = byte_permute(a, b, 0x5410);
    w[1] = byte_permute(a, b, 0x7632);
    w[2] = byte_permute(c, d, 0x5410);
    w[3] = byte_permute(c, d, 0x7632);
}

// ---- codes in memory ---------------------------------------------------------------------------------------

// 4 kItems codes, zeros beyond the `left` ones of the row.
template <int kItems>
QK_DEVICE void load_codes(const uint8_t* from, int64_t left, bool whole, uint32_t* codes) {
    if (whole && left >= 4 * kItems) {
        if constexpr (kItems == 4) {
            const uint4 v = load_stream(reinterpret_cast<const uint4*>(from));
            codes[0] = v.x, codes[1] = v.y, codes[2] = v.z, codes[3] = v.w;
        } else {
            const uint2 v = load_once(reinterpret_cast<const uint2*>(from));
            codes[0] = v.x, codes[1] = v.y;
        }
        return;
    }
    QK_UNROLL for (int i = 0; i < kItems; ++i) {
        codes[i] = 0;
        QK_UNROLL for (int j = 0; j < 4; ++j) {
            if (4 * i + j < left) codes[i] |= static_cast<uint32_t>(load_once(from + 4 * i + j)) << (8 * j);
        }
    }
}

QK_DEVICE void store_codes(uint8_t* to, uint32_t low, uint32_t high) {
    *reinterpret_cast<uint2*>(to) = uint2{low, high};
}

template <int B>
QK_DEVICE void load_strip(const uint8_t* from, int64_t left, bool whole, int lane, uint32_t (&codes)[4]) {
    if constexpr (B == 3) {
        load_codes<2>(from + 8 * lane, left - 8 * lane, whole, codes);
        load_codes<2>(from + kStrip / 2 + 8 * lane, left - kStrip / 2 - 8 * lane, whole, codes + 2);
    } else {
        load_codes<4>(from + 16 * lane, left - 16 * lane, whole, codes);
    }
}

template <int B>
QK_DEVICE void report(uint32_t all, int* flag) {
    if (B < 8 && (all & (0xffu >> B << B) * 0x01010101u) != 0 && flag) *flag = 1;
}

// Hands out the words of a strip that this lane makes, and where in the strip they begin.
template <int B, class Put>
QK_DEVICE void pack_strip(const uint32_t (&codes)[4], int lane, Put put) {
    if constexpr (B == 3) {
        QK_UNROLL for (int half = 0; half < 2; ++half) {
            const uint32_t word[1] = {join_lanes(squeeze_threes(codes + 2 * half), lane)};
            if (lane % 4 < 3) put(24 * half + lane / 4 * 3 + lane % 4, word);
        }
    } else {
        uint32_t words[B / 2] = {};
        QK_UNROLL for (int i = 0; i < 4; ++i) words[B * i / 8] |= squeeze<B>(codes[i]) << (4 * B * i % 32);
        put(lane * (B / 2), words);
    }
}

// Words that hold the codes of a lane.
template <int B>
constexpr int words_of_lane() {
    return B == 3 ? 2 : B / 2;
}

// Those of a strip of `left` codes: `take` fills an array with the words from a place in the strip on.
template <int B, class Take>
QK_DEVICE void take_strip(int64_t left, int lane, uint32_t (&words)[words_of_lane<B>()], Take take) {
    if constexpr (B == 3) {
        QK_UNROLL for (int half = 0; half < 2; ++half) {
            uint32_t word[1] = {0};
            if (lane % 4 < 3) take(24 * half + lane / 4 * 3 + lane % 4, word);
            words[half] = word[0];
        }
    } else {
        if (16 * lane < left) take(lane * (B / 2), words);
    }
}

// Writes what they hold, all codes of a lane at once.
template <int B>
QK_DEVICE void unpack_strip(uint8_t* to, int64_t left, int lane, const uint32_t (&words)[words_of_lane<B>()]) {
    if constexpr (B == 3) {
        QK_UNROLL for (int half = 0; half < 2; ++half) {
            const int k = half * (kStrip / 2) + 8 * lane;
            const uint32_t bits = split_lanes(words[half], lane);
            if (k < left) store_codes(to + k, spread<3>(bits), spread<3>(bits >> 12));
        }
    } else {
        if (16 * lane >= left) return;
        uint32_t codes[4];
        QK_UNROLL for (int i = 0; i < 4; ++i) codes[i] = spread<B>(words[B * i / 8] >> (4 * B * i % 32));
        *reinterpret_cast<uint4*>(to + 16 * lane) = make_uint4(codes[0], codes[1], codes[2], codes[3]);
    }
}

// Where they do not lie at a multiple of their size: one at a time, so that stores of adjacent lanes are adjacent.
template <int B, class Word>
QK_DEVICE void unpack_ragged(uint8_t* to, int64_t left, int lane, Word word) {
    for (int k = lane; k < kStrip && k < left; k += kWarp) {
        const int at = k * B / 32, shift = k * B % 32;
        uint32_t code = word(at) >> shift;
        if (B == 3 && shift > 32 - B) code |= word(at + 1) << (32 - shift);
        to[k] = static_cast<uint8_t>(code & ((1u << B) - 1));
    }
}

// ---- dense, words: a row's words are adjacent ------------------------------------------------------------------

// Row and first strip of a warp; of the warps of a block, 2^across are side by side in a row.
struct Place {
    int64_t row, strip;
    QK_DEVICE explicit Place(const Params& p) {
        const int warp = static_cast<int>(threadIdx.x) / kWarp, side = 1 << p.across;
        row = static_cast<int64_t>(blockIdx.x / p.tiles) * (kWarps >> p.across) + (warp >> p.across);
        strip = (static_cast<int64_t>(blockIdx.x % p.tiles) * side + warp % side) * kStripsOfWarp;
    }
};

template <int kCount>
QK_DEVICE void store_words(uint32_t* to, int64_t left, bool whole, const uint32_t (&words)[kCount]) {
    if constexpr (kCount == 4) {
        if (whole && left >= 4) {
            *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
            return;
        }
    } else if constexpr (kCount == 2) {
        if (whole && left >= 2) {
            *reinterpret_cast<uint2*>(to) = uint2{words[0], words[1]};
            return;
        }
    }
    QK_UNROLL for (int i = 0; i < kCount; ++i) {
        if (i < left) to[i] = words[i];
    }
}

template <int kCount>
QK_DEVICE void load_words(const uint32_t* from, int64_t left, bool whole, uint32_t (&words)[kCount]) {
    if constexpr (kCount == 4) {
        if (whole && left >= 4) {
            const uint4 v = load_stream(reinterpret_cast<const uint4*>(from));
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
            return;
        }
    } else if constexpr (kCount == 2) {
        if (whole && left >= 2) {
            const uint2 v = load_once(reinterpret_cast<const uint2*>(from));
            words[0] = v.x, words[1] = v.y;
            return;
        }
    }
    QK_UNROLL for (int i = 0; i < kCount; ++i) words[i] = i < left ? load_once(from + i) : 0;
}

template <int B>
QK_KERNEL void QK_BOUNDS(kThreads) pack_rows(const Params p) {
    const Place place(p);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (place.row >= p.N || place.strip * kStrip >= p.K) return;
    const uint8_t* from = p.codes + place.row * p.codes_stride;
    uint32_t* to = p.packed + place.row * p.words;
    uint32_t codes[kStripsOfWarp][4], all = 0;
    QK_UNROLL for (int s = 0; s < kStripsOfWarp; ++s) {
        const int64_t k = (place.strip + s) * kStrip;
        load_strip<B>(from + k, p.K - k, p.whole_codes, lane, codes[s]);
    }
    QK_UNROLL for (int s = 0; s < kStripsOfWarp; ++s) {
        const int64_t first = (place.strip + s) * (kStrip * B / 32);
        QK_UNROLL for (int i = 0; i < 4; ++i) all |= codes[s][i];
        pack_strip<B>(codes[s], lane, [&](int at, const auto& words) {
            store_words(to + first + at, p.words - first - at, p.whole_words, words);
        });
    }
    report<B>(all, p.flag);
}

template <int B>
QK_KERNEL void QK_BOUNDS(kThreads) unpack_rows(const Params p) {
    constexpr int kWords = kStrip * B / 32;
    const Place place(p);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (place.row >= p.N || place.strip * kStrip >= p.K) return;
    const uint32_t* from = p.packed + place.row * p.words + place.strip * kWords;
    const int64_t words_left = p.words - place.strip * kWords, left = p.K - place.strip * kStrip;
    uint8_t* to = p.codes + place.row * p.codes_stride + place.strip * kStrip;
    if (!p.whole_codes) {
        for (int s = 0; s < kStripsOfWarp; ++s) {
            unpack_ragged<B>(to + s * kStrip, left - s * kStrip, lane,
                             [&](int at) { return load_once(from + s * kWords + at); });
        }
        return;
    }
    uint32_t words[kStripsOfWarp][words_of_lane<B>()];
    QK_UNROLL for (int s = 0; s < kStripsOfWarp; ++s) {
        take_strip<B>(left - s * kStrip, lane, words[s], [&](int at, auto& out) {
            load_words(from + s * kWords + at, words_left - s * kWords - at, p.whole_words, out);
        });
    }
    QK_UNROLL for (int s = 0; s < kStripsOfWarp; ++s) {
        unpack_strip<B>(to + s * kStrip, left - s * kStrip, lane, words[s]);
    }
}

// Ten 3-bit codes to a word: 320 codes are 40 pieces of eight and 32 words, one of each lane. Eight lanes have a
// second piece.

// The value of piece `i`, of those that lanes have first and second.
QK_DEVICE uint32_t piece(uint32_t first, uint32_t second, int i) {
    const uint32_t a = shuffle(first, i % kWarp), b = shuffle(second, i % kWarp);
    return i < kWarp ? a : b;
}

QK_KERNEL void QK_BOUNDS(kThreads) pack_tens(const Params p) {
    const Place place(p);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (place.row >= p.N || place.strip * kTensStrip >= p.K) return;
    const uint8_t* from = p.codes + place.row * p.codes_stride;
    uint32_t* to = p.packed + place.row * p.words;
    uint32_t codes[kStripsOfWarp][4], all = 0;
    QK_UNROLL for (int s = 0; s < kStripsOfWarp; ++s) {
        const int64_t k = (place.strip + s) * kTensStrip + 8 * lane;
        const int64_t beyond = lane < 8 ? p.K - k - 8 * kWarp : 0;
        load_codes<2>(from + k, p.K - k, p.whole_codes, codes[s]);
        load_codes<2>(from + k + 8 * kWarp, beyond, p.whole_codes, codes[s] + 2);
    }
    QK_UNROLL for (int s = 0; s < kStripsOfWarp; ++s) {
        QK_UNROLL for (int i = 0; i < 4; ++i) all |= codes[s][i];
        const uint32_t first = squeeze_threes(codes[s]), second = squeeze_threes(codes[s] + 2);
        // Ten codes from 10 `lane` on lie in two pieces always: they begin at an even place of the first.
        const int begin = kTens * lane, at = begin / 8, skip = 3 * (begin % 8);
        const uint32_t low = piece(first, second, at), high = piece(first, second, at + 1);
        const int64_t w = (place.strip + s) * kWarp + lane;
        if (w < p.words) to[w] = (low >> skip | high << (24 - skip)) & 0x3fffffffu;
    }
    report<3>(all, p.flag);
}

QK_KERNEL void QK_BOUNDS(kThreads) unpack_tens(const Params p) {
    const Place place(p);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (place.row >= p.N || place.strip * kTensStrip >= p.K) return;
    const uint32_t* from = p.packed + place.row * p.words;
    uint8_t* to = p.codes + place.row * p.codes_stride;
    QK_UNROLL for (int s = 0; s < kStripsOfWarp; ++s) {
        const int64_t first = (place.strip + s) * kWarp, k = (place.strip + s) * kTensStrip;
        const uint32_t word = first + lane < p.words ? load_once(from + first + lane) : 0;
        if (p.whole_codes) {
            QK_UNROLL for (int half = 0; half < 2; ++half) {
                const int begin = 8 * (lane + half * kWarp), at = begin / kTens, skip = 3 * (begin % kTens);
                const uint32_t low = shuffle(word, at % kWarp), high = shuffle(word, (at + 1) % kWarp);
                const uint32_t bits = (low & 0x3fffffffu) >> skip | high << (30 - skip);
                if (begin < kTensStrip && k + begin < p.K) {
                    store_codes(to + k + begin, spread<3>(bits), spread<3>(bits >> 12));
                }
            }
        } else {
            for (int begin = 0; begin < kTensStrip; begin += kWarp) {
                const int i = begin + lane;
                const uint32_t bits = shuffle(word, i / kTens) >> (3 * (i % kTens));
                if (k + i < p.K) to[k + i] = static_cast<uint8_t>(bits & 7);
            }
        }
    }
}

// ---- gptq: words of adjacent rows are adjacent -------------------------------------------------------------------

// Words of a strip of 32 rows. Row and word are exchanged without two lanes in one bank: lanes write words of one
// row, 1, 2 or 4 apart, and read rows of one word.
template <int B>
struct Turned {
    static constexpr int kWords = kStrip * B / 32;
    uint32_t words[kWords][kTurnedRows];
    QK_DEVICE uint32_t& at(int word, int row) { return words[word][row ^ (word / (B == 3 ? 1 : B / 2) % kTurnedRows)]; }
};

template <int B>
QK_KERNEL void QK_BOUNDS(kThreads) pack_turned(const Params p) {
    auto& tile = shared<Turned<B>>();
    constexpr int kRows = kTurnedRows / kWarps;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t n = static_cast<int64_t>(blockIdx.x % p.tiles) * kTurnedRows;
    const int64_t strip = blockIdx.x / p.tiles, k = strip * kStrip, first = strip * Turned<B>::kWords;
    uint32_t codes[kRows][4], all = 0;
    QK_UNROLL for (int i = 0; i < kRows; ++i) {
        const int64_t row = n + warp * kRows + i;
        load_strip<B>(p.codes + row * p.codes_stride + k, row < p.N ? p.K - k : 0, p.whole_codes, lane, codes[i]);
    }
    QK_UNROLL for (int i = 0; i < kRows; ++i) {
        QK_UNROLL for (int j = 0; j < 4; ++j) all |= codes[i][j];
        pack_strip<B>(codes[i], lane, [&](int at, const auto& words) {
            constexpr int kCount = sizeof words / 4;
            QK_UNROLL for (int j = 0; j < kCount; ++j) tile.at(at + j, warp * kRows + i) = words[j];
        });
    }
    report<B>(all, p.flag);
    sync_block();
    QK_UNROLL for (int i = 0; i < Turned<B>::kWords / kWarps; ++i) {
        const int w = warp + i * kWarps;
        if (first + w < p.words && n + lane < p.N) p.packed[(first + w) * p.N + n + lane] = tile.at(w, lane);
    }
}

template <int B>
QK_KERNEL void QK_BOUNDS(kThreads) unpack_turned(const Params p) {
    auto& tile = shared<Turned<B>>();
    constexpr int kRows = kTurnedRows / kWarps, kLoads = Turned<B>::kWords / kWarps;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t n = static_cast<int64_t>(blockIdx.x % p.tiles) * kTurnedRows;
    const int64_t strip = blockIdx.x / p.tiles, k = strip * kStrip, first = strip * Turned<B>::kWords;
    QK_UNROLL for (int i = 0; i < kLoads; ++i) {
        const int w = warp + i * kWarps;
        const bool inside = first + w < p.words && n + lane < p.N;
        tile.at(w, lane) = inside ? load_once(p.packed + (first + w) * p.N + n + lane) : 0;
    }
    sync_block();
    QK_UNROLL for (int i = 0; i < kRows; ++i) {
        const int r = warp * kRows + i;
        const int64_t row = n + r;
        if (row >= p.N) break;
        uint8_t* to = p.codes + row * p.codes_stride + k;
        if (!p.whole_codes) {
            unpack_ragged<B>(to, p.K - k, lane, [&](int at) { return tile.at(at, r); });
            continue;
        }
        uint32_t words[words_of_lane<B>()];
        take_strip<B>(p.K - k, lane, words, [&](int at, auto& out) {
            constexpr int kCount = sizeof out / 4;
            QK_UNROLL for (int j = 0; j < kCount; ++j) out[j] = tile.at(at + j, r);
        });
        unpack_strip<B>(to, p.K - k, lane, words);
    }
}

// ---- awq: eight rows to a word, words of one column adjacent --------------------------------------------------------

// 32 words of 128 columns: lanes write 16 columns eight apart of two words, and read words of one column.
struct AwqTile {
    uint32_t words[kAwqColumns][kAwqWords];
    QK_DEVICE uint32_t& at(int column, int word) { return words[column][word ^ (column / 8 * 2)]; }
};
constexpr int kAwqPasses = kAwqWords / (2 * kWarps);

QK_DEVICE constexpr int awq_row(int nibble) { return nibble < 4 ? 2 * nibble : 2 * nibble - 7; }

QK_KERNEL void QK_BOUNDS(kThreads) pack_awq(const Params p) {
    auto& tile = shared<AwqTile>();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t first = static_cast<int64_t>(blockIdx.x % p.tiles) * kAwqWords;
    const int64_t k = static_cast<int64_t>(blockIdx.x / p.tiles) * kAwqColumns;
    const int column = 8 * (lane % 16);
    uint32_t all = 0;
    QK_UNROLL for (int pass = 0; pass < kAwqPasses; ++pass) {
        const int word = 2 * (pass * kWarps + warp) + lane / 16;
        const uint8_t* from = p.codes + 8 * (first + word) * p.codes_stride + k + column;
        const int64_t left = first + word < p.words ? p.K - k - column : 0;
        uint32_t codes[8][2];
        QK_UNROLL for (int r = 0; r < 8; ++r) load_codes<2>(from + r * p.codes_stride, left, p.whole_codes, codes[r]);
        QK_UNROLL for (int half = 0; half < 2; ++half) {
            uint32_t bytes[4];  // of the word: nibbles of two rows, for four columns
            QK_UNROLL for (int b = 0; b < 4; ++b) {
                const uint32_t low = codes[awq_row(2 * b)][half], high = codes[awq_row(2 * b + 1)][half];
                all |= low | high;
                bytes[b] = low | high << 4;
            }
            turn_bytes(bytes);
            QK_UNROLL for (int c = 0; c < 4; ++c) tile.at(column + 4 * half + c, word) = bytes[c];
        }
    }
    report<4>(all, p.flag);
    sync_block();
    if (first + lane >= p.words) return;
    QK_UNROLL for (int i = 0; i < kAwqColumns / kWarps; ++i) {
        const int c = i * kWarps + warp;
        if (k + c < p.K) p.packed[(k + c) * p.words + first + lane] = tile.at(c, lane);
    }
}

QK_KERNEL void QK_BOUNDS(kThreads) unpack_awq(const Params p) {
    auto& tile = shared<AwqTile>();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    const int64_t first = static_cast<int64_t>(blockIdx.x % p.tiles) * kAwqWords;
    const int64_t k = static_cast<int64_t>(blockIdx.x / p.tiles) * kAwqColumns;
    QK_UNROLL for (int i = 0; i < kAwqColumns / kWarps; ++i) {
        const int c = i * kWarps + warp;
        const bool inside = k + c < p.K && first + lane < p.words;
        tile.at(c, lane) = inside ? load_once(p.packed + (k + c) * p.words + first + lane) : 0;
    }
    sync_block();
    uint8_t* to = p.codes + 8 * first * p.codes_stride + k;
    if (!p.whole_codes) {
        // A code at a time, so that stores of adjacent lanes are adjacent.
        for (int row = warp; row < 8 * kAwqWords && row / 8 < p.words - first; row += kWarps) {
            const int nibble = row % 2 * 4 + row % 8 / 2;  // the inverse of awq_row
            for (int c = lane; c < kAwqColumns && k + c < p.K; c += kWarp) {
                to[row * p.codes_stride + c] = static_cast<uint8_t>(tile.at(c, row / 8) >> (4 * nibble) & 15);
            }
        }
        return;
    }
    const int column = 8 * (lane % 16);
    if (k + column >= p.K) return;
    QK_UNROLL for (int pass = 0; pass < kAwqPasses; ++pass) {
        const int word = 2 * (pass * kWarps + warp) + lane / 16;
        if (first + word >= p.words) return;
        uint32_t bytes[2][4];
        QK_UNROLL for (int half = 0; half < 2; ++half) {
            QK_UNROLL for (int c = 0; c < 4; ++c) bytes[half][c] = tile.at(column + 4 * half + c, word);
            turn_bytes(bytes[half]);
        }
        QK_UNROLL for (int i = 0; i < 8; ++i) {
            const uint32_t low = bytes[0][i / 2] >> (4 * (i % 2)), high = bytes[1][i / 2] >> (4 * (i % 2));
            uint8_t* row = to + (8 * word + awq_row(i)) * p.codes_stride;
            store_codes(row + column, low & 0x0f0f0f0fu, high & 0x0f0f0f0fu);
        }
    }
}

// ---- launching ----------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 0 is a grid that no device takes, which the launch then reports.
dim3 grid_of(int64_t blocks) { return dim3(blocks < (int64_t{1} << 31) ? static_cast<unsigned>(blocks) : 0u); }

bool multiple(const void* address, int64_t step, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0 && step % bytes == 0;
}

using Kernel = void (*)(Params);

template <int B>
Kernel rows_kernel(bool pack) {
    return pack ? pack_rows<B> : unpack_rows<B>;
}
template <int B>
Kernel turned_kernel(bool pack) {
    return pack ? pack_turned<B> : unpack_turned<B>;
}

int by_rows(Kernel kernel, int strip, Launch how, Params p) {
    const int64_t warps = ceil_div(ceil_div(p.K, strip), kStripsOfWarp);
    while ((1 << p.across) < kWarps && (1 << p.across) < warps) ++p.across;
    const int64_t tiles = ceil_div(warps, int64_t{1} << p.across);
    p.tiles = static_cast<unsigned>(tiles);
    how.grid = grid_of(tiles * ceil_div(p.N, kWarps >> p.across));
    return launch(how, kernel, p);
}

int by_tiles(Kernel kernel, int64_t tiles, int64_t columns, size_t shared_bytes, Launch how, Params p) {
    p.tiles = static_cast<unsigned>(tiles);
    how.grid = grid_of(tiles * ceil_div(p.K, columns));
    how.shared_bytes = shared_bytes;
    return launch(how, kernel, p);
}

int run(const PackBitsArgs& args, bool pack, void* stream) {
    if (args.N == 0 || args.K == 0) return 0;
    const int bits = args.bits;
    const bool tens = args.layout == BitLayout::words && bits == 3;  // else the same as dense
    const int codes = args.layout == BitLayout::awq ? 8 : codes_of_lane(bits);
    Params p{};
    p.codes = args.codes;
    p.codes_stride = args.codes_stride;
    p.N = args.N;
    p.K = args.K;
    p.packed = args.packed;
    p.words = args.layout == BitLayout::awq ? args.N / 8 : tens ? ceil_div(args.K, kTens) : ceil_div(args.K * bits, 32);
    p.flag = args.flag;
    // Packing fills a row's last codes up with zeros; unpacking has no place for more codes than a row has.
    p.whole_codes = multiple(args.codes, args.codes_stride, codes) && (pack || args.K % codes == 0);
    p.whole_words = bits != 3 && multiple(args.packed, 4 * p.words, codes * bits / 8);
    Launch how{};
    how.threads = kThreads;
    how.stream = static_cast<Stream>(stream);
    if (args.layout == BitLayout::awq) {
        const int64_t tiles = ceil_div(p.words, kAwqWords);
        return by_tiles(pack ? pack_awq : unpack_awq, tiles, kAwqColumns, sizeof(AwqTile), how, p);
    }
    if (tens) return by_rows(pack ? pack_tens : unpack_tens, kTensStrip, how, p);
    if (args.layout == BitLayout::gptq) {
        const int64_t tiles = ceil_div(args.N, kTurnedRows);
        switch (bits) {
            case 2: return by_tiles(turned_kernel<2>(pack), tiles, kStrip, sizeof(Turned<2>), how, p);
            case 3: return by_tiles(turned_kernel<3>(pack), tiles, kStrip, sizeof(Turned<3>), how, p);
            case 4: return by_tiles(turned_kernel<4>(pack), tiles, kStrip, sizeof(Turned<4>), how, p);
            default: return by_tiles(turned_kernel<8>(pack), tiles, kStrip, sizeof(Turned<8>), how, p);
        }
    }
    switch (bits) {
        case 2: return by_rows(rows_kernel<2>(pack), kStrip, how, p);
        case 3: return by_rows(rows_kernel<3>(pack), kStrip, how, p);
        case 4: return by_rows(rows_kernel<4>(pack), kStrip, how, p);
        default: return by_rows(rows_kernel<8>(pack), kStrip, how, p);
    }
}

}  // namespace

int pack_bits(const PackBitsArgs& args, void* stream) { return run(args, true, stream); }
int unpack_bits(const PackBitsArgs& args, void* stream) { return run(args, false, stream); }

}  // namespace qk::cuda
