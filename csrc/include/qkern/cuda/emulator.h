// The half of simt.h for a plain C++ compiler: blocks run one after another (those of a cluster together), their
// threads as fibers that take turns at barriers and warp-wide calls. The order of turns changes with a seed, so a
// barrier that is missing shows as a result that changes; threads that wait for others that never come are an error.
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace qk::gpu {

using Stream = void*;

constexpr int kErrorBadLaunch = 1;
constexpr int kErrorDeadlock = 2;

// A meeting of a fixed number of threads.
struct Meeting {
    int expected = 0, arrived = 0;
    unsigned generation = 0;
};

struct Warp {
    Meeting meeting;
    alignas(16) unsigned char slots[32][64];
};

struct Block {
    dim3 index;
    unsigned rank = 0;
    Meeting meeting;
    std::vector<Warp> warps;
    std::unique_ptr<unsigned char[]> memory;
    unsigned char* shared = nullptr;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    Block* block = nullptr;
    int thread = 0;
    bool done = false;
    // Copies that were asked for and not waited for, in batches; the last is open.
    struct Copy {
        void* to;
        const void* from;
        size_t bytes, zeros;
    };
    std::deque<std::vector<Copy>> batches;
};

class Emulator {
  public:
    static Emulator& instance() {
        static Emulator one;
        return one;
    }

    uint64_t seed = 0;  // of the order of turns; 0: in order
    bool small = false;  // as sm_75: 64 KiB of shared memory, and copies that the thread itself waits for

    size_t shared_limit() const { return small ? 64u << 10 : 227u << 10; }

    Block& block() { return *now_->block; }
    Warp& warp() { return now_->block->warps[static_cast<size_t>(now_->thread / 32)]; }
    int lane() const { return now_->thread % 32; }
    Fiber& fiber() { return *now_; }
    Block& peer(unsigned rank) { return blocks_[rank]; }

    void meet(Meeting& meeting) {
        const unsigned before = meeting.generation;
        progress_ = true;
        if (++meeting.arrived == meeting.expected) {
            meeting.arrived = 0;
            ++meeting.generation;
        }
        while (meeting.generation == before) swapcontext(&now_->context, &scheduler_);
    }
    void meet_cluster() { meet(cluster_); }

    int run(dim3 grid, int threads, size_t shared_bytes, unsigned cluster, std::function<void()> body) {
        if (threads <= 0 || threads % 32 != 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
            grid.x % cluster != 0 || shared_bytes > shared_limit() || grid.y > 65535 || grid.z > 65535) {
            return kErrorBadLaunch;
        }
        body_ = std::move(body);
        gridDim = grid;
        blockDim = dim3(static_cast<unsigned>(threads));
        for (unsigned z = 0; z < grid.z; ++z) {
            for (unsigned y = 0; y < grid.y; ++y) {
                for (unsigned x = 0; x < grid.x; x += cluster) {
                    const int status = run_cluster(dim3(x, y, z), threads, shared_bytes, cluster);
                    if (status != 0) return status;
                }
            }
        }
        return 0;
    }

  private:
    static constexpr size_t kStack = 128 << 10;

    int run_cluster(dim3 first, int threads, size_t shared_bytes, unsigned cluster) {
        blocks_.clear();
        blocks_.resize(cluster);
        cluster_ = {static_cast<int>(cluster) * threads, 0, 0};
        fibers_.resize(static_cast<size_t>(cluster) * static_cast<size_t>(threads));
        for (unsigned rank = 0; rank < cluster; ++rank) {
            Block& block = blocks_[rank];
            block.index = dim3(first.x + rank, first.y, first.z);
            block.rank = rank;
            block.meeting.expected = threads;
            block.warps.resize(static_cast<size_t>(threads) / 32);
            for (Warp& warp : block.warps) warp.meeting.expected = 32;
            block.memory.reset(new unsigned char[shared_bytes + 128]);
            memset(block.memory.get(), 0xff, shared_bytes + 128);  // NaN to whoever reads before writing
            const auto at = reinterpret_cast<uintptr_t>(block.memory.get());
            block.shared = reinterpret_cast<unsigned char*>((at + 127) / 128 * 128);
            for (int t = 0; t < threads; ++t) {
                Fiber& fiber = fibers_[static_cast<size_t>(rank) * static_cast<size_t>(threads) + static_cast<size_t>(t)];
                fiber.block = &block;
                fiber.thread = t;
                fiber.done = false;
                fiber.batches.assign(1, {});
                if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.get();
                fiber.context.uc_stack.ss_size = kStack;
                fiber.context.uc_link = &scheduler_;
                makecontext(&fiber.context, &Emulator::enter, 0);
            }
        }
        std::vector<size_t> order(fibers_.size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = i;
        for (bool alive = true; alive;) {
            if (seed) shuffle(order);
            alive = progress_ = false;
            for (const size_t i : order) {
                Fiber& fiber = fibers_[i];
                if (fiber.done) continue;
                alive = true;
                now_ = &fiber;
                threadIdx = dim3(static_cast<unsigned>(fiber.thread), 0, 0);
                blockIdx = fiber.block->index;
                swapcontext(&scheduler_, &fiber.context);
                if (fiber.done) progress_ = true;
            }
            if (alive && !progress_) return kErrorDeadlock;
        }
        return 0;
    }

    static void enter() {
        Emulator& self = instance();
        self.body_();
        self.now_->done = true;
    }

    void shuffle(std::vector<size_t>& order) {
        for (size_t i = order.size(); i > 1; --i) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            std::swap(order[i - 1], order[(seed >> 33) % i]);
        }
    }

    std::function<void()> body_;
    std::vector<Block> blocks_;
    std::vector<Fiber> fibers_;
    Meeting cluster_;
    ucontext_t scheduler_;
    Fiber* now_ = nullptr;
    bool progress_ = false;
};

inline Emulator& emulator() { return Emulator::instance(); }

template <class T>
T& shared() {
    return *reinterpret_cast<T*>(emulator().block().shared);
}

// All threads of a warp give a value; each reads those of any lane with `read` before the slots are used again.
template <class T, class Read>
auto exchange(const T& mine, Read read) {
    static_assert(sizeof(T) <= 64, "a slot has 64 bytes");
    Warp& warp = emulator().warp();
    memcpy(warp.slots[emulator().lane()], &mine, sizeof(T));
    emulator().meet(warp.meeting);
    const auto of = [&warp](int lane) {
        T value;
        memcpy(&value, warp.slots[lane & 31], sizeof(T));
        return value;
    };
    const auto result = read(of);
    emulator().meet(warp.meeting);
    return result;
}

inline void sync_block() { emulator().meet(emulator().block().meeting); }

template <class T>
T shuffle_xor(T value, int mask) {
    const int lane = emulator().lane();
    return exchange(value, [&](auto of) { return of(lane ^ mask); });
}

template <class T>
T shuffle(T value, int lane) {
    return exchange(value, [&](auto of) { return of(lane); });
}

inline unsigned cluster_rank() { return emulator().block().rank; }
inline void sync_cluster() { emulator().meet_cluster(); }
inline void leave_cluster() { emulator().meet_cluster(); }
template <class T>
T read_cluster(const T* here, unsigned rank) {
    const auto offset = reinterpret_cast<const unsigned char*>(here) - emulator().block().shared;
    T value;
    memcpy(&value, emulator().peer(rank).shared + offset, sizeof value);
    return value;
}

inline uint4 load_stream(const uint4* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) abort();  // a GPU would fault
    return *at;
}
inline void store_16(void* to, uint4 value) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) abort();
    memcpy(to, &value, 16);
}

