// What every binding checks: null pointers and sizes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace diffupose {

// The address of a tensor's data. A fake tensor's is null, and an empty tensor's may be.
template <typename T>
T* pointer(uintptr_t address, int64_t numel, const char* name) {
    if (address == 0 && numel > 0) throw std::invalid_argument(std::string(name) + " is a null pointer");
    return reinterpret_cast<T*>(address);
}

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace diffupose
