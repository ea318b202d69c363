#include "cuda_cases.h"
#include "cuda_faults/faults_cuda.h"

namespace diffupose::cases {

static void copy_with(Fault fault) {
    const auto in = normal(64);
    DeviceArray<float> out(64);
    launch_faults_cuda(fault, in.data(), out.data(), nullptr);
    expect_near("out", out, in, 1e-6);
}

CUDA_CASE(none) { copy_with(Fault::none); }
CUDA_CASE(missing_barrier) { copy_with(Fault::missing_barrier); }
CUDA_CASE(missing_warp_barrier) { copy_with(Fault::missing_warp_barrier); }
CUDA_CASE(shuffle_orders) { copy_with(Fault::shuffle_orders); }
CUDA_CASE(divergent_barrier) { copy_with(Fault::divergent_barrier); }
CUDA_CASE(early_return) { copy_with(Fault::early_return); }
CUDA_CASE(divergent_warp) { copy_with(Fault::divergent_warp); }
CUDA_CASE(unmet_arrival) { copy_with(Fault::unmet_arrival); }
CUDA_CASE(absent_lane) { copy_with(Fault::absent_lane); }
CUDA_CASE(shared_overrun) { copy_with(Fault::shared_overrun); }
CUDA_CASE(global_overrun) { copy_with(Fault::global_overrun); }
CUDA_CASE(misaligned) { copy_with(Fault::misaligned); }
CUDA_CASE(unwritten_shared) { copy_with(Fault::unwritten_shared); }
CUDA_CASE(never_waits) { copy_with(Fault::never_waits); }
CUDA_CASE(block_order) { copy_with(Fault::block_order); }

}  // namespace diffupose::cases
