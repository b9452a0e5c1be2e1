// Launching of attention over packed sequences (packed_attention.cuh).
#include "common/launch.cuh"
#include "cuda/launchers.h"
#include "cuda/packed_attention.cuh"

namespace eet_patch::cuda {
namespace {

// The map of `tokens` by `heads` by head_dim 16-bit elements, for boxes of box_tokens lines of
// line_bytes of one head. Elements outside read as zero.
cudaError_t make_head_map(CUtensorMap* map, const void* data, const HeadStrides& strides,
                          int64_t tokens, int64_t heads, int64_t head_dim, int box_tokens,
                          int line_bytes) {
  const EncodeTensorMap encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr int64_t kElementBytes = 2;
  const cuuint64_t sizes[3] = {cuuint64_t(head_dim), cuuint64_t(heads), cuuint64_t(tokens)};
  // One head may come with any stride, which is then not used.
  const int64_t head_stride = heads == 1 ? head_dim : strides.head;
  const cuuint64_t steps_between[2] = {cuuint64_t(head_stride * kElementBytes),
                                       cuuint64_t(strides.token * kElementBytes)};
  const cuuint32_t box[3] = {cuuint32_t(line_bytes / kElementBytes), 1, cuuint32_t(box_tokens)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(data), sizes, steps_between,
             box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             line_bytes == kSwizzleBytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename T, typename Tile>
cudaError_t launch_tile(const AttentionArgs& args, bool longest_first, cudaStream_t stream) {
  if (args.q_len > Tile::kMaxLength) return cudaErrorInvalidValue;
  PackedAttentionParams<T> p = {};
  const int64_t tokens = args.total_tokens;
  cudaError_t error =
      make_head_map(&p.query, args.query, args.query_strides, tokens, args.num_heads, args.head_dim,
                    kWarpgroupQueries, Tile::kLineBytes);
  if (error == cudaSuccess) {
    error = make_head_map(&p.key, args.key, args.key_strides, tokens, args.num_kv_heads,
                          args.head_dim, Tile::kKeys, Tile::kLineBytes);
  }
  if (error == cudaSuccess) {
    error = make_head_map(&p.value, args.value, args.value_strides, tokens, args.num_kv_heads,
                          args.head_dim, Tile::kKeys, Tile::kLineBytes);
  }
  if (error != cudaSuccess) return error;
  p.out = static_cast<T*>(args.out);
  p.out_token_stride = args.out_strides.token;
  p.out_head_stride = args.out_strides.head;
  p.cu_seqlens = args.cu_seqlens;
  p.group_size = static_cast<int>(args.num_heads / args.num_kv_heads);
  p.longest = static_cast<int>(args.q_len);
  p.longest_first = longest_first && args.batch > 1 && args.batch <= kWarpSize;
  p.scale = args.softmax_scale * kLog2E;
  LaunchConfig config;
  config.stream = stream;
  config.chained = true;  // it waits for the kernel ahead before it reads or writes anything
  config.grid = dim3(static_cast<unsigned>(args.num_heads),
                     static_cast<unsigned>(ceil_div(args.q_len, Tile::kQueries)),
                     static_cast<unsigned>(args.batch));
  config.block = dim3(Tile::kThreads);
  config.shared_bytes = Tile::kSharedBytes;
  return launch(config, packed_attention_kernel<T, Tile>, p);
}

// For heads of 64, args.tile names one of these. Up to kMaxShort tokens the time is that of a block
// from its start to its end, and small blocks hide most of it; longer sequences want their keys and
// values read by more queries at a time. us a launch on an H100 (benchmarks/packed_attention.py,
// fp16, 12 heads, inputs in the L2): 32 sequences of 8 to 128 tokens 7.4 by tile 0, 8.8 by 2
// (torch's flash attention 14.1); 32 of 31 to 512 tokens 38.3 by 2, 39.0 by 3, 41.5 by 6, 48 to 50
// by the others (64.4); 8 of 512 tokens 19.9 by 2 (cuDNN 22.0); 32 of 128 tokens 10.4 by 0 (11.8);
// one of 128 tokens 3.1 by 0 (6.6).
constexpr int kShortTile = 0, kLongTile = 2;
constexpr int64_t kMaxShort = 128;
template <typename T>
cudaError_t launch_64(const AttentionArgs& args, cudaStream_t stream) {
  const bool is_short = args.q_len <= kMaxShort;
  switch (args.tile < 0 ? (is_short ? kShortTile : kLongTile) : args.tile) {
    case 0:
      return launch_tile<T, PackedTile<64, 1, 64, 2, 4>>(args, false, stream);
    case 1:
      return launch_tile<T, PackedTile<64, 1, 64, 2, 4>>(args, true, stream);
    case 2:
      return launch_tile<T, PackedTile<64, 2, 64, 6, 2>>(args, false, stream);
    case 3:
      return launch_tile<T, PackedTile<64, 2, 64, 6, 2>>(args, true, stream);
    case 4:
      return launch_tile<T, PackedTile<64, 3, 64, 6, 1>>(args, true, stream);
    case 5:
      return launch_tile<T, PackedTile<64, 3, 128, 4, 1>>(args, true, stream);
    case 6:
      return launch_tile<T, PackedTile<64, 1, 64, 4, 3>>(args, true, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename T>
cudaError_t launch_any(const AttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim == 32) return launch_tile<T, PackedTile<32, 2, 64, 6, 2>>(args, true, stream);
  if (args.head_dim == 64) return launch_64<T>(args, stream);
  return launch_tile<T, PackedTile<128, 2, 64, 5, 1>>(args, true, stream);
}

bool is_aligned_view(const void* data, const HeadStrides& strides, int64_t heads) {
  constexpr int64_t kStep = kVectorBytes / 2;
  return is_aligned(data) && strides.token > 0 && strides.token % kStep == 0 &&
         (heads == 1 || (strides.head > 0 && strides.head % kStep == 0));
}

}  // namespace

bool takes_packed_attention(const AttentionArgs& args) {
  if (args.cu_seqlens == nullptr || args.total_tokens <= 0 || args.dtype == DType::kFloat32)
    return false;
  if (args.head_dim != 32 && args.head_dim != 64 && args.head_dim != 128) return false;
  if (args.causal || args.mask.kind != MaskKind::kNone || args.kv_start != nullptr) return false;
  if (!(args.softmax_scale > 0.0f) || args.total_tokens >= int64_t(1) << 26 ||
      args.q_len >= int64_t(1) << 21)
    return false;
  return is_aligned_view(args.query, args.query_strides, args.num_heads) &&
         is_aligned_view(args.key, args.key_strides, args.num_kv_heads) &&
         is_aligned_view(args.value, args.value_strides, args.num_kv_heads) &&
         is_aligned_view(args.out, args.out_strides, args.num_heads) && has_warpgroup_products();
}

template <>
cudaError_t launch_packed_attention<float>(const AttentionArgs&, cudaStream_t) {
  return cudaErrorInvalidValue;  // takes_packed_attention says no
}
template <>
cudaError_t launch_packed_attention<__half>(const AttentionArgs& args, cudaStream_t stream) {
  return launch_any<__half>(args, stream);
}
template <>
cudaError_t launch_packed_attention<__nv_bfloat16>(const AttentionArgs& args, cudaStream_t stream) {
  return launch_any<__nv_bfloat16>(args, stream);
}

}  // namespace eet_patch::cuda