inline void make_copy(const Fiber::Copy& copy) {
    if (copy.bytes) memcpy(copy.to, copy.from, copy.bytes);
    memset(static_cast<unsigned char*>(copy.to) + copy.bytes, 0, copy.zeros);
}
// A copy is made when it is waited for, so that a wait that is missing shows.
inline void copy_later(const Fiber::Copy& copy) {
    if (emulator().small) return make_copy(copy);
    emulator().fiber().batches.back().push_back(copy);
}
inline void copy_async(uint4* to, const uint4* from, bool valid = true) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0) abort();
    copy_later({to, from, valid ? 16u : 0u, valid ? 0u : 16u});
}
inline void copy_async(uint2* to, const uint2* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 8 != 0 || bytes < 0 || bytes > 8) abort();
    const auto size = static_cast<size_t>(bytes);
    copy_later({to, from, size, 8 - size});
}
inline void close_batch() { emulator().fiber().batches.emplace_back(); }
template <int kOpen>
void wait_batches() {
    auto& batches = emulator().fiber().batches;
    while (static_cast<int>(batches.size()) - 1 > kOpen) {
        for (const Fiber::Copy& copy : batches.front()) make_copy(copy);
        batches.pop_front();
    }
}
inline int shared_limit() { return static_cast<int>(emulator().shared_limit()); }

template <class T>
T load_once(const T* at) {
    if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) abort();
    return *at;
}

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 255) << (8 * i);
    return out;
}
inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

inline int add_bytes(uint32_t a, int c) {
    for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> (8 * i));
    return c;
}

inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float sub(float a, float b) { return a - b; }
inline float divide(float a, float b) { return a / b; }
inline float round_even(float a) { return rintf(a); }
inline float fused(float a, float b, float c) { return fmaf(a, b, c); }

inline float from_f16(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t exponent = (bits >> 10) & 31u, fraction = bits & 1023u;
    if (exponent == 31) return as_float(sign | 0x7f800000u | (fraction << 13));
    const float size = exponent ? ldexpf(static_cast<float>(fraction + 1024), static_cast<int>(exponent) - 25)
                                : ldexpf(static_cast<float>(fraction), -24);
    return sign ? -size : size;
}

