// Layer norm, and bias + residual + layer norm, in one kernel: a warp or a block of four warps owns
// a row, holds it in registers, takes the mean and then the variance about it in fp32 (Ba et al.
// 2016, arXiv:1607.06450).
#include "common/launch.cuh"
#include "common/row_norm.cuh"
#include "cuda/launchers.h"

namespace eet_patch::cuda {
namespace {

constexpr int kRowsPerBlock = 4;  // a warp each
constexpr int kBlockWarps =
    4;  // a block a row, where a warp could not hold it or the rows are too few
constexpr int kWarpMaxSize = 1024;
constexpr int kFewRows = 1024;

template <typename T>
struct NormParams {
  T* out;
  T* sum_out;
  const T *input, *bias, *residual, *weight, *norm_bias;
  int64_t rows;
  int size;
  float eps;
};

// kWarps > 1: one block of kWarps warps a row; kWarps = 1: kRowsPerBlock warps a block, one row
// each. Any hidden_size; kVector > 1 needs 16-byte aligned rows. Reads each operand once (up to 16
// elements a thread; longer rows hit the caches) and writes each result once. out may be input: an
// element is last read by the thread that writes it.
template <typename T, int kWarps, int kVector>
__global__ void __launch_bounds__(kBlockWarps* kWarpSize) layernorm_kernel(const NormParams<T> p) {
  __shared__ float shared[kWarps];
  release_dependents();
  wait_for_predecessor();
  const int64_t row = kWarps > 1 ? int64_t(blockIdx.x)
                                 : int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;  // a whole warp leaves, so the shuffles stay full
  const int64_t offset = row * p.size;
  const T* input = p.input + offset;

  auto load = [&](int column, float (&values)[kVector]) {
    load_vector(input + column, values);
    if (p.bias != nullptr || p.residual != nullptr) {
      float other[kVector];
      if (p.bias != nullptr) {
        load_vector(p.bias + column, other);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] += other[i];
      }
      if (p.residual != nullptr) {
        load_vector(p.residual + offset + column, other);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] += other[i];
      }
    }
  };
  auto store = [&](int column, const float (&values)[kVector], float (&normalised)[kVector]) {
    if (p.sum_out != nullptr) store_vector(p.sum_out + offset + column, values);
    scale_and_shift(normalised, p.weight, p.norm_bias, column);
    store_vector(p.out + offset + column, normalised);
  };
  normalise_row<kWarps, kVector>(p.size, p.eps, shared, load, store);
}

// A warp a row, held in registers, as many rows a block as it has warps; the parameters are asked
// for before the wait. Aligned rows. Otherwise as layernorm_kernel.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kRowsPerBlock* kWarpSize)
    held_layernorm_kernel(const NormParams<T> p) {
  using Row = HeldRow<T, kChunks>;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  const int64_t offset = row * p.size;
  Row bias, weight, norm_bias, input, residual;
  release_dependents();
  bias.load(p.bias, p.size);
  weight.load(p.weight, p.size);
  norm_bias.load(p.norm_bias, p.size);
  wait_for_predecessor();
  if (row >= p.rows) return;
  input.load(p.input + offset, p.size);
  residual.load(p.residual != nullptr ? p.residual + offset : nullptr, p.size);

  typename Row::Values values = {};
  input.add_to(values);
  bias.add_to(values);
  residual.add_to(values);
  if (p.sum_out != nullptr) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = Row::first() + c * Row::kStride;
      if (column < p.size) store_vector(p.sum_out + offset + column, values[c]);
    }
  }
  normalise_held<T, kChunks>(values, p.size, p.eps, p.weight != nullptr, weight, norm_bias,
                             p.out + offset);
}

template <typename T, int kVector>
cudaError_t launch_rows(const NormParams<T>& p, cudaStream_t stream, bool chained) {
  LaunchConfig config;
  config.stream = stream;
  config.chained = chained;
  config.block = dim3(kBlockWarps * kWarpSize);
  const bool warp_rows =
      p.size <= kWarpMaxSize && (p.rows > kFewRows || p.size <= kWarpSize * kVector);
  config.grid = dim3(static_cast<unsigned>(warp_rows ? ceil_div(p.rows, kRowsPerBlock) : p.rows));
  if constexpr (kVector > 1) {
    // Few rows: a block each, so that all multiprocessors share in them.
    if (!warp_rows && p.size <= kWarpMaxSize) {
      config.block = dim3(kWarpSize);
      return with_held_chunks<T>(p.size, [&](auto chunks) {
        return launch(config, held_layernorm_kernel<T, decltype(chunks)::value>, p);
      });
    }
    if (warp_rows) {
      return with_held_chunks<T>(p.size, [&](auto chunks) {
        return launch(config, held_layernorm_kernel<T, decltype(chunks)::value>, p);
      });
    }
  }
  return warp_rows ? launch(config, layernorm_kernel<T, 1, kVector>, p)
                   : launch(config, layernorm_kernel<T, kBlockWarps, kVector>, p);
}

}  // namespace

template <typename T>
cudaError_t launch_layernorm(const BiasResidualLayerNormArgs& args, cudaStream_t stream,
                             bool chained) {
  if (args.rows == 0 || args.hidden_size == 0) return cudaSuccess;
  NormParams<T> p;
  p.out = static_cast<T*>(args.out);
  p.sum_out = static_cast<T*>(args.sum_out);
  p.input = static_cast<const T*>(args.input);
  p.bias = static_cast<const T*>(args.bias);
  p.residual = static_cast<const T*>(args.residual);
  p.weight = static_cast<const T*>(args.weight);
  p.norm_bias = static_cast<const T*>(args.norm_bias);
  p.rows = args.rows;
  p.size = static_cast<int>(args.hidden_size);
  p.eps = args.eps;
  const bool vectors = args.hidden_size % kVectorSize<T> == 0 && is_aligned(args.out) &&
                       is_aligned(args.sum_out) && is_aligned(args.input) &&
                       is_aligned(args.bias) && is_aligned(args.residual) &&
                       is_aligned(args.weight) && is_aligned(args.norm_bias);
  return vectors ? launch_rows<T, kVectorSize<T>>(p, stream, chained)
                 : launch_rows<T, 1>(p, stream, chained);
}

template cudaError_t launch_layernorm<float>(const BiasResidualLayerNormArgs&, cudaStream_t, bool);
template cudaError_t launch_layernorm<__half>(const BiasResidualLayerNormArgs&, cudaStream_t, bool);
template cudaError_t launch_layernorm<__nv_bfloat16>(const BiasResidualLayerNormArgs&, cudaStream_t,
                                                     bool);

Status bias_residual_layernorm(const BiasResidualLayerNormArgs& args, const Context& context) {
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_layernorm<decltype(element)>(args, stream_of(context), args.chained);
  }));
}

Status layernorm(const LayerNormArgs& args, const Context& context) {
  BiasResidualLayerNormArgs same = {};
  same.out = args.out;
  same.input = args.input;
  same.weight = args.weight;
  same.norm_bias = args.bias;
  same.rows = args.rows;
  same.hidden_size = args.hidden_size;
  same.eps = args.eps;
  same.dtype = args.dtype;
  same.chained = args.chained;
  return bias_residual_layernorm(same, context);
}

}  // namespace eet_patch::cuda
