// Memory on cache-line boundaries, zeroed.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace diffupose {

constexpr std::size_t kAlignment = 64;

struct AlignedDelete {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
};
using AlignedBytes = std::unique_ptr<char[], AlignedDelete>;

inline AlignedBytes aligned_bytes(int64_t size) {
    const std::size_t bytes = static_cast<std::size_t>(size > 0 ? size : 1);
    auto* p = static_cast<char*>(::operator new(bytes, std::align_val_t{kAlignment}));
    std::memset(p, 0, bytes);
    return AlignedBytes(p);
}

}  // namespace diffupose
