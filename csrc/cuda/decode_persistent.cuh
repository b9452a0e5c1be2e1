// All layers of one decode step in one persistent kernel (fp16 and bf16, Hopper); the caller falls
// back to the chain of kernels where takes_persistent_decode says no.
#pragma once

#include <cuda_runtime.h>

#include "ops.h"

namespace eet_patch::cuda {

bool takes_persistent_decode(const DecodeLayersArgs& args);
int64_t persistent_decode_workspace_bytes(const DecodeLayersArgs& args);

// Reads the layer table from args.device_layers when the work runs; may be captured into a graph.
template <typename T>
cudaError_t launch_persistent_decode(const DecodeLayersArgs& args, cudaStream_t stream);

}  // namespace eet_patch::cuda
