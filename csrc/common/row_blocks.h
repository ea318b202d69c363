// Rows in blocks whose height the compiler knows, so that their sums stay in registers.
#pragma once

#include <cstdint>

#ifndef DIFFUPOSE_ISA
#error "only files named *_isa.cpp include this"
#endif

namespace diffupose {
namespace DIFFUPOSE_ISA {

// Calls block.template run<rows>(first).
template <int kMax, typename Block>
static inline void run_block(int64_t rows, int64_t first, const Block& block) {
    if constexpr (kMax > 1) {
        if (rows < kMax) return run_block<kMax - 1>(rows, first, block);
    }
    block.template run<kMax>(first);
}

// Blocks of nearly equal height, at most kMax, that cover the rows.
template <int kMax, typename Block>
static inline void in_blocks(int64_t rows, const Block& block) {
    const int64_t count = (rows + kMax - 1) / kMax;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t first = rows * i / count;
        run_block<kMax>(rows * (i + 1) / count - first, first, block);
    }
}

}  // namespace DIFFUPOSE_ISA
}  // namespace diffupose
