// Rows of a matrix by index, zeros where there is none: bound by memory. It packs a padded batch
// and lays the packed rows out again.
#include <algorithm>

#include "common/launch.cuh"
#include "common/vector.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kThreads = 256;

// Thread (x, y) of a block moves unit x, x + blockDim.x, ... of row blockIdx.x * blockDim.y + y.
// Reads and writes every unit once.
template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(Unit* __restrict__ out, const Unit* __restrict__ input,
                       const int32_t* __restrict__ index, int64_t rows, int units) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const int64_t from = index[row];
  out += row * units;
  input += from * units;
  for (int unit = threadIdx.x; unit < units; unit += blockDim.x)
    out[unit] = from >= 0 ? input[unit] : Unit{};
}

template <typename Unit>
cudaError_t launch_units(const GatherRowsArgs& args, cudaStream_t stream) {
  const int64_t units = args.row_bytes / int64_t(sizeof(Unit));
  int threads_x = kThreads;
  while (threads_x > 32 && threads_x / 2 >= units) threads_x /= 2;
  LaunchConfig config;
  config.stream = stream;
  config.block = dim3(threads_x, kThreads / threads_x);
  config.grid = dim3(static_cast<unsigned>(ceil_div(args.rows, config.block.y)));
  return launch(config, gather_rows_kernel<Unit>, static_cast<Unit*>(args.out),
                static_cast<const Unit*>(args.input), args.index, args.rows,
                static_cast<int>(units));
}

}  // namespace

Status gather_rows(const GatherRowsArgs& args, const Context& context) {
  if (args.rows == 0 || args.row_bytes == 0) return Status{};
  const cudaStream_t stream = stream_of(context);
  if (args.row_bytes % kVectorBytes == 0 && is_aligned(args.out) && is_aligned(args.input))
    return to_status(launch_units<uint4>(args, stream));
  if (args.row_bytes % 2 != 0) return Status{Status::kUnsupported};
  return to_status(launch_units<uint16_t>(args, stream));
}

}  // namespace eet_patch::cuda
