// Alone in its file: the hash changes with every source, and only this file is recompiled for it.
#include "common/build_info.h"

namespace diffupose {

const char* source_hash() { return DIFFUPOSE_SOURCE_HASH; }

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

}  // namespace diffupose
