// Instruction sets: one binary serves every x86-64 processor. Elsewhere there is the portable path only.
//
// A file named *_isa.cpp is compiled once per instruction set (setup.py), each time into its own namespace
// DIFFUPOSE_ISA and with other flags. It must define no inline function, template or class outside of that namespace.
// It must use none from the standard library that the compiler may leave out of line. The linker would keep one copy
// for the whole library, possibly one that an older processor cannot run.
#pragma once

#include <string>
#include <vector>

namespace diffupose {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr int kNumIsas = 4;

const char* isa_name(Isa isa);

// The compiled instruction sets that this processor has, slowest first.
std::vector<Isa> usable_isas();

// The fastest of them, or the one that the environment variable DIFFUPOSE_ISA names. Throws std::invalid_argument if
// that one cannot be used. The variable is read at every call.
Isa active_isa();

}  // namespace diffupose
