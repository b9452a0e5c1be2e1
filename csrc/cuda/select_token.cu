// The next token of every row. A row is shared by blocks of kTokensPerBlock tokens each; the last
// of them to finish puts their results together and writes the row's state. Three ways, by what is
// on:
//   greedy         one launch: largest candidates of the blocks, their largest;
//   top_k          one launch: every block lists its own top_k; the last one finds the row's among
//                  them, then the top_p and min_p of these;
//   no top_k       the largest score; for top_p, how much probability lies how far below it, by
//                  distance; then the token, with only what lies at the one distance where top_p is
//                  reached undecided until the last block.
// Probabilities are added as integers (multiples of 2^-42 of the largest), so every run gives the
// same tokens. Nothing is sorted. Radix selection as in
// Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units"; sampling by
// exponential noise as torch.multinomial does it.
#include <cmath>

#include "cuda/token_scores.cuh"

namespace eet_patch::cuda {
namespace {

constexpr uint32_t kListCapacity = 16384;
constexpr int kSharedListCapacity = 4096;

// Bins of the distance d of a score below the largest: kBinsPerOctave for each doubling of d from
// 2^kLowestOctave on, so flat and peaked distributions are told apart equally well. From d = 32 on
// a token's probability is 0 as a multiple of 2^-42.
constexpr int kBinBitsPerOctave = 7, kLowestOctave = -20, kHighestOctave = 5;
constexpr int kDistanceBins = ((kHighestOctave - kLowestOctave) << kBinBitsPerOctave) + 1;
constexpr int kBinsPerThread = (kDistanceBins + kSelectThreads - 1) / kSelectThreads;
constexpr int kNoBin = kDistanceBins;  // nothing is undecided

// What a row's blocks leave for each other. The first three fields and `bins` are zero between
// calls.
struct RowState {
  Candidate best;  // the largest score, lowest_token_first
  Candidate best_sample;
  uint32_t arrivals, list_size;
  Mass target;  // top_p keeps a token while less than this lies above it,
  int bin;      // which is reached in this bin, and more is wanted of it alone
};

struct SampleState : RowState {
  Mass bins[kDistanceBins];
  Candidate list[kListCapacity];
};

constexpr int64_t kGreedyBytes = 256, kSampleBytes = (sizeof(SampleState) + 255) / 256 * 256;
static_assert(sizeof(RowState) <= kGreedyBytes, "a row's state");

// By the workspace and not by the call: one that is large enough for sampling then serves greedy
// calls too, and any number of rows, because a row's zeros stay where they are.
int64_t state_bytes(const SelectTokenArgs& args) {
  return args.workspace_bytes >= args.rows * kSampleBytes ? kSampleBytes : kGreedyBytes;
}

struct SelectParams {
  SelectTokenArgs args;
  int64_t state_bytes;
};

__device__ __forceinline__ RowState& row_state(const SelectParams& p) {
  return *reinterpret_cast<RowState*>(static_cast<char*>(p.args.workspace) +
                                      blockIdx.y * p.state_bytes);
}

__device__ __forceinline__ SampleState& sample_state(const SelectParams& p) {
  return static_cast<SampleState&>(row_state(p));
}

// What a row is at before this step; read at once, so that the last block need not wait for it.
struct RowStep {
  int64_t slot;
  int length;
  bool finished;
};

__device__ __forceinline__ RowStep load_step(const SelectTokenArgs& args) {
  RowStep step;
  step.length = args.lengths[blockIdx.y];
  step.slot = args.slots == nullptr ? blockIdx.y : args.slots[blockIdx.y];
  step.finished = args.finished[step.slot] != 0;
  return step;
}

__device__ __forceinline__ int64_t seen_words(const SelectTokenArgs& args) {
  return (args.vocab_size + 31) / 32;
}

template <typename T>
__device__ __forceinline__ RowScores<T> row_scores(const SelectTokenArgs& args,
                                                   const RowStep& step) {
  RowScores<T> row;
  row.logits = static_cast<const T*>(args.logits) + blockIdx.y * args.logits_stride;
  // Without a penalty `seen` is only written.
  row.seen = args.seen == nullptr || args.repetition_penalty == 1.0f
                 ? nullptr
                 : args.seen + step.slot * seen_words(args);
  row.eos_token_ids = args.eos_token_ids;
  row.suppressed_tokens = args.suppressed_tokens;
  row.num_suppressed = static_cast<int>(args.num_suppressed);
  row.num_eos =
      args.min_len > 0 && step.length + 1 < args.min_len ? static_cast<int>(args.num_eos) : 0;
  row.vocab_size = static_cast<int>(args.vocab_size);
  row.max_logit = row.log_sum = row.offset = 0.0f;
  row.repetition_penalty = args.repetition_penalty;
  row.temperature = args.temperature;
  return row;
}

// Writes the row's token and goes a step on; one thread.
__device__ void commit_token(const SelectTokenArgs& args, const RowStep& step, int64_t token) {
  const int64_t row = blockIdx.y, slot = step.slot;
  if (step.finished) token = args.pad_token_id;
  args.tokens[slot * args.tokens_stride + step.length + 1] = token;
  args.input_ids[row] = token;
  args.position_ids[row] += 1;
  args.lengths[row] = step.length + 1;
  if (step.finished) return;
  if (args.seen != nullptr) args.seen[slot * seen_words(args) + token / 32] |= 1u << (token % 32);
  bool ends = false;
#pragma unroll 1
  for (int64_t i = 0; i < args.num_eos; ++i) ends |= args.eos_token_ids[i] == token;
  if (ends) {
    args.finished[slot] = 1;
    atomicSub(args.unfinished_count, 1);
  }
}

// A finished row needs one thread. All blocks of the row leave when this is true.
__device__ __forceinline__ bool pass_finished_row(const SelectTokenArgs& args, const RowStep& step,
                                                  bool commits) {
  if (!step.finished) return false;
  if (commits && blockIdx.x == 0 && threadIdx.x == 0) commit_token(args, step, 0);
  return true;
}

__device__ __forceinline__ float distance(float max_score, uint32_t key) {
  return __fsub_rn(max_score, score_of(key));
}

// Softmax but for the sum: the largest score has 1.
__device__ __forceinline__ float relative_probability(float distance) { return expf(-distance); }

__device__ __forceinline__ Mass mass_of(float probability) {
  constexpr float kMassOfOne = 4398046511104.0f;  // 2^42: kMaxVocabSize of them fit in 64 bits
  return __float2ull_rn(probability * kMassOfOne);
}

__device__ __forceinline__ int bin_of(float distance) {
  constexpr int kFirst = (127 + kLowestOctave) << kBinBitsPerOctave;
  const int bin = static_cast<int>(__float_as_uint(distance) >> (23 - kBinBitsPerOctave)) - kFirst;
  return min(max(bin, 0), kDistanceBins - 1);
}

// top_p removes the tokens that, added from the least on, make no more than 1 - top_p: a token
// stays while the mass above it is less than this.
__device__ __forceinline__ Mass top_p_target(Mass total, float top_p) {
  const Mass removed = static_cast<Mass>((1.0 - static_cast<double>(top_p)) * total);
  return removed < total ? total - removed : 1;
}

__device__ __forceinline__ Candidate sampled(float probability, const float* noise, int token) {
  return lowest_token_first(order_key(__fdiv_rn(probability, noise[token])), token);
}

// Largest sample among this thread's candidates that `source` gives and that are at least `lowest`.
template <typename Source>
__device__ __forceinline__ Candidate best_sample(Source source, Candidate lowest, float max_score,
                                                 float min_p, const float* noise) {
  Candidate best = 0;
  source([&](Candidate candidate) {
    if (candidate < lowest) return;
    const float probability = relative_probability(distance(max_score, key_of(candidate)));
    if (probability < min_p) return;
    const Candidate sample = sampled(probability, noise, static_cast<uint32_t>(candidate));
    best = sample > best ? sample : best;
  });
  return best;
}

// The two kinds of candidates to choose from, (key, token): a list, and all of a row (at one
// distance, or all) where the list could not hold them. That is slow, and only for what is almost
// all ties, or a very large top_k.
struct ListSource {
  const Candidate* list;
  int size;
  template <typename F>
  __device__ __forceinline__ void operator()(F f) const {
    for (int i = threadIdx.x; i < size; i += kSelectThreads) f(list[i]);
  }
};

template <typename T>
struct RowSource {
  const RowScores<T>& row;
  SelectShared& shared;
  float max_score;
  int bin;  // kNoBin: all
  template <typename F>
  __device__ __forceinline__ void operator()(F f) const {
    for (int chunk = 0; chunk * kTokensPerBlock < row.vocab_size; ++chunk) {
      const ChunkLogits logits = load_chunk(row, chunk);
      uint32_t keys[kTokensPerThread];
      chunk_keys(row, chunk, logits, shared, keys);
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        if (keys[i] == 0 || (bin != kNoBin && bin_of(distance(max_score, keys[i])) != bin))
          continue;
        f(make_candidate(keys[i], chunk * kTokensPerBlock + i * kSelectThreads + threadIdx.x));
      }
    }
  }
};

// top_k, top_p, min_p and the draw, by one block, from candidates that hold the row's top_k. A row
// whose largest score isn't finite has no distribution; it gets the greedy token.
template <typename Source>
__device__ int draw_from_top_k(const SelectTokenArgs& args, Source source, const float* noise,
                               SelectShared& shared) {
  Candidate best = 0;
  source([&](Candidate candidate) {
    const Candidate greedy =
        lowest_token_first(key_of(candidate), static_cast<uint32_t>(candidate));
    best = greedy > best ? greedy : best;
  });
  best = block_max(best, shared);
  const float max_score = score_of(key_of(best));
  if (!isfinite(max_score)) return token_of_lowest_first(best);

  Candidate lowest =
      find_threshold([&](auto f) { source([&](Candidate candidate) { f(candidate, 1); }); },
                     args.top_k, 0, shared);
  lowest &= ~Candidate(0xffffffffu);  // ties stay
  if (args.top_p < 1.0f) {
    auto for_each_mass = [&](auto f) {
      source([&](Candidate candidate) {
        if (candidate < lowest) return;
        f(candidate, mass_of(relative_probability(distance(max_score, key_of(candidate)))));
      });
    };
    Mass total = 0;
    for_each_mass([&](Candidate, Mass mass) { total += mass; });
    total = block_sum(total, shared);
    const Candidate from =
        find_threshold(for_each_mass, top_p_target(total, args.top_p), 0, shared);
    lowest = from > lowest ? from : lowest;
  }
  return token_of_lowest_first(
      block_max(best_sample(source, lowest, max_score, args.min_p, noise), shared));
}

// The largest score of every row; with kCommits that is the token (greedy). One read of the logits.
template <typename T, bool kCommits, bool kPlain>
__global__ void __launch_bounds__(kSelectThreads) max_score_kernel(const SelectParams p) {
  __shared__ SelectShared shared;
  const RowStep step = load_step(p.args);
  const RowScores<T> row = row_scores<T>(p.args, step);
  wait_for_predecessor();
  release_dependents();  // the next one reads the logits before it waits
  const ChunkLogits logits = load_chunk(row, blockIdx.x);
  uint32_t keys[kTokensPerThread];
  if (pass_finished_row(p.args, step, kCommits)) return;
  chunk_keys<kPlain>(row, blockIdx.x, logits, shared, keys);
  Candidate best = 0;
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int token = blockIdx.x * kTokensPerBlock + i * kSelectThreads + threadIdx.x;
    const Candidate candidate = keys[i] == 0 ? 0 : lowest_token_first(keys[i], token);
    best = candidate > best ? candidate : best;
  }
  best = block_max(best, shared);
  RowState& state = row_state(p);
  if (threadIdx.x == 0) atomicMax(&state.best, best);
  if (!kCommits || !is_last_block_of_row(&state.arrivals, shared) || threadIdx.x != 0) return;
  commit_token(p.args, step, token_of_lowest_first(state.best));
  state.best = 0;
}

