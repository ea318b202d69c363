#include "cuda_cases.h"
#include "cuda_sample/sample_cuda.h"

namespace diffupose::cases {

CUDA_CASE(tiled_product) {
    const int rows = 11, inner = 21, columns = 13;
    const auto a = normal(rows * inner), b = normal(inner * columns);
    DeviceArray<float> out(rows * columns);
    launch_tiled_product_cuda(a.data(), b.data(), out.data(), rows, inner, columns, nullptr);
    std::vector<double> expected(rows * columns, 0.0);
    for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < columns; ++column) {
            for (int i = 0; i < inner; ++i) {
                expected[row * columns + column] += double(a[row * inner + i]) * double(b[i * columns + column]);
            }
        }
    }
    expect_near("out", out, expected, 1e-5);
}

CUDA_CASE(row_norm) {
    const int rows = 5, columns = 130;
    const auto x = normal(rows * columns);
    DeviceArray<float> out(rows * columns);
    launch_row_norm_cuda(x.data(), out.data(), rows, columns, nullptr);
    std::vector<double> expected(rows * columns, 0.0);
    for (int row = 0; row < rows; ++row) {
        double sum = 0.0;
        for (int i = 0; i < columns; ++i) sum += double(x[row * columns + i]) * double(x[row * columns + i]);
        for (int i = 0; i < columns; ++i) expected[row * columns + i] = double(x[row * columns + i]) / std::sqrt(sum);
    }
    expect_near("out", out, expected, 1e-5);
}

}  // namespace diffupose::cases
