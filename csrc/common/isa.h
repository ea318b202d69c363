// Instruction sets: one binary serves every x86-64, and compiles to the portable path alone elsewhere.
//
// A file named *_isa.cpp is compiled once per instruction set (setup.py), each time into a namespace of its own,
// DIFFUPOSE_ISA, and with other flags. It must define no inline function, template or class outside of that namespace
// and take none from the standard library that the compiler may leave out of line: the linker would keep one copy for
// the whole library, and it might be the one that an older processor cannot run.
#pragma once

#include <string>
#include <vector>

namespace diffupose {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int kNumIsas = 4;

const char* isa_name(Isa isa);

// Those that were compiled in and that this processor has, slowest first.
std::vector<Isa> usable_isas();

// The best of them, or the one that the environment variable DIFFUPOSE_ISA names; throws std::invalid_argument if it
// cannot be used. The variable is read at every call.
Isa active_isa();

}  // namespace diffupose
