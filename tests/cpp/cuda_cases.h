// Cases for cuda_kernels.cpp: each calls launchers under the emulation of CUDA and compares what they give.
//
//   CUDA_CASE(row_sums) {
//       const auto values = normal(3 * 5);
//       DeviceArray<float> sums(3);
//       launch_row_sums_cuda(values.data(), sums.data(), 3, 5, nullptr);
//       expect_near("sums", sums, expected, 1e-6);
//   }
//
// Small odd sizes: every thread is run one after the other. A new file in tests/cpp/cuda_cases/ is found by itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "common/bfloat16.h"

namespace diffupose::cases {

struct Case {
    const char* name;
    void (*run)();
};

// All there are, of every file.
std::vector<Case>& all_cases();

struct Register {
    Register(const char* name, void (*run)()) { all_cases().push_back({name, run}); }
};

#define CUDA_CASE(name)                                                          \
    static void case_##name();                                                   \
    static const diffupose::cases::Register register_##name(#name, case_##name); \
    static void case_##name()

// Ends the process, naming the case.
[[noreturn]] void fail(const std::string& message);

// Begins the same way in every case.
std::mt19937& random_bits();

// Memory as cudaMalloc gives it: aligned to 256 bytes, not a byte longer than asked for so that AddressSanitizer sees
// what lies beyond, and NaN until something is written.
template <typename T>
class DeviceArray {
   public:
    explicit DeviceArray(int64_t count)
        : count_(count), data_(static_cast<T*>(::operator new(bytes(), std::align_val_t{256}))) {
        std::memset(static_cast<void*>(data_), 0xff, bytes());
    }
    explicit DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) {
        if (!values.empty()) std::memcpy(static_cast<void*>(data_), values.data(), bytes());
    }
    DeviceArray(const DeviceArray& other) : DeviceArray(other.count_) {
        std::memcpy(static_cast<void*>(data_), other.data_, bytes());
    }
    DeviceArray& operator=(const DeviceArray&) = delete;
    ~DeviceArray() { ::operator delete(data_, std::align_val_t{256}); }

    T* data() { return data_; }
    const T* data() const { return data_; }
    int64_t size() const { return count_; }
    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }

   private:
    std::size_t bytes() const { return static_cast<std::size_t>(count_) * sizeof(T); }
    int64_t count_;
    T* data_;
};

inline DeviceArray<float> normal(int64_t count, float size = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, size);
    DeviceArray<float> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = distribution(random_bits());
    return values;
}

inline DeviceArray<int64_t> random_ids(int64_t count) {
    DeviceArray<int64_t> values(count);
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t high = random_bits()();
        values[i] = static_cast<int64_t>(high << 32 | random_bits()());
    }
    return values;
}

// Rounded to the nearest, ties to even.
inline DeviceArray<Bfloat16> as_bfloat16(const DeviceArray<float>& values) {
    DeviceArray<Bfloat16> result(values.size());
    for (int64_t i = 0; i < values.size(); ++i) {
        uint32_t bits;
        std::memcpy(&bits, &values[i], 4);
        result[i] = {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
    }
    return result;
}

inline DeviceArray<float> as_float32(const DeviceArray<Bfloat16>& values) {
    DeviceArray<float> result(values.size());
    for (int64_t i = 0; i < values.size(); ++i) {
        const uint32_t bits = static_cast<uint32_t>(values[i].bits) << 16;
        std::memcpy(&result[i], &bits, 4);
    }
    return result;
}
inline DeviceArray<float> as_float32(const DeviceArray<float>& values) { return values; }

// Every number within a tolerance of what is expected; NaN is not.
template <typename Got, typename Expected>
void expect_near(const char* what, const Got& got, const Expected& expected, double tolerance) {
    if (static_cast<int64_t>(got.size()) != static_cast<int64_t>(expected.size())) {
        fail(std::string(what) + " has " + std::to_string(got.size()) + " numbers, expected " +
             std::to_string(expected.size()));
    }
    for (int64_t i = 0; i < static_cast<int64_t>(got.size()); ++i) {
        const double value = static_cast<double>(got.data()[i]), truth = static_cast<double>(expected.data()[i]);
        if (!(std::abs(value - truth) <= tolerance)) {
            fail(std::string(what) + "[" + std::to_string(i) + "] is " + std::to_string(value) + ", expected " +
                 std::to_string(truth));
        }
    }
}

// The same bits.
template <typename T>
void expect_equal(const char* what, const DeviceArray<T>& got, const DeviceArray<T>& expected) {
    const bool same_size = got.size() == expected.size();
    if (same_size && std::memcmp(got.data(), expected.data(), static_cast<std::size_t>(got.size()) * sizeof(T)) == 0) {
        return;
    }
    fail(std::string(what) + " is not the same bits");
}

}  // namespace diffupose::cases