// Sampling with top_k. Every block lists the largest top_k of its tokens, with ties; the last one
// draws. With `lists` false there is one block a row, which reads the row again and again.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads)
    top_k_token_kernel(const SelectParams p, bool lists) {
  __shared__ SelectShared shared;
  __shared__ Candidate near_list[kSharedListCapacity];
  const RowStep step = load_step(p.args);
  const RowScores<T> row = row_scores<T>(p.args, step);
  wait_for_predecessor();
  release_dependents();  // the next one reads the logits before it waits
  const ChunkLogits logits = load_chunk(row, blockIdx.x);
  if (pass_finished_row(p.args, step, true)) return;
  SampleState& state = sample_state(p);
  const float* noise = p.args.noise + step.slot * p.args.vocab_size;
  uint32_t size = kListCapacity + 1;
  if (lists) {
    uint32_t keys[kTokensPerThread];
    Candidate candidates[kTokensPerThread];
    chunk_keys(row, blockIdx.x, logits, shared, keys);
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      const int token = blockIdx.x * kTokensPerBlock + i * kSelectThreads + threadIdx.x;
      candidates[i] = keys[i] == 0 ? 0 : make_candidate(keys[i], token);
    }
    append_largest<true>(candidates, static_cast<int>(p.args.top_k), state.list, &state.list_size,
                         kListCapacity, shared);
    if (!is_last_block_of_row(&state.arrivals, shared)) return;
    size = state.list_size;
    __syncthreads();
    if (threadIdx.x == 0) state.list_size = 0;
  }

  int token;
  if (size > kListCapacity) {
    const RowSource<T> source{row, shared, 0.0f, kNoBin};
    token = draw_from_top_k(p.args, source, noise, shared);
  } else {
    const bool fits = size <= kSharedListCapacity;
    if (fits) {
      for (uint32_t i = threadIdx.x; i < size; i += kSelectThreads) near_list[i] = state.list[i];
      __syncthreads();
    }
    const ListSource source{fits ? near_list : state.list, static_cast<int>(size)};
    token = draw_from_top_k(p.args, source, noise, shared);
  }
  if (threadIdx.x == 0) commit_token(p.args, step, token);
}

