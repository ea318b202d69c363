// One table of functions per instruction set: declared by DIFFUPOSE_PER_ISA(Type, kName), taken by DIFFUPOSE_TAKE.
// Each *_isa.cpp defines `extern const Type kName` in its namespace.
#pragma once

#include "common/isa.h"

#ifdef DIFFUPOSE_WITH_AVX2
#define DIFFUPOSE_AVX2(code) code
#else
#define DIFFUPOSE_AVX2(code)
#endif
#ifdef DIFFUPOSE_WITH_AVX512
#define DIFFUPOSE_AVX512(code) code
#else
#define DIFFUPOSE_AVX512(code)
#endif
#ifdef DIFFUPOSE_WITH_AVX512_BF16
#define DIFFUPOSE_AVX512_BF16(code) code
#else
#define DIFFUPOSE_AVX512_BF16(code)
#endif

// At the scope of namespace diffupose.
#define DIFFUPOSE_PER_ISA(Type, kName)                              \
    namespace portable {                                            \
    extern const Type kName;                                        \
    }                                                               \
    DIFFUPOSE_AVX2(namespace avx2 { extern const Type kName; })     \
    DIFFUPOSE_AVX512(namespace avx512 { extern const Type kName; }) \
    DIFFUPOSE_AVX512_BF16(namespace avx512_bf16 { extern const Type kName; })

// The table of an instruction set that usable_isas() has.
#define DIFFUPOSE_TAKE(isa, kName)                                                             \
    (DIFFUPOSE_AVX512_BF16((isa) == Isa::avx512_bf16 ? avx512_bf16::kName :) DIFFUPOSE_AVX512( \
        (isa) == Isa::avx512 ? avx512::kName :) DIFFUPOSE_AVX2((isa) == Isa::avx2 ? avx2::kName :) portable::kName)
