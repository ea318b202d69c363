// The parts of the two Python modules, diffupose._C (module.cpp) and diffupose._cuda (module_cuda.cpp), and how they
// define functions. Tensors come as addresses. Python has checked dtype, device, shape and contiguity; the bindings
// check sizes and null pointers.
#pragma once

#include <pybind11/pybind11.h>

namespace diffupose {

// Of _C.
void bind_engine(pybind11::module_& m);
void bind_ops(pybind11::module_& m);

// Of _cuda.
void bind_engine_cuda(pybind11::module_& m);
void bind_ops_cuda(pybind11::module_& m);

// Defines a function whose arguments Python must name.
template <typename Scope, typename Function, typename... Names>
void define(Scope& scope, const char* name, const Function& function, const Names&... names) {
    scope.def(name, function, pybind11::kw_only(), pybind11::arg(names)...);
}

// The same, and other Python threads run during the call: the function must not touch Python objects.
template <typename Scope, typename Function, typename... Names>
void define_without_gil(Scope& scope, const char* name, const Function& function, const Names&... names) {
    scope.def(name, function, pybind11::call_guard<pybind11::gil_scoped_release>(), pybind11::kw_only(),
              pybind11::arg(names)...);
}

}  // namespace diffupose
