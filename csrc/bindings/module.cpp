// The Python module `_core`: tiers, threads, and one bind_<op> for every other file of this folder.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdint.h>

#include <optional>
#include <string>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "qkern/cpu.h"
#include "qkern/parallel.h"

namespace py = pybind11;

#define QK_BIND(op) void bind_##op(py::module_& module);
#include "bindings.inc"
#undef QK_BIND

namespace {

std::vector<std::string> tiers(bool (*predicate)(qk::Tier)) {
    std::vector<std::string> names;
    for (int i = 0; i < qk::kTierCount; ++i) {
        const auto tier = static_cast<qk::Tier>(i);
        if (predicate(tier)) names.emplace_back(qk::tier_name(tier));
    }
    return names;
}

std::optional<std::string> kernel_tier(const std::string& op) {
    qk::Tier tier = qk::Tier::scalar;
    if (!qk::kernel_tier(op.c_str(), &tier)) return std::nullopt;
    return qk::tier_name(tier);
}

bool set_tier(const std::string& name) {
    for (int i = 0; i < qk::kTierCount; ++i) {
        const auto tier = static_cast<qk::Tier>(i);
        if (name == qk::tier_name(tier)) return qk::set_active_tier(tier);
    }
    return false;
}

void advise_large_pages([[maybe_unused]] uintptr_t memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const uintptr_t first = (memory + page - 1) / page * page, last = (memory + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // no matter if refused
#endif
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "Native CPU kernels of qkern; raw pointers in, no torch.";
    module.attr("__version__") = QKERN_VERSION;
    module.attr("CUDA_BUILD") = QKERN_CUDA_BUILD;  // the compiler of _cuda, or why there is none
    module.def("compiled_tiers", [] { return tiers(&qk::tier_compiled); });
    module.def("usable_tiers",
               [] { return tiers([](qk::Tier t) { return qk::tier_compiled(t) && qk::tier_supported(t); }); });
    module.def("active_tier", [] { return std::string(qk::tier_name(qk::active_tier())); });
    module.def("kernel_tier", &kernel_tier, py::arg("op"),
               "Tier whose kernel of an op runs while the active tier is what it is; None if there is none.");
    module.def("set_tier", &set_tier, py::arg("name"),
               "Make a tier the active one; False if it is not compiled or this machine cannot run it.");
    module.def("advise_large_pages", &advise_large_pages, py::arg("memory"), py::arg("bytes"),
               "Ask for pages of megabytes in memory that is about to be written for the first time.");
    module.def("cpu_features", [] { return std::string(qk::cpu_feature_names()); });
    module.def("thread_pool", [] { return std::string(qk::pool_name()); });
#define QK_BIND(op) bind_##op(module);
#include "bindings.inc"
#undef QK_BIND
}
