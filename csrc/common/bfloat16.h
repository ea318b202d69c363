// A bfloat16 number in memory: the upper half of a float32.
#pragma once

#include <cstdint>

namespace diffupose {

struct Bfloat16 {
    uint16_t bits;
};

// How the elements of an array are stored; sums are in float32 whatever it is. The CPU code has no float16.
enum class Storage { float32, bfloat16, float16 };

}  // namespace diffupose
