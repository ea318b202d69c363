// Versions as CUDA counts them: 1000 major + 10 minor.
#pragma once

namespace diffupose {

int cuda_runtime_version();  // that _cuda was built with
int cuda_driver_version();   // the newest that the driver supports, 0 without a driver

// Of the current device.
bool cuda_has_code();  // whether this build has code for it
int cuda_multiprocessors();
int cuda_shared_bytes();  // the most of a block

}  // namespace diffupose
