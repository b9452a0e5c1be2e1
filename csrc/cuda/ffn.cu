// One feed-forward block of a layer for few tokens, as a chain of launches, each able to start
// before the one ahead of it ends: [layer norm +] first product + activation, second product +
// residual [, layer norm].
#include "common/launch.cuh"
#include "cuda/launchers.h"

namespace eet_patch::cuda {
namespace {

template <typename T>
cudaError_t launch_ffn(const FfnArgs& args, cudaStream_t stream) {
  if (args.workspace == nullptr || args.workspace_bytes < ffn_workspace_bytes(args))
    return cudaErrorInvalidValue;
  LinearArgs first = {};
  first.out = args.workspace;
  first.input = args.hidden_states;
  first.weight[0] = args.fc1_weight;
  first.bias[0] = args.fc1_bias;
  if (args.norm == NormPlacement::kPre) {
    first.norm_weight = args.norm_weight;
    first.norm_bias = args.norm_bias;
    first.norm_eps = args.norm_eps;
  }
  first.rows = args.rows;
  first.in_features = first.input_stride = args.hidden_size;
  first.out_features = first.out_stride = args.intermediate_size;
  first.num_weights = 1;
  first.in_out = args.in_out;
  first.activation = args.activation;
  first.dtype = args.dtype;
  cudaError_t error = launch_linear<T>(first, stream, LinearChain());

  LinearArgs second = {};
  second.out = args.out;
  second.input = args.workspace;
  second.weight[0] = args.fc2_weight;
  second.bias[0] = args.fc2_bias;
  second.residual = args.add_residual ? args.hidden_states : nullptr;
  second.rows = args.rows;
  second.in_features = second.input_stride = args.intermediate_size;
  second.out_features = second.out_stride = args.hidden_size;
  second.num_weights = 1;
  second.in_out = args.in_out;
  second.dtype = args.dtype;
  if (error == cudaSuccess) error = launch_linear<T>(second, stream, LinearChain{true});

  if (error == cudaSuccess && args.norm == NormPlacement::kPost) {
    BiasResidualLayerNormArgs norm = {};
    norm.out = args.out;
    norm.input = args.out;
    norm.weight = args.norm_weight;
    norm.norm_bias = args.norm_bias;
    norm.rows = args.rows;
    norm.hidden_size = args.hidden_size;
    norm.eps = args.norm_eps;
    norm.dtype = args.dtype;
    error = launch_layernorm<T>(norm, stream, true);
  }
  return error;
}

}  // namespace

int64_t ffn_workspace_bytes(const FfnArgs& args) {
  return workspace_part(args.rows * args.intermediate_size * element_size(args.dtype));
}

Status ffn(const FfnArgs& args, const Context& context) {
  if (args.rows > kMaxSkinnyRows) return Status{Status::kUnsupported};
  if (args.rows == 0) return Status{};
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_ffn<decltype(element)>(args, stream_of(context));
  }));
}

}  // namespace eet_patch::cuda
