// What follows a layer's sum: none, max(x, 0), or x times the normal distribution function.
#pragma once

#include <cstdint>

namespace diffupose {

enum class Activation : int32_t { none, relu, gelu };

}  // namespace diffupose
