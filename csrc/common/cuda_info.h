// Versions as CUDA counts them: 1000 major + 10 minor.
#pragma once

namespace diffupose {

int cuda_runtime_version();  // that _cuda was built with
int cuda_driver_version();   // the newest that the driver here runs, 0 without one

// Of the current device.
bool cuda_has_code();  // whether what was compiled runs there
int cuda_multiprocessors();
int cuda_shared_bytes();  // that a block may have

}  // namespace diffupose
