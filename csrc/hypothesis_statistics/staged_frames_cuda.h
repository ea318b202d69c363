// hypothesis_statistics for frames whose hypotheses fit the shared memory of a thread block.
#pragma once

#include "hypothesis_statistics/hypothesis_statistics_cuda.h"

namespace diffupose {

// Does nothing and returns false where they do not fit.
bool launch_staged_frames_cuda(const float* hypotheses, const CudaReprojection& view, const StatisticsOutputs& outputs,
                               HypothesisSizes sizes, void* stream);

}  // namespace diffupose
