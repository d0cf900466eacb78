// Builds the kernel table of the active tier from the entries that CMake found (generated entries.inc).
#include <atomic>
#include <cstring>

#include "qkern/cpu.h"
#include "qkern/kernels.h"

#define QK_ENTRY(op, tier) extern "C" void qk_enter_##op##_##tier(qk::KernelTable*);
#include "entries.inc"
#undef QK_ENTRY

namespace qk {
namespace {

struct Entry {
    const char* op;
    Tier tier;
    void (*enter)(KernelTable*);
};

// In ascending order of tiers, as isa.cmake writes them.
const Entry kEntries[] = {
#define QK_ENTRY(op, tier) {#op, Tier::tier, &qk_enter_##op##_##tier},
#include "entries.inc"
#undef QK_ENTRY
};

struct Tables {
    KernelTable tables[kTierCount];
    Tier best = Tier::scalar;

    Tables() {
        for (int i = 0; i < kTierCount; ++i) {
            const Tier tier = static_cast<Tier>(i);
            if (!tier_compiled(tier) || !tier_supported(tier)) continue;
            for (const Entry& entry : kEntries) {
                if (entry.tier <= tier && tier_supported(entry.tier)) entry.enter(&tables[i]);
            }
            best = tier;
        }
    }
};

const Tables& all_tables() {
    static const Tables tables;
    return tables;
}

std::atomic<int>& active_index() {
    static std::atomic<int> index{static_cast<int>(all_tables().best)};
    return index;
}

}  // namespace

const char* tier_name(Tier tier) {
    static const char* const names[kTierCount] = {"scalar",     "avx2",       "avxvnni", "avx512",
                                                  "avx512vnni", "avx512bf16", "neon",    "neon_dotprod"};
    return names[static_cast<int>(tier)];
}

bool tier_compiled(Tier tier) {
    for (const Entry& entry : kEntries) {
        if (entry.tier == tier) return true;
    }
    return false;
}

const KernelTable& kernels() { return all_tables().tables[active_index().load(std::memory_order_relaxed)]; }

Tier active_tier() { return static_cast<Tier>(active_index().load(std::memory_order_relaxed)); }

bool kernel_tier(const char* op, Tier* tier) {
    bool found = false;
    for (const Entry& entry : kEntries) {
        if (std::strcmp(entry.op, op) != 0 || entry.tier > active_tier() || !tier_supported(entry.tier)) continue;
        *tier = entry.tier;
        found = true;
    }
    return found;
}

bool set_active_tier(Tier tier) {
    if (!tier_compiled(tier) || !tier_supported(tier)) return false;
    active_index().store(static_cast<int>(tier), std::memory_order_relaxed);
    return true;
}

}  // namespace qk
