// What every binding checks: null pointers and sizes.
#pragma once

#include <cstdint>
#include <initializer_list>
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

// The numbers in a tensor of these sizes: at most as many as no memory holds, so that nothing that is computed from
// them overflows.
inline int64_t numel_of(std::initializer_list<int64_t> sizes) {
    constexpr int64_t kMost = int64_t{1} << 41;
    int64_t numel = 1;
    for (const int64_t size : sizes) {
        require(size >= 0, "sizes must not be negative");
        require(size <= kMost && (size == 0 || numel <= kMost / size), "sizes must make at most 2^41 numbers");
        numel *= size;
    }
    return numel;
}

}  // namespace diffupose
