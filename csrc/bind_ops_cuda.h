// The CUDA launchers of the ops over poses, one thin function each.
#pragma once

#include <pybind11/pybind11.h>

namespace diffupose {

void bind_ops_cuda(pybind11::module_& m);

}  // namespace diffupose
