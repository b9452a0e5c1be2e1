// Layer norm, and the sum of input, bias and residual followed by layer norm.
#include "cpu/norm.h"
#include "cpu/team_ops.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

// One thread a row: three reads, of which the second and third hit the cache, and one write. Any
// hidden_size.
template <typename T>
void layernorm_rows(const Team& team, const LayerNormArgs& args) {
  const Range rows = team.share(args.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    layernorm_row(static_cast<T*>(args.out) + r * args.hidden_size,
                  static_cast<const T*>(args.input) + r * args.hidden_size,
                  static_cast<const T*>(args.weight), static_cast<const T*>(args.bias),
                  args.hidden_size, args.eps);
  }
}

// The sum is kept in fp32 for the norm and rounded only in sum_out. `sum` holds one row, read whole
// before it is written back, so every output may alias an input of the same row.
template <typename T>
void bias_residual_layernorm_rows(const Team& team, const BiasResidualLayerNormArgs& args) {
  const int64_t size = args.hidden_size;
  float* sum = static_cast<float*>(
      thread_scratch(ScratchSlot::kPackedWeight, size * int64_t(sizeof(float))));
  const T* bias = static_cast<const T*>(args.bias);
  const Range rows = team.share(args.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* input = static_cast<const T*>(args.input) + r * size;
    const T* residual =
        args.residual == nullptr ? nullptr : static_cast<const T*>(args.residual) + r * size;
    T* sum_out = args.sum_out == nullptr ? nullptr : static_cast<T*>(args.sum_out) + r * size;
    for (int64_t j = 0; j < size; j += kLanes) {
      const int64_t n = size - j;
      Vec x = load_upto(input + j, n);
      if (bias != nullptr) x = x + load_upto(bias + j, n);
      if (residual != nullptr) x = x + load_upto(residual + j, n);
      store_upto(sum + j, x, n);
      if (sum_out != nullptr) store_upto(sum_out + j, x, n);
    }
    layernorm_row(static_cast<T*>(args.out) + r * size, sum, static_cast<const T*>(args.weight),
                  static_cast<const T*>(args.norm_bias), size, args.eps);
  }
}

}  // namespace

void layernorm_team(const Team& team, const LayerNormArgs& args) {
  for_dtype(args.dtype, [&](auto element) { layernorm_rows<decltype(element)>(team, args); });
}

Status layernorm(const LayerNormArgs& args, const Context& context) {
  parallel(threads_for(args.rows * args.hidden_size, context),
           [&](const Team& team) { layernorm_team(team, args); });
  return Status();
}

Status bias_residual_layernorm(const BiasResidualLayerNormArgs& args, const Context& context) {
  parallel(threads_for(args.rows * args.hidden_size, context), [&](const Team& team) {
    for_dtype(args.dtype,
              [&](auto element) { bias_residual_layernorm_rows<decltype(element)>(team, args); });
  });
  return Status();
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
