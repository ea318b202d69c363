#include "engine/kernels.h"

namespace diffupose {

namespace portable {
extern const Kernels kKernels;
}
#ifdef DIFFUPOSE_WITH_AVX2
namespace avx2 {
extern const Kernels kKernels;
}
#endif
#ifdef DIFFUPOSE_WITH_AVX512
namespace avx512 {
extern const Kernels kKernels;
}
#endif
#ifdef DIFFUPOSE_WITH_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#endif

const Kernels& kernels_of(Isa isa) {
    switch (isa) {
#ifdef DIFFUPOSE_WITH_AVX2
        case Isa::avx2:
            return avx2::kKernels;
#endif
#ifdef DIFFUPOSE_WITH_AVX512
        case Isa::avx512:
            return avx512::kKernels;
#endif
#ifdef DIFFUPOSE_WITH_AVX512_BF16
        case Isa::avx512_bf16:
            return avx512_bf16::kKernels;
#endif
        default:
            return portable::kKernels;
    }
}

}  // namespace diffupose
