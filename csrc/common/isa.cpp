#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace diffupose {
namespace {

constexpr const char* kNames[kNumIsas] = {"portable", "avx2", "avx512", "avx512_bf16"};

// setup.py defines DIFFUPOSE_WITH_... for what the compiler could compile.
bool can_run(Isa isa) {
    switch (isa) {
        case Isa::portable:
            return true;
#ifdef DIFFUPOSE_WITH_AVX2
        case Isa::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef DIFFUPOSE_WITH_AVX512
        case Isa::avx512:
            return can_run(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef DIFFUPOSE_WITH_AVX512_BF16
        case Isa::avx512_bf16:
            return can_run(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
#endif
        default:
            return false;
    }
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> usable_isas() {
    std::vector<Isa> usable;
    for (int i = 0; i < kNumIsas; ++i) {
        if (can_run(static_cast<Isa>(i))) usable.push_back(static_cast<Isa>(i));
    }
    return usable;
}

Isa active_isa() {
    const std::vector<Isa> usable = usable_isas();
    const char* wanted = std::getenv("DIFFUPOSE_ISA");
    if (wanted == nullptr || *wanted == '\0') return usable.back();
    std::string names;
    for (const Isa isa : usable) {
        if (std::string(wanted) == isa_name(isa)) return isa;
        names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    throw std::invalid_argument("the environment variable DIFFUPOSE_ISA must be one of those that run here, " + names +
                                "; got '" + wanted + "'");
}

}  // namespace diffupose