// How much probability lies in each bin of distance, and in which bin top_p is reached. One read of
// the logits.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads) top_p_bin_kernel(const SelectParams p) {
  __shared__ SelectShared shared;
  __shared__ uint32_t low[kDistanceBins], high[kDistanceBins];
  release_dependents();
  const RowStep step = load_step(p.args);
  const RowScores<T> row = row_scores<T>(p.args, step);
  const ChunkLogits logits = load_chunk(row, blockIdx.x);
  uint32_t keys[kTokensPerThread];
  for (int bin = threadIdx.x; bin < kDistanceBins; bin += kSelectThreads) low[bin] = high[bin] = 0;
  chunk_keys(row, blockIdx.x, logits, shared, keys);
  wait_for_predecessor();
  if (pass_finished_row(p.args, step, false)) return;
  SampleState& state = sample_state(p);
  const float max_score = score_of(key_of(state.best));
  if (!isfinite(max_score)) return;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    if (keys[i] == 0) continue;
    const float below = distance(max_score, keys[i]);
    const Mass mass = mass_of(relative_probability(below));
    if (mass != 0) add_weight(&low[bin_of(below)], &high[bin_of(below)], mass);
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kDistanceBins; bin += kSelectThreads) {
    const Mass mass = static_cast<Mass>(high[bin]) << 32 | low[bin];
    if (mass != 0) atomicAdd(&state.bins[bin], mass);
  }
  if (!is_last_block_of_row(&state.arrivals, shared)) return;

  Mass masses[kBinsPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    const int bin = threadIdx.x * kBinsPerThread + i;
    masses[i] = bin < kDistanceBins ? state.bins[bin] : 0;
    sum += masses[i];
    if (bin < kDistanceBins) state.bins[bin] = 0;
  }
  const Mass target = top_p_target(block_sum(sum, shared), p.args.top_p);
  __syncthreads();
  Mass above = block_scan<false>(sum, shared) - sum;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (above < target && above + masses[i] >= target) {  // once in the block
      state.bin = threadIdx.x * kBinsPerThread + i;
      state.target = target - above;
    }
    above += masses[i];
  }
}

