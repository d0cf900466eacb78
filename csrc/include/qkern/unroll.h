// Register tiles live in arrays that only exist once everything around them is inlined and unrolled.
#pragma once

// A loop that becomes one vector operation: GCC would first unroll it, and then see only scalars.
#if defined(__GNUC__) && !defined(__clang__)
#define QK_ROLLED _Pragma("GCC unroll 1")
#else
#define QK_ROLLED
#endif

#if defined(_MSC_VER)
#define QK_INLINE __forceinline
#define QK_UNROLL
#elif defined(QKERN_SANITIZED)
// All of it inlined and instrumented takes GCC minutes a file, and is slow anyway.
#define QK_INLINE inline
#define QK_UNROLL
#else
#define QK_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define QK_UNROLL _Pragma("clang loop unroll(full)")
#else
#define QK_UNROLL _Pragma("GCC unroll 32")
#endif
#endif
