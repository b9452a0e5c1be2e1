// The best continuations of every beam: log softmax, processors, the beam's score, the largest few.
// Two launches. The first sums up the softmax of parts of a row and finds the largest logit of
// each: with `count` parts whose largest is above a score, no token below that score can be among
// the `count` best, so that the second looks at those parts alone. For few rows, and where a
// penalty for tokens that were there already stands between logits and scores, every block of the
// second finds its own largest instead, by the search of token_scores.cuh, and the last block of a
// row takes the row's from those. Either puts them in order by counting, for each of them, how many
// are larger.
#include "common/vector.cuh"
#include "cuda/token_scores.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kMaxBlocksPerRow = kMaxVocabSize / kTokensPerBlock;
constexpr uint32_t kListCapacity = kMaxBlocksPerRow * (kMaxCandidates + kListSlack);

// A part is a warp's share of a row.
constexpr int kLaneTokens = 8;
constexpr int kPartTokens = kLaneTokens * kWarpSize;
constexpr int kMaxParts = kMaxVocabSize / kPartTokens;
constexpr int kPartWarps = 8;  // of a block
// From here on: for 160 rows of 32768 tokens it took 24 us where the other way took 44 on an H100,
// for 32 rows 14 and 12.
constexpr int64_t kManyRows = 65;

struct CandidateState {
  uint32_t arrivals, list_size;  // zero between calls
  float part_max[kMaxParts], part_sums[kMaxParts];
  uint32_t part_keys[kMaxParts];  // of the largest logit that is not suppressed
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
  wait_for_predecessor();
  // Only now: the next launch reads the logits before it waits, and hypothesis_step, behind that,
  // what the step before left.
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

// Up to here the largest are found one after the other.
constexpr int64_t kFewCandidates = 4;
static_assert(kMaxBlocksPerRow * kFewCandidates <= kSelectThreads, "a thread each");

// Writes the `count` largest of a block's candidates to its own places of the list; 0 where there
// are fewer. Less code and no counting, for few of them.
__device__ __forceinline__ void list_one_by_one(const Candidate (&candidates)[kTokensPerThread],
                                                int count, Candidate* list, SelectShared& shared) {
  Candidate most = ~Candidate(0), own = 0;  // the largest that may come next
  __syncthreads();                          // whoever used `shared` before has read it
#pragma unroll 1
  for (int found = 0; found < count; ++found) {
    Candidate largest = 0;
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      if (candidates[i] <= most && candidates[i] > largest) largest = candidates[i];
    }
    largest = warp_max(largest);
    // In turns, so that one barrier a round is enough.
    Candidate* const of_warps = found % 2 == 0 ? shared.largest : shared.smallest;
    if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = largest;
    __syncthreads();
    largest = warp_max(of_warps[threadIdx.x % kSelectWarps]);
    if (static_cast<int>(threadIdx.x) == found) own = largest;
    most = largest == 0 ? 0 : largest - 1;
  }
  if (static_cast<int>(threadIdx.x) < count) list[blockIdx.x * count + threadIdx.x] = own;
}

// Every block lists its share's largest; the last one finds the row's and writes them in order.
template <typename T, bool kPlain>
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
#pragma unroll 1
  for (int i = threadIdx.x % kWarpSize; i < blocks; i += kWarpSize)
    largest = fmaxf(largest, state.max_logits[i]);
  row.max_logit = warp_max(largest);
#pragma unroll 1
  for (int i = threadIdx.x % kWarpSize; i < blocks; i += kWarpSize) {
    if (state.sums[i] != 0.0f) sum += state.sums[i] * expf(state.max_logits[i] - row.max_logit);
  }
  row.log_sum = logf(warp_sum(sum));

  uint32_t keys[kTokensPerThread];
  Candidate candidates[kTokensPerThread];
  chunk_keys<kPlain>(row, blockIdx.x, loaded, shared, keys);
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int token = blockIdx.x * kTokensPerBlock + i * kSelectThreads + threadIdx.x;
    candidates[i] = keys[i] == 0 ? 0 : lowest_token_first(keys[i], token);
  }
  const int count = static_cast<int>(args.count);
  if (count <= kFewCandidates) {
    list_one_by_one(candidates, count, state.list, shared);
  } else {
    append_largest<false>(candidates, count, state.list, &state.list_size, kListCapacity, shared);
  }
  if (!is_last_block_of_row(&state.arrivals, shared)) return;

  const int size = count <= kFewCandidates ? blocks * count : static_cast<int>(state.list_size);
  auto source = [&](auto f) {
#pragma unroll 1
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
  const int num_best = few ? static_cast<int>(shared.count) : count;
  if (static_cast<int>(threadIdx.x) >= num_best) return;
  const Candidate own = best[threadIdx.x];
  int rank = 0;
#pragma unroll 8
  for (int i = 0; i < num_best; ++i) rank += best[i] > own;
  if (rank >= count) return;
  args.scores[blockIdx.y * args.count + rank] = score_of(key_of(own));
  args.tokens[blockIdx.y * args.count + rank] = token_of_lowest_first(own);
}

