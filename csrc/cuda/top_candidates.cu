// The best continuations of every beam: log softmax, processors, the beam's score, the largest few.
// Two launches: the sums of the softmax a block each, then every block's own largest, from which
// the last block of a row takes the row's. Found by the search of token_scores.cuh and put in order
// by counting, for each of them, how many are larger.
#include "cuda/token_scores.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kMaxBlocksPerRow = kMaxVocabSize / kTokensPerBlock;
constexpr uint32_t kListCapacity = kMaxBlocksPerRow * (kMaxCandidates + kListSlack);

struct CandidateState {
  uint32_t arrivals, list_size;  // zero between calls
  float max_logits[kMaxBlocksPerRow], sums[kMaxBlocksPerRow];
  Candidate list[kListCapacity];
};

constexpr int64_t kStateBytes =
    (sizeof(CandidateState) + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;

__device__ __forceinline__ CandidateState& row_state(const TopCandidatesArgs& args) {
  return *reinterpret_cast<CandidateState*>(static_cast<char*>(args.workspace) +
                                            blockIdx.y * kStateBytes);
}

template <typename T>
__device__ __forceinline__ RowScores<T> row_scores(const TopCandidatesArgs& args) {
  const int64_t slot = args.slots == nullptr ? blockIdx.y : args.slots[blockIdx.y];
  RowScores<T> row;
  row.logits = static_cast<const T*>(args.logits) + blockIdx.y * args.logits_stride;
  row.seen = args.seen == nullptr || args.repetition_penalty == 1.0f
                 ? nullptr
                 : args.seen + slot * ((args.vocab_size + 31) / 32);
  row.eos_token_ids = args.eos_token_ids;
  row.suppressed_tokens = args.suppressed_tokens;
  row.num_suppressed = static_cast<int>(args.num_suppressed);
  row.num_eos = args.min_len > 0 && args.lengths[blockIdx.y] + 1 < args.min_len
                    ? static_cast<int>(args.num_eos)
                    : 0;
  row.vocab_size = static_cast<int>(args.vocab_size);
  row.max_logit = row.log_sum = 0.0f;
  row.repetition_penalty = args.repetition_penalty;
  row.temperature = 1.0f;
  row.offset = args.row_scores == nullptr ? 0.0f : args.row_scores[blockIdx.y];
  return row;
}

// A NaN, which fmaxf would drop, comes back in the sum.
__device__ __forceinline__ float block_max(float value, float* shared) {
  value = warp_max(value);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = warp_max(shared[threadIdx.x % kSelectWarps]);
  __syncthreads();
  return value;
}

// The largest logit of a block's share and the sum of exp(logit - largest), in fp32 and always in
// the same order.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads)
    log_softmax_sums_kernel(const TopCandidatesArgs args) {
  __shared__ float shared[kSelectWarps];
  release_dependents();
  const RowScores<T> row = row_scores<T>(args);
  const ChunkLogits loaded = load_chunk(row, blockIdx.x);
  float logits[kTokensPerThread], largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int token = blockIdx.x * kTokensPerBlock + i * kSelectThreads + threadIdx.x;
    logits[i] = token < row.vocab_size ? loaded.logits[i] : -INFINITY;
    largest = fmaxf(largest, logits[i]);
  }
  largest = block_max(largest, shared);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    // A share of nothing but -inf must not make a NaN of the whole row.
    if (logits[i] != -INFINITY) sum += expf(logits[i] - largest);
  }
  sum = block_sum<kSelectWarps>(sum, shared);
  if (threadIdx.x != 0) return;
  CandidateState& state = row_state(args);
  state.max_logits[blockIdx.x] = largest;
  state.sums[blockIdx.x] = sum;
}

// Every block lists its share's largest; the last one finds the row's and writes them in order.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads)
    top_candidates_kernel(const TopCandidatesArgs args) {
  __shared__ SelectShared shared;
  __shared__ Candidate best[kSelectThreads];
  release_dependents();
  RowScores<T> row = row_scores<T>(args);
  const ChunkLogits loaded = load_chunk(row, blockIdx.x);
  wait_for_predecessor();

  CandidateState& state = row_state(args);
  const int blocks = gridDim.x;
  float largest = -INFINITY, sum = 0.0f;
  for (int i = threadIdx.x % kWarpSize; i < blocks; i += kWarpSize)
    largest = fmaxf(largest, state.max_logits[i]);
  row.max_logit = warp_max(largest);
  for (int i = threadIdx.x % kWarpSize; i < blocks; i += kWarpSize) {
    if (state.sums[i] != 0.0f) sum += state.sums[i] * expf(state.max_logits[i] - row.max_logit);
  }
  row.log_sum = logf(warp_sum(sum));

  uint32_t keys[kTokensPerThread];
  Candidate candidates[kTokensPerThread];
  chunk_keys(row, blockIdx.x, loaded, shared, keys);
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int token = blockIdx.x * kTokensPerBlock + i * kSelectThreads + threadIdx.x;
    candidates[i] = keys[i] == 0 ? 0 : lowest_token_first(keys[i], token);
  }
  append_largest<false>(candidates, static_cast<int>(args.count), state.list, &state.list_size,
                        kListCapacity, shared);
  if (!is_last_block_of_row(&state.arrivals, shared)) return;

  const int size = static_cast<int>(state.list_size), count = static_cast<int>(args.count);
  auto source = [&](auto f) {
    for (int i = threadIdx.x; i < size; i += kSelectThreads) f(state.list[i], 1);
  };
  // What a thread each can put in order needs no search.
  const bool few = size <= kSelectThreads;
  const Candidate lowest = few ? 1 : find_threshold(source, count, 1, shared);
  __syncthreads();
  if (threadIdx.x == 0) shared.count = state.list_size = 0;
  __syncthreads();
  source([&](Candidate candidate, int) {
    if (candidate >= lowest) best[atomicAdd(&shared.count, 1u)] = candidate;
  });
  __syncthreads();
  const int num_best = few ? size : count;
  if (static_cast<int>(threadIdx.x) >= num_best) return;
  const Candidate own = best[threadIdx.x];
  int rank = 0;
#pragma unroll 8
  for (int i = 0; i < num_best; ++i) rank += best[i] > own;
  if (rank >= count) return;
  args.scores[blockIdx.y * args.count + rank] = score_of(key_of(own));
  args.tokens[blockIdx.y * args.count + rank] = token_of_lowest_first(own);
}

template <typename T>
cudaError_t launch_top_candidates(const TopCandidatesArgs& args, cudaStream_t stream) {
  LaunchConfig config;
  config.stream = stream;
  config.block = dim3(kSelectThreads);
  config.grid = dim3(static_cast<unsigned>(ceil_div(args.vocab_size, kTokensPerBlock)),
                     static_cast<unsigned>(args.rows));
  const cudaError_t error = launch(config, log_softmax_sums_kernel<T>, args);
  config.chained = true;
  return error != cudaSuccess ? error : launch(config, top_candidates_kernel<T>, args);
}

}  // namespace

int64_t top_candidates_workspace_bytes(const TopCandidatesArgs& args) {
  return args.rows * kStateBytes;
}

Status top_candidates(const TopCandidatesArgs& args, const Context& context) {
  if (args.rows == 0) return Status();
  if (args.rows > kMaxSelectRows || args.vocab_size > kMaxVocabSize ||
      args.count > kMaxCandidates || args.count > args.vocab_size ||
      args.workspace_bytes < top_candidates_workspace_bytes(args)) {
    return Status{Status::kUnsupported};
  }
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_top_candidates<decltype(element)>(args, stream_of(context));
  }));
}

}  // namespace eet_patch::cuda
