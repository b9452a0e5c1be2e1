// Word, position and token type embeddings summed, and optionally layer-normed (Ba et al. 2016,
// arXiv:1607.06450): a warp or a block of four warps owns a row and holds the sum in registers. An
// index outside its table traps.
#include "common/launch.cuh"
#include "common/row_norm.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kBlockWarps = 4;
constexpr int kRowsPerBlock = 4;  // a warp each
constexpr int kWarpMaxSize = 1024;
constexpr int kFewRows = 1024;

template <typename T>
struct EmbeddingParams {
  T* out;
  const T *word_weight, *position_weight, *token_type_weight, *norm_weight, *norm_bias;
  const int64_t *input_ids, *position_ids, *token_type_ids;
  int64_t rows, vocab_size, num_positions, num_token_types, position_count, token_type_count;
  int size;
  float word_scale, eps;
  const int32_t* tokens;
};

__device__ __forceinline__ int64_t checked_index(int64_t index, int64_t count) {
  if (index < 0 || index >= count) __trap();
  return index;
}

// Rows and vectors as in layernorm_kernel. Reads up to three table rows and writes one.
template <typename T, int kWarps, int kVector>
__global__ void __launch_bounds__(kBlockWarps* kWarpSize)
    embedding_kernel(const EmbeddingParams<T> p) {
  __shared__ float shared[kWarps];
  release_dependents();
  wait_for_predecessor();
  const int64_t row = kWarps > 1 ? int64_t(blockIdx.x)
                                 : int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;
  T* out = p.out + row * p.size;
  const int64_t token = p.tokens != nullptr ? int64_t(p.tokens[row]) : row;
  if (token < 0) {  // the whole warp, or block
    constexpr int kThreads = kWarps * kWarpSize;
    const float zeros[kVector] = {};
    for (int column = threadIdx.x % kThreads * kVector; column < p.size;
         column += kThreads * kVector)
      store_vector(out + column, zeros);
    return;
  }
  const T* word = p.word_weight + checked_index(p.input_ids[token], p.vocab_size) * p.size;
  const T* position = nullptr;
  if (p.position_weight != nullptr) {
    position = p.position_weight +
               checked_index(p.position_ids[token % p.position_count], p.num_positions) * p.size;
  }
  const T* token_type = nullptr;
  if (p.token_type_weight != nullptr) {
    const int64_t type =
        p.token_type_ids != nullptr ? p.token_type_ids[token % p.token_type_count] : 0;
    token_type = p.token_type_weight + checked_index(type, p.num_token_types) * p.size;
  }

  auto load = [&](int column, float (&values)[kVector]) {
    load_vector(word + column, values);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] *= p.word_scale;
    scale_and_shift<kVector, T>(values, nullptr, token_type, column);
    scale_and_shift<kVector, T>(values, nullptr, position, column);
  };
  if (p.norm_weight != nullptr) {
    auto store = [&](int column, const float (&)[kVector], float (&normalised)[kVector]) {
      scale_and_shift(normalised, p.norm_weight, p.norm_bias, column);
      store_vector(out + column, normalised);
    };
    normalise_row<kWarps, kVector>(p.size, p.eps, shared, load, store);
  } else {
    const int first = (kWarps > 1 ? threadIdx.x : threadIdx.x % kWarpSize) * kVector;
    for (int column = first; column < p.size; column += kWarps * kWarpSize * kVector) {
      float values[kVector];
      load(column, values);
      store_vector(out + column, values);
    }
  }
}