// Sampling without top_k. Bins before the one where top_p is reached are in, those after it out;
// the tokens in it are listed for the last block. Reads the logits, and the noise of what is in.
template <typename T, bool kTopP>
__global__ void __launch_bounds__(kSelectThreads) sample_token_kernel(const SelectParams p) {
  __shared__ SelectShared shared;
  release_dependents();
  const RowStep step = load_step(p.args);
  const RowScores<T> row = row_scores<T>(p.args, step);
  const ChunkLogits logits = load_chunk(row, blockIdx.x);
  uint32_t keys[kTokensPerThread];
  chunk_keys(row, blockIdx.x, logits, shared, keys);
  wait_for_predecessor();
  if (pass_finished_row(p.args, step, true)) return;
  SampleState& state = sample_state(p);
  const float* noise = p.args.noise + step.slot * p.args.vocab_size;
  const float max_score = score_of(key_of(state.best));
  const int reached_in = kTopP ? state.bin : kNoBin;
  const bool has_distribution = isfinite(max_score);
  Candidate best = 0, undecided[kTokensPerThread];
  if (has_distribution) {
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      const int token = blockIdx.x * kTokensPerBlock + i * kSelectThreads + threadIdx.x;
      undecided[i] = 0;
      if (keys[i] == 0) continue;
      const float below = distance(max_score, keys[i]);
      const int bin = kTopP ? bin_of(below) : 0;
      if (bin == reached_in) undecided[i] = make_candidate(keys[i], token);
      const float probability = relative_probability(below);
      if (bin >= reached_in || probability < p.args.min_p) continue;
      const Candidate sample = sampled(probability, noise, token);
      best = sample > best ? sample : best;
    }
    best = block_max(best, shared);
    if (threadIdx.x == 0) atomicMax(&state.best_sample, best);
    if (kTopP) {
      uint32_t numbers[kTokensPerThread];
      number_candidates(undecided, 1, numbers, shared);
      append(undecided, numbers, state.list, &state.list_size, kListCapacity, shared);
    }
  }
  if (!is_last_block_of_row(&state.arrivals, shared)) return;

  best = has_distribution ? state.best_sample : state.best;
  if (kTopP && has_distribution) {
    auto best_undecided = [&](auto source) {
      const Candidate lowest = find_threshold(
          [&](auto f) {
            source([&](Candidate candidate) {
              f(candidate, mass_of(relative_probability(distance(max_score, key_of(candidate)))));
            });
          },
          state.target, 0, shared);
      return block_max(best_sample(source, lowest, max_score, p.args.min_p, noise), shared);
    };
    const Candidate last =
        state.list_size <= kListCapacity
            ? best_undecided(ListSource{state.list, static_cast<int>(state.list_size)})
            : best_undecided(RowSource<T>{row, shared, max_score, reached_in});
    best = last > best ? last : best;
  }
  __syncthreads();  // the state is read
  if (threadIdx.x != 0) return;
  commit_token(p.args, step, token_of_lowest_first(best));
  state.best = state.best_sample = 0;
  state.list_size = 0;
}

