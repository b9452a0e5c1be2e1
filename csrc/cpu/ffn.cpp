// A feed-forward block in one parallel region: two linear products with everything around them
// fused.
#include "cpu/team_ops.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

struct FfnSteps {
  LinearArgs fc1 = {}, fc2 = {};
  LayerNormArgs norm = {};

  explicit FfnSteps(const FfnArgs& args) {
    const bool pre = args.norm == NormPlacement::kPre;
    fc1.out = args.workspace;
    fc1.input = args.hidden_states;
    fc1.weight[0] = args.fc1_weight;
    fc1.bias[0] = args.fc1_bias;
    fc1.norm_weight = pre ? args.norm_weight : nullptr;
    fc1.norm_bias = pre ? args.norm_bias : nullptr;
    fc1.norm_eps = args.norm_eps;
    fc1.rows = args.rows;
    fc1.in_features = fc1.input_stride = args.hidden_size;
    fc1.out_features = fc1.out_stride = args.intermediate_size;
    fc1.num_weights = 1;
    fc1.in_out = args.in_out;
    fc1.activation = args.activation;
    fc1.dtype = args.dtype;

    fc2.out = args.out;
    fc2.input = args.workspace;
    fc2.weight[0] = args.fc2_weight;
    fc2.bias[0] = args.fc2_bias;
    fc2.residual = args.add_residual ? args.hidden_states : nullptr;
    fc2.rows = args.rows;
    fc2.in_features = fc2.input_stride = args.intermediate_size;
    fc2.out_features = fc2.out_stride = args.hidden_size;
    fc2.num_weights = 1;
    fc2.in_out = args.in_out;
    fc2.activation = Activation::kNone;
    fc2.dtype = args.dtype;

    norm.out = args.out;
    norm.input = args.out;
    norm.weight = args.norm_weight;
    norm.bias = args.norm_bias;
    norm.rows = args.rows;
    norm.hidden_size = args.hidden_size;
    norm.eps = args.norm_eps;
    norm.dtype = args.dtype;
  }
};

}  // namespace

// The activations between the products, rounded to T as PyTorch does.
int64_t ffn_workspace_bytes(const FfnArgs& args) {
  return args.rows * args.intermediate_size * element_bytes(args.dtype);
}

Status ffn(const FfnArgs& args, const Context& context) {
  if (args.rows == 0) return Status();
  const FfnSteps steps(args);
  float* packed = static_cast<float*>(
      thread_scratch(ScratchSlot::kPackedInput,
                     max64(linear_packed_bytes(steps.fc1), linear_packed_bytes(steps.fc2))));
  parallel(threads_for(linear_work(steps.fc1) / 2, context), [&](const Team& team) {
    linear_team(team, steps.fc1, packed);
    team.barrier();
    linear_team(team, steps.fc2, packed);
    if (args.norm == NormPlacement::kPost) {
      team.barrier();
      layernorm_team(team, steps.norm);
    }
  });
  return Status();
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
