// CPU tiers: what was compiled, what this machine can run, what is active.
#pragma once

namespace qk {

struct KernelTable;

// Ascending within an architecture; the names are those of csrc/cmake/isa.cmake.
enum class Tier : int { scalar, avx2, avxvnni, avx512, avx512vnni, avx512bf16, neon, neon_dotprod };
constexpr int kTierCount = 8;

const char* tier_name(Tier tier);
bool tier_supported(Tier tier);  // by the CPU and the operating system
bool tier_compiled(Tier tier);   // at least one kernel file of the tier is in this binary

// Names of the features that were detected, separated by spaces.
const char* cpu_feature_names();

// The table of the active tier: of each kernel the entry of the highest tier not above it.
const KernelTable& kernels();
Tier active_tier();
// The tier of that entry for an op, which is the name of its folder; false if there is none.
bool kernel_tier(const char* op, Tier* tier);
// False (and nothing changes) if the tier is not compiled or not supported.
bool set_active_tier(Tier tier);

}  // namespace qk
