// CPU feature detection: CPUID for the instructions, XGETBV for the registers that the OS saves.
#include "qkern/cpu.h"

#include <string>

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
#define QK_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qk {
namespace {

struct Features {
    bool avx2 = false, fma = false, f16c = false, bmi2 = false, avxvnni = false;
    bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false;
    bool avx512vnni = false, avx512vbmi = false, avx512bf16 = false;
    bool neon = false, dotprod = false, fphp = false;
};

#ifdef QK_X86
struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
#if defined(_MSC_VER)
    int out[4];
    __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
    r.eax = out[0], r.ebx = out[1], r.ecx = out[2], r.edx = out[3];
#else
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
    return r;
}

unsigned long long saved_registers() {
#if defined(_MSC_VER)
    return _xgetbv(0);
#else
    unsigned eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (static_cast<unsigned long long>(edx) << 32) | eax;
#endif
}

Features detect() {
    Features f;
    const Registers one = cpuid(1, 0);
    const bool osxsave = one.ecx >> 27 & 1;
    if (!osxsave) return f;
    const unsigned long long saved = saved_registers();
    const bool ymm = (saved & 0x6) == 0x6;
    const bool zmm = (saved & 0xe6) == 0xe6;
    const Registers seven = cpuid(7, 0);
    const Registers seven_one = seven.eax >= 1 ? cpuid(7, 1) : Registers{};
    f.fma = ymm && (one.ecx >> 12 & 1);
    f.f16c = ymm && (one.ecx >> 29 & 1);
    f.avx2 = ymm && (seven.ebx >> 5 & 1);
    f.bmi2 = seven.ebx >> 8 & 1;
    f.avxvnni = ymm && (seven_one.eax >> 4 & 1);
    f.avx512f = zmm && (seven.ebx >> 16 & 1);
    f.avx512dq = zmm && (seven.ebx >> 17 & 1);
    f.avx512bw = zmm && (seven.ebx >> 30 & 1);
    f.avx512vl = zmm && (seven.ebx >> 31 & 1);
    f.avx512vbmi = zmm && (seven.ecx >> 1 & 1);
    f.avx512vnni = zmm && (seven.ecx >> 11 & 1);
    f.avx512bf16 = zmm && (seven_one.eax >> 5 & 1);
    return f;
}
#elif defined(__aarch64__)
Features detect() {
    Features f;
    f.neon = true;
#if defined(__linux__)
    const unsigned long hwcap = getauxval(AT_HWCAP);
    f.dotprod = hwcap >> 20 & 1;  // HWCAP_ASIMDDP
    f.fphp = hwcap >> 10 & 1;     // HWCAP_ASIMDHP
#elif defined(__APPLE__)
    f.dotprod = f.fphp = true;    // every Apple Silicon chip
#endif
    return f;
}
#else
Features detect() { return {}; }
#endif

const Features& features() {
    static const Features detected = detect();
    return detected;
}

}  // namespace

bool tier_supported(Tier tier) {
    const Features& f = features();
    const bool avx2 = f.avx2 && f.fma && f.f16c && f.bmi2;
    const bool avx512 = avx2 && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl;
    const bool avx512vnni = avx512 && f.avx512vnni && f.avx512vbmi;
    switch (tier) {
        case Tier::scalar: return true;
        case Tier::avx2: return avx2;
        case Tier::avxvnni: return avx2 && f.avxvnni;
        case Tier::avx512: return avx512;
        case Tier::avx512vnni: return avx512vnni;
        case Tier::avx512bf16: return avx512vnni && f.avx512bf16;
        case Tier::neon: return f.neon;
        case Tier::neon_dotprod: return f.neon && f.dotprod && f.fphp;
    }
    return false;
}

const char* cpu_feature_names() {
    static const std::string names = [] {
        const Features& f = features();
        const struct {
            bool has;
            const char* name;
        } table[] = {
            {f.avx2, "avx2"},           {f.fma, "fma"},
            {f.f16c, "f16c"},           {f.bmi2, "bmi2"},
            {f.avxvnni, "avxvnni"},     {f.avx512f, "avx512f"},
            {f.avx512bw, "avx512bw"},   {f.avx512dq, "avx512dq"},
            {f.avx512vl, "avx512vl"},   {f.avx512vnni, "avx512vnni"},
            {f.avx512vbmi, "avx512vbmi"}, {f.avx512bf16, "avx512bf16"},
            {f.neon, "neon"},           {f.dotprod, "dotprod"},
            {f.fphp, "fphp"},
        };
        std::string joined;
        for (const auto& entry : table) {
            if (!entry.has) continue;
            if (!joined.empty()) joined += ' ';
            joined += entry.name;
        }
        return joined;
    }();
    return names.c_str();
}

}  // namespace qk
