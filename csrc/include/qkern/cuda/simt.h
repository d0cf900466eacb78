// What the CUDA kernels are written in. Under nvcc: the language itself and the few PTX instructions that it has no
// word for. Under a plain C++ compiler, as the tests build them: the same names on a CPU, where the threads of a block,
// or of a cluster of blocks, take turns and every collective is checked for who arrives.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define QK_KERNEL __global__
#define QK_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define QK_DEVICE __device__ __forceinline__
#define QK_UNROLL _Pragma("unroll")
#else
#include "qkern/cuda/emulator.h"
#define QK_KERNEL
#define QK_BOUNDS(...)
#define QK_DEVICE inline
#define QK_UNROLL
#endif

namespace qk::gpu {

constexpr int kWarp = 32;

// What a device function needs of <type_traits>.
template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};
template <class A, class B>
struct IsSame {
    static constexpr bool value = false;
};
template <class A>
struct IsSame<A, A> {
    static constexpr bool value = true;
};

#if defined(__CUDACC__)

using Stream = cudaStream_t;
constexpr int kErrorBadLaunch = cudaErrorInvalidConfiguration;

// The dynamic shared memory of the block as one object.
template <class T>
QK_DEVICE T& shared() {
    extern __shared__ __align__(128) unsigned char memory[];
    return *reinterpret_cast<T*>(memory);
}

QK_DEVICE void sync_block() { __syncthreads(); }

template <class T>
QK_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
QK_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

// ---- clusters: sm_90 and later; only kernels launched with one call these -------------------------------

QK_DEVICE unsigned cluster_rank() {
    unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

QK_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Waits until all blocks of the cluster have come here, after which they may end. Nobody waits for what they wrote.
QK_DEVICE void leave_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Four bytes of another block's shared memory, at the place where `here` lies in this block's.
QK_DEVICE uint32_t read_cluster(const uint32_t* here, unsigned rank) {
    uint32_t value = 0;
#if __CUDA_ARCH__ >= 900
    const auto local = static_cast<unsigned>(__cvta_generic_to_shared(here));
    unsigned remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote) : "memory");
#endif
    return value;
}
QK_DEVICE float read_cluster(const float* here, unsigned rank) {
    return __uint_as_float(read_cluster(reinterpret_cast<const uint32_t*>(here), rank));
}

// ---- memory -------------------------------------------------------------------------------------------

// 16 bytes that are read once: past L1.
QK_DEVICE uint4 load_stream(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

// 16 bytes at once, which the compiler may take apart otherwise.
QK_DEVICE void store_16(void* to, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// 16 bytes from memory to this thread's own place in shared memory, while it goes on; zeros if not `valid`. Before
// sm_80 the thread waits.
QK_DEVICE void copy_async(uint4* to, const uint4* from, bool valid = true) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    const auto place = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(bytes) : "memory");
#else
    *to = valid ? *from : make_uint4(0, 0, 0, 0);
#endif
}

// The same with eight bytes, of which the first `bytes` are copied and the others are zeros. They stay in L1.
QK_DEVICE void copy_async(uint2* to, const uint2* from, int bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    const auto place = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(place), "l"(from), "r"(bytes) : "memory");
#else
    uint2 value = make_uint2(0, 0);
    if (bytes == 8) {
        value = *from;
    } else {
        const auto* at = reinterpret_cast<const uint8_t*>(from);
        for (int i = 0; i < bytes; ++i) (i < 4 ? value.x : value.y) |= static_cast<uint32_t>(at[i]) << (8 * (i % 4));
    }
    *to = value;
#endif
}