template <typename T>
cudaError_t launch_select_token(const SelectTokenArgs& args, cudaStream_t stream) {
  const SelectParams p{args, state_bytes(args)};
  const int64_t chunks = ceil_div(args.vocab_size, kTokensPerBlock);
  LaunchConfig config;
  config.stream = stream;
  config.block = dim3(kSelectThreads);
  config.grid = dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(args.rows));
  config.chained = args.chained;
  if (args.noise == nullptr) {
    const bool plain = (args.seen == nullptr || args.repetition_penalty == 1.0f) &&
                       args.temperature == 1.0f && args.num_eos + args.num_suppressed <= kShortList;
    return plain ? launch(config, max_score_kernel<T, true, true>, p)
                 : launch(config, max_score_kernel<T, true, false>, p);
  }
  if (args.top_k > 0 && args.top_k < args.vocab_size) {
    const bool lists = chunks * (args.top_k + kListSlack) <= kListCapacity;
    if (!lists) config.grid.x = 1;
    return launch(config, top_k_token_kernel<T>, p, lists);
  }
  cudaError_t error = launch(config, max_score_kernel<T, false, false>, p);
  config.chained = true;
  if (error != cudaSuccess || args.top_p >= 1.0f) {
    return error != cudaSuccess ? error : launch(config, sample_token_kernel<T, false>, p);
  }
  error = launch(config, top_p_bin_kernel<T>, p);
  return error != cudaSuccess ? error : launch(config, sample_token_kernel<T, true>, p);
}

}  // namespace

int64_t select_token_workspace_bytes(const SelectTokenArgs& args) {
  return args.rows * (args.noise != nullptr ? kSampleBytes : kGreedyBytes);
}

Status select_token(const SelectTokenArgs& args, const Context& context) {
  if (args.rows == 0) return Status();
  if (args.rows > kMaxSelectRows || args.vocab_size > kMaxVocabSize ||
      args.workspace_bytes < select_token_workspace_bytes(args)) {
    return Status{Status::kUnsupported};
  }
  return to_status(dispatch_dtype(args.dtype, [&](auto element) {
    return launch_select_token<decltype(element)>(args, stream_of(context));
  }));
}

}  // namespace eet_patch::cuda
