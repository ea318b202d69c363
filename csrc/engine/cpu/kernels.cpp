#include "engine/cpu/kernels.h"

#include "common/per_isa.h"

namespace diffupose {

DIFFUPOSE_PER_ISA(Kernels, kKernels)

const Kernels& kernels_of(Isa isa) { return DIFFUPOSE_TAKE(isa, kKernels); }

}  // namespace diffupose
