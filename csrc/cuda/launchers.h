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

// What a chain of products passes on beside its tensors. Statistics for a fused layer norm: a
// product leaves mean and sum of squared deviations of every kNormTile columns of a row
// (out_partials, (rows, norm_tiles(out_features))), the next one merges them instead of reading
// whole rows. Both must be products that `linear_takes_partials` says yes to.
struct LinearChain {
  bool chained = false;
  bool release_late = false;  // the launch after this reads, before it waits, what was written by
                              // launches before this one
  const float2* norm_partials = nullptr;
  float2* out_partials = nullptr;
  // The residual is that of a layer which normalises behind it, not normalised yet, with its
  // statistics: for a product that `linear_takes_residual_norm` says yes to.
  const void *residual_norm_weight = nullptr, *residual_norm_bias = nullptr;
  const float2* residual_partials = nullptr;
};
bool linear_takes_partials(const LinearArgs& args);
bool linear_takes_residual_norm(const LinearArgs& args);
int64_t norm_tiles(int64_t features);

template <typename T>
cudaError_t launch_linear(const LinearArgs& args, cudaStream_t stream, const LinearChain& chain);

template <typename T>
cudaError_t launch_attention(const AttentionArgs& args, cudaStream_t stream, bool chained);

// Scores of one query against a long past, split over the keys and combined by a second kernel in a
// fixed order.
template <typename T>
cudaError_t launch_decode_attention(const AttentionArgs& args, cudaStream_t stream, bool chained);
bool takes_decode_attention(const AttentionArgs& args);
int64_t decode_attention_workspace_bytes(const AttentionArgs& args);

// Packed sequences with no mask and no order, on sm_90a. Always chained: any kernel may be ahead.
template <typename T>
cudaError_t launch_packed_attention(const AttentionArgs& args, cudaStream_t stream);
bool takes_packed_attention(const AttentionArgs& args);

}  // namespace eet_patch::cuda
