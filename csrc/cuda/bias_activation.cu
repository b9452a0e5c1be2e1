// Bias and activation over a matrix: bound by memory. A thread keeps one vector of columns, so its
// part of the bias stays in registers, and walks down the rows.
#include <algorithm>

#include "common/activation.cuh"
#include "common/launch.cuh"
#include "common/vector.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRowBlocks = 4096;  // grid.y; more rows than that are walked
constexpr int kRowsAtOnce = 4;       // whose loads are under way together

// Thread (x, y) of a block owns column vector blockIdx.x * blockDim.x + x of every (blockDim.y *
// gridDim.y)-th row. kVector > 1 needs 16-byte aligned rows. Reads and writes every element once;
// out may be input.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    bias_activation_kernel(T* out, const T* input, const T* bias, int64_t rows, int64_t size,
                           Activation activation) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kVector;
  if (column >= size) return;
  float added[kVector] = {};
  if (bias != nullptr) load_vector(bias + column, added);
  const int64_t step = int64_t(blockDim.y) * gridDim.y;
  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < rows;
       row += step * kRowsAtOnce) {
    float values[kRowsAtOnce][kVector];
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (row + r * step < rows) load_vector(input + (row + r * step) * size + column, values[r]);
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (row + r * step >= rows) break;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float sum = values[r][i] + added[i];
        values[r][i] = sizeof(T) == 2 ? activate_fast(sum, activation) : activate(sum, activation);
      }
      store_vector(out + (row + r * step) * size + column, values[r]);
    }
  }
}

template <typename T, int kVector>
cudaError_t launch_columns(const BiasActivationArgs& args, cudaStream_t stream) {
  const int64_t vectors = args.size / kVector;
  int threads_x = kThreads;
  // The widest block that leaves no thread without a column, or few of them.
  while (threads_x > 32 && (threads_x / 2 >= vectors || vectors % threads_x != 0)) threads_x /= 2;
  const int threads_y = kThreads / threads_x;
  LaunchConfig config;
  config.stream = stream;
  config.block = dim3(threads_x, threads_y);
  config.grid = dim3(static_cast<unsigned>(ceil_div(vectors, threads_x)),
                     static_cast<unsigned>(std::min<int64_t>(
                         ceil_div(args.rows, threads_y * kRowsAtOnce), kMaxRowBlocks)));
  return launch(config, bias_activation_kernel<T, kVector>, static_cast<T*>(args.out),
                static_cast<const T*>(args.input), static_cast<const T*>(args.bias), args.rows,
                args.size, args.activation);
}

template <typename T>
cudaError_t launch_bias_activation(const BiasActivationArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.size == 0) return cudaSuccess;
  const bool vectors = args.size % kVectorSize<T> == 0 && is_aligned(args.out) &&
                       is_aligned(args.input) && is_aligned(args.bias);
  return vectors ? launch_columns<T, kVectorSize<T>>(args, stream)
                 : launch_columns<T, 1>(args, stream);
}

}  // namespace

Status bias_activation(const BiasActivationArgs& args, const Context& context) {
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_bias_activation<decltype(element)>(args, stream_of(context));
  }));
}

}  // namespace eet_patch::cuda
