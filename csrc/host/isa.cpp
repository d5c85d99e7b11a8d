#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// CMakeLists.txt defines DITFAST_ISAS as a list of ISA(name), best last.
namespace ditfast::host {

#define ISA(name)                      \
    namespace name {                   \
    extern const Kernels kernel_table; \
    }
DITFAST_ISAS
#undef ISA

namespace {

struct Variant {
    const char* name;
    const Kernels* kernels;
};

constexpr Variant kVariants[] = {
#define ISA(name) {#name, &name::kernel_table},
    DITFAST_ISAS
#undef ISA
};

bool runs_here(const std::string& name) {
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
    const bool has_v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    // __builtin_cpu_supports also checks that the operating system saves these registers
    const bool has_v3 = has_v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && (ecx & bit_F16C) &&
                        (ecx & bit_MOVBE);
    const bool has_v4 = has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (name == "x86_64_v2") return has_v2;
    if (name == "x86_64_v3") return has_v3;
    if (name == "x86_64_v4") return has_v4;
    return has_v4 && __builtin_cpu_supports("avx512bf16");
#else
    return !name.empty();  // the baseline of every CPU of this kind
#endif
}

const Variant* find(const std::string& name) {
    for (const Variant& variant : kVariants) {
        if (name == variant.name && runs_here(name)) return &variant;
    }
    std::string known;
    for (const std::string& each : isas()) known += (known.empty() ? "" : ", ") + each;
    throw std::invalid_argument("DITFAST_ISA must be one of " + known + " on this CPU, got '" + name + "'");
}

const Variant* choose() {
    const char* asked = std::getenv("DITFAST_ISA");
    if (asked != nullptr && *asked != '\0') return find(asked);
    const Variant* best = nullptr;
    for (const Variant& variant : kVariants) {
        if (runs_here(variant.name)) best = &variant;
    }
    return best;
}

// Chosen when the extension is loaded; loading fails if DITFAST_ISA names one that cannot run.
std::atomic<const Variant*>& in_use() {
    static std::atomic<const Variant*> variant{choose()};
    return variant;
}

}  // namespace

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Variant& variant : kVariants) {
        if (runs_here(variant.name)) names.push_back(variant.name);
    }
    return names;
}

std::string isa() {
    const Variant* variant = in_use();
    return variant ? variant->name : "none";
}

bool has_amx() {
#if defined(__x86_64__)
    // asked once: a virtual machine takes 40 us to answer
    static const bool found = [] {
        unsigned eax, ebx, ecx, edx;
        constexpr unsigned kNumbers = 1u << 22, kTiles = 1u << 24;
        return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kNumbers) && (edx & kTiles);
    }();
    return found;
#else
    return false;
#endif
}

void use_isa(const std::string& name) { in_use() = find(name); }

const Kernels& kernels() {
    const Variant* variant = in_use();
    if (variant == nullptr) throw std::runtime_error("no instruction set of this build runs on this CPU");
    return *variant->kernels;
}

}  // namespace ditfast::host