// A warp a row, held in registers, with norm; aligned rows. Otherwise as embedding_kernel.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kRowsPerBlock* kWarpSize)
    held_embedding_kernel(const EmbeddingParams<T> p) {
  using Row = HeldRow<T, kChunks>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarpSize;
  Row word, position = {}, token_type = {}, norm_weight, norm_bias;
  release_dependents();
  norm_weight.load(p.norm_weight, p.size);
  norm_bias.load(p.norm_bias, p.size);
  wait_for_predecessor();
  if (row >= p.rows) return;
  T* out = p.out + row * p.size;
  const int64_t token = p.tokens != nullptr ? int64_t(p.tokens[row]) : row;
  if (token < 0) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int column = Row::first() + c * Row::kStride;
      if (column < p.size) *reinterpret_cast<uint4*>(out + column) = uint4{};
    }
    return;
  }
  const int64_t id = p.input_ids[token];
  int64_t place = 0, type = 0;
  if (p.position_weight != nullptr) place = p.position_ids[token % p.position_count];
  if (p.token_type_weight != nullptr && p.token_type_ids != nullptr)
    type = p.token_type_ids[token % p.token_type_count];
  word.load(p.word_weight + checked_index(id, p.vocab_size) * p.size, p.size);
  if (p.position_weight != nullptr)
    position.load(p.position_weight + checked_index(place, p.num_positions) * p.size, p.size);
  if (p.token_type_weight != nullptr)
    token_type.load(p.token_type_weight + checked_index(type, p.num_token_types) * p.size, p.size);

  typename Row::Values values = {};
  word.add_to(values);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < Row::kVector; ++i) values[c][i] *= p.word_scale;
  }
  token_type.add_to(values);
  position.add_to(values);
  normalise_held<T, kChunks>(values, p.size, p.eps, true, norm_weight, norm_bias, out);
}

template <typename T, int kVector>
cudaError_t launch_rows(const EmbeddingParams<T>& p, cudaStream_t stream, bool chained) {
  LaunchConfig config;
  config.stream = stream;
  config.chained = chained;
  config.block = dim3(kBlockWarps * kWarpSize);
  const bool warp_rows =
      p.size <= kWarpMaxSize && (p.rows > kFewRows || p.size <= kWarpSize * kVector);
  config.grid = dim3(static_cast<unsigned>(warp_rows ? ceil_div(p.rows, kRowsPerBlock) : p.rows));
  if constexpr (kVector > 1) {
    if (warp_rows && p.norm_weight != nullptr) {
      return with_held_chunks<T>(p.size, [&](auto chunks) {
        return launch(config, held_embedding_kernel<T, decltype(chunks)::value>, p);
      });
    }
  }
  return warp_rows ? launch(config, embedding_kernel<T, 1, kVector>, p)
                   : launch(config, embedding_kernel<T, kBlockWarps, kVector>, p);
}

template <typename T>
cudaError_t launch_embedding(const EmbeddingArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.hidden_size == 0) return cudaSuccess;
  EmbeddingParams<T> p;
  p.out = static_cast<T*>(args.out);
  p.word_weight = static_cast<const T*>(args.word_weight);
  p.position_weight = static_cast<const T*>(args.position_weight);
  p.token_type_weight = static_cast<const T*>(args.token_type_weight);
  p.norm_weight = static_cast<const T*>(args.norm_weight);
  p.norm_bias = static_cast<const T*>(args.norm_bias);
  p.input_ids = args.input_ids;
  p.position_ids = args.position_ids;
  p.token_type_ids = args.token_type_ids;
  p.rows = args.rows;
  p.vocab_size = args.vocab_size;
  p.num_positions = args.num_positions;
  p.num_token_types = args.num_token_types;
  p.position_count = args.position_count;
  p.token_type_count = args.token_type_count;
  p.size = static_cast<int>(args.hidden_size);
  p.word_scale = args.word_scale;
  p.eps = args.eps;
  p.tokens = args.tokens;
  const bool vectors = args.hidden_size % kVectorSize<T> == 0 && is_aligned(args.out) &&
                       is_aligned(args.word_weight) && is_aligned(args.position_weight) &&
                       is_aligned(args.token_type_weight) && is_aligned(args.norm_weight) &&
                       is_aligned(args.norm_bias);
  return vectors ? launch_rows<T, kVectorSize<T>>(p, stream, args.chained)
                 : launch_rows<T, 1>(p, stream, args.chained);
}

}  // namespace

Status embedding(const EmbeddingArgs& args, const Context& context) {
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_embedding<decltype(element)>(args, stream_of(context));
  }));
}

}  // namespace eet_patch::cuda
