// diffupose._C
#include <pybind11/stl.h>

#include <chrono>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "bind/checks.h"
#include "common/build_info.h"
#include "common/isa.h"
#include "engine/cpu/engine.h"

namespace diffupose {
namespace {

// Operations a second of a loop that touches registers only, on one core; the best of several short runs.
double peak_flops(bool bfloat16) {
    const auto& kernels = kernels_of(active_isa());
    require(!bfloat16 || kernels.multiplies_bfloat16, "this instruction set has no bfloat16 products");
    double best = 0.0;
    volatile float sink = 0.0f;
    for (int run = 0; run < 8; ++run) {
        float sum = 0.0f;
        const auto begin = std::chrono::steady_clock::now();
        const double operations = kernels.peak_loop(1000000, bfloat16, &sum);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        sink = sum;
        if (operations / seconds.count() > best) best = operations / seconds.count();
    }
    (void)sink;
    return best;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of diffupose for the CPU.";
    m.def("source_hash", &source_hash);
    m.def("has_openmp", &has_openmp);
    m.def("usable_isas", [] {
        std::vector<std::string> names;
        for (const Isa isa : usable_isas()) names.emplace_back(isa_name(isa));
        return names;
    });
    m.def("active_isa", [] { return isa_name(active_isa()); });
    m.def("peak_flops", &peak_flops, pybind11::call_guard<pybind11::gil_scoped_release>(), pybind11::arg("bfloat16"));
    bind_engine(m);
    bind_ops(m);
}

}  // namespace diffupose