// What was copied since the last call is a batch.
QK_DEVICE void close_batch() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kOpen` batches of this thread are still on their way.
template <int kOpen>
QK_DEVICE void wait_batches() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#endif
}

template <class T>
QK_DEVICE T load_once(const T* at) {
    return __ldg(at);
}

// ---- words --------------------------------------------------------------------------------------------

QK_DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// (a & b) | c in one instruction.
QK_DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// The sum of four signed bytes, and c.
QK_DEVICE int add_bytes(uint32_t a, int c) { return __dp4a(static_cast<int>(a), 0x01010101, c); }

QK_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
QK_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// ---- one rounding an operation, never contracted ----------------------------------------------------------

QK_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
QK_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
QK_DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
QK_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
QK_DEVICE float round_even(float a) { return rintf(a); }
QK_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// ---- 16-bit floats, as bits; two of them in a word ----------------------------------------------------------

QK_DEVICE float from_f16(uint16_t bits) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
    return out;
}

QK_DEVICE uint16_t to_f16(float value) {
    uint16_t out;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
}

QK_DEVICE uint32_t f16_sub2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

QK_DEVICE uint32_t f16_fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
QK_DEVICE uint32_t bf16_fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
#endif

// ---- tensor cores: c += a b for a [16, 16], b [16, 8] ----------------------------------------------------------
// Lane l holds, with g = l / 4 and t = l % 4:  a0 (row g, columns 2t and 2t + 1), a1 (row g + 8), a2 and a3 the same
// eight columns further;  b0 (rows 2t and 2t + 1, column g), b1 eight rows further;  c0 and c1 (row g, columns 2t and
// 2t + 1), c2 and c3 (row g + 8).

struct F16 {};
struct BF16 {};

template <class T>
struct Mma;

template <>
struct Mma<F16> {
    static QK_DEVICE void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
        // sm_75 has half the depth.
        QK_UNROLL for (int half = 0; half < 2; ++half) {
            asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
        }
#endif
    }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <>
struct Mma<BF16> {
    static QK_DEVICE void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};
#endif

// Signed bytes, a [16, 32], b [32, 8]:  a0 (row g, columns 4t .. 4t + 3), a1 (row g + 8), a2 and a3 the same sixteen
// columns further;  b0 (rows 4t .. 4t + 3, column g), b1 sixteen rows further;  c as above, modulo 2^32.
struct S8 {};

template <>
struct Mma<S8> {
    static QK_DEVICE void run(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
        // sm_75 has half the rows and half the depth.
        QK_UNROLL for (int j = 0; j < 4; ++j) {
            asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                : "+r"(c[2 * (j % 2)]), "+r"(c[2 * (j % 2) + 1])
                : "r"(a[j]), "r"(b[j / 2]));
        }
#endif
    }
};

// ---- launching ------------------------------------------------------------------------------------------

struct Launch {
    dim3 grid;
    int threads;
    size_t shared_bytes = 0;
    int cluster = 1;  // blocks along x that share memory; more than 1 needs sm_90
    Stream stream = nullptr;
};

// Bytes of shared memory that a block of the current device may have.
inline int shared_limit() {
    int device = 0, bytes = 48 << 10;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
}

// 0, or the code of what CUDA reports.
template <class... Parameters, class... Arguments>
int launch(const Launch& how, void (*kernel)(Parameters...), Arguments... arguments) {
    if (how.shared_bytes > (48 << 10)) {
        const cudaError_t grown = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(how.shared_bytes));
        if (grown != cudaSuccess) return grown;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = how.grid;
    config.blockDim = dim3(static_cast<unsigned>(how.threads));
    config.dynamicSmemBytes = how.shared_bytes;
    config.stream = how.stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(how.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = how.cluster > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

#endif  // __CUDACC__

// ---- both ---------------------------------------------------------------------------------------------

// a / b of what 32 bits hold: a division of 64-bit numbers is a call, around which registers are spilled.
QK_DEVICE int64_t quotient(int64_t a, int64_t b) {
    return static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

QK_DEVICE float from_bf16(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

QK_DEVICE uint16_t to_bf16(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint16_t out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(value));
    return out;
#else
    const uint32_t bits = as_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

}  // namespace qk::gpu