// Ties to even, from a double so that a sum or a fused product of halves is rounded once.
inline uint16_t f16_from_double(double value) {
    const auto sign = static_cast<uint16_t>(signbit(value) ? 0x8000u : 0u);
    const double size = fabs(value);
    if (isnan(value)) return static_cast<uint16_t>(sign | 0x7fffu);
    if (size >= 65520.0) return static_cast<uint16_t>(sign | 0x7c00u);
    if (size < ldexp(1.0, -14)) return static_cast<uint16_t>(sign | static_cast<uint16_t>(rint(ldexp(size, 24))));
    int exponent;
    frexp(size, &exponent);  // size = m 2^exponent, m in [1/2, 1)
    auto fraction = static_cast<uint32_t>(rint(ldexp(size, 11 - exponent)));  // 1024 .. 2048
    if (fraction == 2048) {
        fraction = 1024;
        ++exponent;
    }
    return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(exponent + 14) << 10) + (fraction - 1024)));
}
inline uint16_t to_f16(float value) { return f16_from_double(value); }

inline float from_bf16(uint16_t bits);
inline uint16_t to_bf16(float value);

inline uint32_t join(uint16_t low, uint16_t high) { return low | (static_cast<uint32_t>(high) << 16); }
inline uint16_t low_of(uint32_t pair) { return static_cast<uint16_t>(pair); }
inline uint16_t high_of(uint32_t pair) { return static_cast<uint16_t>(pair >> 16); }

inline uint32_t f16_sub2(uint32_t a, uint32_t b) {
    const auto one = [](uint16_t x, uint16_t y) {
        return f16_from_double(static_cast<double>(from_f16(x)) - static_cast<double>(from_f16(y)));
    };
    return join(one(low_of(a), low_of(b)), one(high_of(a), high_of(b)));
}
inline uint32_t f16_fma2(uint32_t a, uint32_t b, uint32_t c) {
    const auto one = [](uint16_t x, uint16_t y, uint16_t z) {
        return f16_from_double(static_cast<double>(from_f16(x)) * static_cast<double>(from_f16(y)) +
                               static_cast<double>(from_f16(z)));
    };
    return join(one(low_of(a), low_of(b), low_of(c)), one(high_of(a), high_of(b), high_of(c)));
}
inline uint32_t bf16_fma2(uint32_t a, uint32_t b, uint32_t c) {
    const auto one = [](uint16_t x, uint16_t y, uint16_t z) {
        return to_bf16(fmaf(from_bf16(x), from_bf16(y), from_bf16(z)));
    };
    return join(one(low_of(a), low_of(b), low_of(c)), one(high_of(a), high_of(b), high_of(c)));
}

struct F16 {};
struct BF16 {};

template <class T>
struct Mma {
    static float value(uint16_t bits) {
        if constexpr (std::is_same_v<T, F16>) {
            return from_f16(bits);
        } else {
            return from_bf16(bits);
        }
    }

    static void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        struct Operands {
            uint32_t a[4], b[2];
        } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
        const int lane = emulator().lane();
        exchange(mine, [&](auto of) {
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                double sum = c[i];
                for (int k = 0; k < 16; ++k) {
                    // Column k of a row: lane 4 * (row % 8) + k / 2 % 4, register row / 8 + 2 * (k / 8), half k % 2.
                    const uint32_t left = of(4 * (row % 8) + k / 2 % 4).a[row / 8 + 2 * (k / 8)];
                    const uint32_t right = of(4 * column + k / 2 % 4).b[k / 8];
                    sum += static_cast<double>(value(k % 2 ? high_of(left) : low_of(left))) *
                           static_cast<double>(value(k % 2 ? high_of(right) : low_of(right)));
                }
                c[i] = static_cast<float>(sum);
            }
            return 0;
        });
    }
};

struct S8 {};

template <>
struct Mma<S8> {
    static void run(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        struct Operands {
            uint32_t a[4], b[2];
        } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
        const int lane = emulator().lane();
        exchange(mine, [&](auto of) {
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                int sum = 0;  // of at most 32 * 128 * 128
                for (int k = 0; k < 32; ++k) {
                    // Column k of a row: lane 4 * (row % 8) + k / 4 % 4, register row / 8 + 2 * (k / 16), byte k % 4.
                    const uint32_t left = of(4 * (row % 8) + k / 4 % 4).a[row / 8 + 2 * (k / 16)];
                    const uint32_t right = of(4 * column + k / 4 % 4).b[k / 16];
                    sum += static_cast<int8_t>(left >> (8 * (k % 4))) * static_cast<int8_t>(right >> (8 * (k % 4)));
                }
                c[i] = static_cast<int>(static_cast<uint32_t>(c[i]) + static_cast<uint32_t>(sum));
            }
            return 0;
        });
    }
};

struct Launch {
    dim3 grid;
    int threads;
    size_t shared_bytes = 0;
    int cluster = 1;
    Stream stream = nullptr;
};

template <class... Parameters, class... Arguments>
int launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
    const std::tuple<Parameters...> all(static_cast<Parameters>(arguments)...);
    return emulator().run(how.grid, how.threads, how.shared_bytes, static_cast<unsigned>(how.cluster),
                          [&] { std::apply(kernel, all); });
}

}  // namespace qk::gpu
