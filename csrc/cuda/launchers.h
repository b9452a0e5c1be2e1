// The launchers that the composite ops chain. `chained`: the kernel before it on the stream is of
// the same call, so it may start early (programmatic dependent launch). Weights are read before the
// predecessor is waited for; all else after.
#pragma once

#include <cuda_runtime.h>

#include "ops.h"

namespace eet_patch::cuda {

template <typename T>
cudaError_t launch_layernorm(const BiasResidualLayerNormArgs& args, cudaStream_t stream,
                             bool chained);

template <typename T>
cudaError_t launch_linear(const LinearArgs& args, cudaStream_t stream, bool chained);

template <typename T>
cudaError_t launch_attention(const AttentionArgs& args, cudaStream_t stream, bool chained);

// Scores of one query against a long past, split over the keys and combined by a second kernel in a
// fixed order.
template <typename T>
cudaError_t launch_decode_attention(const AttentionArgs& args, cudaStream_t stream, bool chained);
bool takes_decode_attention(const AttentionArgs& args);
int64_t decode_attention_workspace_bytes(const AttentionArgs& args);

}  // namespace eet_patch::cuda
