// Functions that both the C++ and the CUDA code call.
#pragma once

#ifdef __CUDACC__
#define DIFFUPOSE_HOST_DEVICE __host__ __device__
#else
#define DIFFUPOSE_HOST_DEVICE
#endif
