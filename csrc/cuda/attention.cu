// Attention: padded with any strides, masks, causal order, left padding and grouped heads, or
// packed sequences of different lengths. One query a sequence goes to decode_attention.cu, packed
// sequences on Hopper to packed_attention.cu, other fp16 and bf16 to the tensor cores
// (attention_mma.cuh), fp32 to plain arithmetic (attention_fma.cuh).
#include "cuda/attention_fma.cuh"
#include "cuda/attention_mma.cuh"
#include "cuda/launchers.h"

namespace eet_patch::cuda {
namespace {

constexpr int64_t kMaxGridYZ = 65535;
constexpr int64_t kMaxHeadDim = 256;

template <typename T, int kHeadDim>
cudaError_t launch_mma(const AttentionParams<T>& p, const LaunchConfig& config) {
  return launch(config, attention_mma_kernel<T, kHeadDim>, p);
}

template <int kHeadDim>
cudaError_t launch_fma(const AttentionParams<float>& p, LaunchConfig config) {
  config.shared_bytes = FmaTile<kHeadDim>::kSharedBytes;
  return launch(config, attention_fma_kernel<kHeadDim>, p);
}

}  // namespace

template <typename T>
cudaError_t launch_attention(const AttentionArgs& args, cudaStream_t stream, bool chained) {
  if (args.batch == 0 || args.num_heads == 0 || args.q_len == 0) return cudaSuccess;
  if (takes_decode_attention(args)) return launch_decode_attention<T>(args, stream, chained);
  if (args.batch > kMaxGridYZ || args.num_heads > kMaxGridYZ || args.head_dim > kMaxHeadDim)
    return cudaErrorInvalidValue;
  if (takes_packed_attention(args)) return launch_packed_attention<T>(args, stream);
  const AttentionParams<T> p = attention_params<T>(args);
  constexpr int kQueries = sizeof(T) == 4 ? kFmaQueries : kAttentionQueries;
  LaunchConfig config;
  config.stream = stream;
  config.chained = chained;
  config.grid = dim3(static_cast<unsigned>(ceil_div(args.q_len, kQueries)),
                     static_cast<unsigned>(args.num_heads), static_cast<unsigned>(args.batch));
  if constexpr (sizeof(T) == 4) {
    config.block = dim3(kFmaThreads);
    if (args.head_dim <= 64) return launch_fma<64>(p, config);
    if (args.head_dim <= 128) return launch_fma<128>(p, config);
    return launch_fma<256>(p, config);
  } else {
    config.block = dim3(kAttentionWarps * kWarpSize);
    if (args.head_dim <= 32) return launch_mma<T, 32>(p, config);
    if (args.head_dim <= 64) return launch_mma<T, 64>(p, config);
    if (args.head_dim <= 80) return launch_mma<T, 80>(p, config);
    if (args.head_dim <= 96) return launch_mma<T, 96>(p, config);
    if (args.head_dim <= 128) return launch_mma<T, 128>(p, config);
    if (args.head_dim <= 192) return launch_mma<T, 192>(p, config);
    return launch_mma<T, 256>(p, config);
  }
}

template cudaError_t launch_attention<float>(const AttentionArgs&, cudaStream_t, bool);
template cudaError_t launch_attention<__half>(const AttentionArgs&, cudaStream_t, bool);
template cudaError_t launch_attention<__nv_bfloat16>(const AttentionArgs&, cudaStream_t, bool);

int64_t attention_workspace_bytes(const AttentionArgs& args) {
  return takes_decode_attention(args) ? decode_attention_workspace_bytes(args) : 0;
}

Status attention(const AttentionArgs& args, const Context& context) {
  if (args.head_dim > kMaxHeadDim) return Status{Status::kUnsupported};
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_attention<decltype(element)>(args, stream_of(context), false);
  }));
}

}  // namespace eet_patch::cuda