__device__ __forceinline__ uint32_t warp_max_key(uint32_t value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value = max(value, __shfl_xor_sync(kFullMask, value, offset));
  return value;
}

// The largest logit of a part, the sum of exp(logit - largest) and the key of the largest that is
// not suppressed, a warp a part; the sum always in the same order. kVectors: rows that can be read
// 16 bytes at a time. Reads every logit once.
template <typename T, bool kVectors>
__global__ void __launch_bounds__(kPartWarps* kWarpSize)
    part_sums_kernel(const TopCandidatesArgs args) {
  __shared__ uint32_t hidden_words[kPartWarps][kLaneTokens];
  wait_for_predecessor();
  release_dependents();  // only now, as in log_softmax_sums_kernel
  const RowScores<T> row = row_scores<T>(args);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int part = blockIdx.x * kPartWarps + warp, first = part * kPartTokens;
  if (first >= row.vocab_size) return;  // a whole warp leaves
  // A vector a lane, or every 32nd token of it.
  constexpr int kLaneStep = kVectors ? kLaneTokens : 1, kStep = kVectors ? 1 : kWarpSize;
  const int own = first + lane * kLaneStep;
  float logits[kLaneTokens];
  if constexpr (kVectors) {
    if (own < row.vocab_size) {
      load_vector(row.logits + own, logits);
    } else {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) logits[i] = -INFINITY;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneTokens; ++i)
      logits[i] =
          own + i * kStep < row.vocab_size ? to_float(row.logits[own + i * kStep]) : -INFINITY;
  }
  uint32_t* hidden = hidden_words[warp];  // a bit a token of the part
  if (lane < kLaneTokens) hidden[lane] = 0;
  __syncwarp();
  auto hide = [&](const int64_t* tokens, int count) {
    for (int i = lane; i < count; i += kWarpSize) {
      const int64_t place = tokens[i] - first;
      if (place >= 0 && place < kPartTokens) atomicOr(&hidden[place / 32], 1u << (place % 32));
    }
  };
  hide(row.suppressed_tokens, row.num_suppressed);
  hide(row.eos_token_ids, row.num_eos);
  __syncwarp();

  float largest = -INFINITY, sum = 0.0f;
  uint32_t open = 0;
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    const int place = lane * kLaneStep + i * kStep;
    largest = fmaxf(largest, logits[i]);
    if (first + place < row.vocab_size && !(hidden[place / 32] >> (place % 32) & 1u))
      open = max(open, order_key(logits[i]));
  }
  largest = warp_max(largest);
#pragma unroll
  for (int i = 0; i < kLaneTokens; ++i) {
    // A share of nothing but -inf must not make a NaN of the whole row.
    if (logits[i] != -INFINITY) sum += expf(logits[i] - largest);
  }
  sum = warp_sum(sum);
  open = warp_max_key(open);
  if (lane != 0) return;
  CandidateState& state = row_state(args);
  state.part_max[part] = largest;
  state.part_sums[part] = sum;
  state.part_keys[part] = open;
}

