// Bias and activation over rows. One thread a range of rows, or of columns where the rows are few;
// one read, one write.
#include "cpu/math.h"
#include "cpu/team.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

template <typename T, Activation kActivation>
void bias_activation_share(const Team& team, const BiasActivationArgs& args) {
  const T* bias = static_cast<const T*>(args.bias);
  const bool by_rows = args.rows >= team.size;
  const Range rows = by_rows ? team.share(args.rows) : Range{0, args.rows};
  const Range columns =
      by_rows ? Range{0, args.size} : team.share(args.size, 64);  // 64: no shared cache line
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const T* input = static_cast<const T*>(args.input) + r * args.size;
    T* out = static_cast<T*>(args.out) + r * args.size;
    for (int64_t j = columns.begin; j < columns.end; j += kLanes) {
      const int64_t n = columns.end - j;
      Vec x = load_upto(input + j, n);
      if (bias != nullptr) x = x + load_upto(bias + j, n);
      store_upto(out + j, activate<kActivation>(x), n);
    }
  }
}

}  // namespace

Status bias_activation(const BiasActivationArgs& args, const Context& context) {
  // an activation is worth about 4 plain steps
  parallel(threads_for(4 * args.rows * args.size, context), [&](const Team& team) {
    for_dtype(args.dtype, [&](auto element) {
      for_activation(args.activation, [&](auto tag) {
        bias_activation_share<decltype(element), decltype(tag)::kValue>(team, args);
      });
    });
  });
  return Status();
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
