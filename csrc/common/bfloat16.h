// A bfloat16 number in memory: the upper half of a float32.
#pragma once

#include <cstdint>

namespace diffupose {

struct Bfloat16 {
    uint16_t bits;
};

// How the elements of an array are stored; sums are in float32 whatever it is.
enum class Storage { float32, bfloat16 };

}  // namespace diffupose