// One block a row. Reads what the parts left, then the logits of those that matter.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads)
    best_of_parts_kernel(const TopCandidatesArgs args) {
  __shared__ SelectShared shared;
  __shared__ Candidate best[kSelectThreads];
  __shared__ uint32_t keys[kMaxParts], threshold, largest_key, num_chosen;
  __shared__ uint16_t chosen[kMaxParts];
  release_dependents();
  RowScores<T> row = row_scores<T>(args);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int parts = (row.vocab_size + kPartTokens - 1) / kPartTokens;
  const int count = static_cast<int>(args.count);
  wait_for_predecessor();

  const CandidateState& state = row_state(args);
  float largest = -INFINITY, sum = 0.0f;
#pragma unroll 1
  for (int i = lane; i < parts; i += kWarpSize) largest = fmaxf(largest, state.part_max[i]);
  row.max_logit = warp_max(largest);
#pragma unroll 1
  for (int i = lane; i < parts; i += kWarpSize) {
    if (state.part_sums[i] != 0.0f)
      sum += state.part_sums[i] * expf(state.part_max[i] - row.max_logit);
  }
  row.log_sum = logf(warp_sum(sum));
  auto key_of_logit = [&](float logit) {  // as chunk_keys
    return order_key(
        __fadd_rn(__fsub_rn(__fsub_rn(logit, row.max_logit), row.log_sum), row.offset));
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < parts; i += kSelectThreads)
    keys[i] =
        state.part_keys[i] == 0 ? order_key(-INFINITY) : key_of_logit(score_of(state.part_keys[i]));
  if (threadIdx.x == 0) threshold = num_chosen = shared.count = 0;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < parts; i += kSelectThreads) {
    const uint32_t own = keys[i];
    int rank = 0;
#pragma unroll 8
    for (int j = 0; j < parts; ++j) rank += keys[j] > own || (keys[j] == own && j < i);
    if (rank == count - 1) threshold = own;
    if (rank == 0) largest_key = own;
  }
  __syncthreads();
  if (largest_key == order_key(-INFINITY)) {  // of equal ones the lowest
    for (int i = threadIdx.x; i < count; i += kSelectThreads) {
      args.scores[blockIdx.y * args.count + i] = -INFINITY;
      args.tokens[blockIdx.y * args.count + i] = i;
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < parts; i += kSelectThreads) {
    if (keys[i] >= threshold) chosen[atomicAdd(&num_chosen, 1u)] = static_cast<uint16_t>(i);
  }
  __syncthreads();

  auto is_in = [](const int64_t* tokens, int size, int token) {
#pragma unroll 1
    for (int i = 0; i < size; ++i)
      if (tokens[i] == token) return true;
    return false;
  };
  auto source = [&](auto f) {  // what is not below the threshold
#pragma unroll 1
    for (int c = warp; c < static_cast<int>(num_chosen); c += kSelectWarps) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        const int token = chosen[c] * kPartTokens + i * kWarpSize + lane;
        if (token >= row.vocab_size) continue;
        uint32_t key = key_of_logit(to_float(row.logits[token]));
        if (key < threshold) continue;
        if (is_in(row.suppressed_tokens, row.num_suppressed, token) ||
            is_in(row.eos_token_ids, row.num_eos, token)) {
          key = order_key(-INFINITY);
        }
        if (key >= threshold) f(lowest_token_first(key, token), 1);
      }
    }
  };
  auto gather = [&](Candidate lowest) {
    source([&](Candidate candidate, int) {
      if (candidate < lowest) return;
      const uint32_t place = atomicAdd(&shared.count, 1u);
      if (place < kSelectThreads) best[place] = candidate;
    });
    __syncthreads();
  };
#pragma unroll 1
  for (Candidate lowest = 1;;) {
    gather(lowest);
    if (shared.count <= kSelectThreads) break;
    // Many equal scores: a search finds the least that counts.
    lowest = find_threshold(source, count, 1, shared);
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
  }
  const int num_best = static_cast<int>(shared.count);
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
  if (args.rows >= kManyRows && (args.seen == nullptr || args.repetition_penalty == 1.0f)) {
    constexpr int64_t kVector = kLaneTokens;
    const bool vectors = args.vocab_size % kVector == 0 && args.logits_stride % kVector == 0 &&
                         reinterpret_cast<uintptr_t>(args.logits) % (kVector * sizeof(T)) == 0;
    config.block = dim3(kPartWarps * kWarpSize);
    config.grid = dim3(static_cast<unsigned>(ceil_div(args.vocab_size, kPartTokens * kPartWarps)),
                       static_cast<unsigned>(args.rows));
    config.chained = args.chained;
    const cudaError_t error = vectors ? launch(config, part_sums_kernel<T, true>, args)
                                      : launch(config, part_sums_kernel<T, false>, args);
    config.block = dim3(kSelectThreads);
    config.grid = dim3(1, static_cast<unsigned>(args.rows));
    config.chained = true;
    return error != cudaSuccess ? error : launch(config, best_of_parts_kernel<T>, args);
  }
  config.block = dim3(kSelectThreads);
  config.grid = dim3(static_cast<unsigned>(ceil_div(args.vocab_size, kTokensPerBlock)),
                     static_cast<unsigned>(args.rows));
  config.chained = args.chained;
  const cudaError_t error = launch(config, log_softmax_sums_kernel<T>, args);
  config.chained = true;
  if (error != cudaSuccess) return error;
  const bool plain = (args.seen == nullptr || args.repetition_penalty == 1.0f) &&
                     args.num_eos + args.num_suppressed <= kShortList;
  return plain ? launch(config, top_candidates_kernel<T, true>, args)
               : launch(config, top_candidates_kernel<T, false>, args);
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
