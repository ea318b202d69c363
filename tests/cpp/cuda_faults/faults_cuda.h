// Kernels with one fault each, for tests of what finds them.
#pragma once

namespace diffupose {

// What thread i of 64 gives to thread 63 - i.
enum class Fault {
    none,
    missing_barrier,       // nothing orders the exchange between warps
    missing_warp_barrier,  // nor within a warp, for threads 0 to 31
    shuffle_orders,        // a shuffle instead of a barrier of the warp
    divergent_barrier,     // half of the threads do not come
    early_return,          // some threads have left
    divergent_warp,        // half of a warp does not come
    unmet_arrival,         // a warp arrives at a barrier that nobody waits at
    absent_lane,           // a shuffle from a lane that the mask does not have
    shared_overrun,        // one number beyond the shared memory
    global_overrun,        // one beyond the result
    misaligned,            // four numbers at once, from an address that is not a multiple of 16
    unwritten_shared,      // reads what no thread wrote
    never_waits,           // one thread of a kernel that is launched early does not wait for earlier ones
    block_order,           // a block reads what another one writes
};

void launch_faults_cuda(Fault fault, const float* in, float* out, void* stream);

}  // namespace diffupose
