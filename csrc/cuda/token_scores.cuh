// What the ops that choose tokens share: the processed scores of a row as integers that order like
// them, and a search by radix for the place where a row's weights, added from the largest score
// down, reach a target.
//
// A candidate is (key << 32 | low word): `key` orders like the score, NaN above all as in torch,
// and the low word makes candidates of a row distinct. 0 is no candidate.
#pragma once

#include "common/convert.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"

namespace eet_patch::cuda {

using Candidate = unsigned long long;
using Mass = unsigned long long;

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kWarpSize;
constexpr int kTokensPerThread = 8;
// One block's share of a row. A multiple of 32, so that a warp reads one word of a bit set.
constexpr int kTokensPerBlock = kSelectThreads * kTokensPerThread;
// A block lists this many candidates more than it must where that saves a round of its search.
constexpr int kListSlack = 16;
constexpr int64_t kMaxVocabSize = 80 * kTokensPerBlock;
constexpr int64_t kMaxSelectRows = 65535;  // gridDim.y

// Shared memory of a block that chooses tokens.
struct SelectShared {
  uint32_t low[kSelectThreads], high[kSelectThreads];  // 64-bit sums, a bin a thread
  uint32_t suppressed[kTokensPerBlock / 32];           // a bit a token of the chunk
  Candidate smallest[kSelectWarps], largest[kSelectWarps];
  Mass totals[kSelectWarps];
  Candidate bin_first, bin_last;
  Mass above_bin, bin_weight;
  uint32_t count, offset;
  bool is_last;
};

__device__ __forceinline__ uint32_t order_key(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));  // -0 becomes 0: they are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

__device__ __forceinline__ uint32_t key_of(Candidate candidate) {
  return static_cast<uint32_t>(candidate >> 32);
}

__device__ __forceinline__ Candidate make_candidate(uint32_t key, uint32_t low) {
  return static_cast<Candidate>(key) << 32 | low;
}

// Among equal scores the lowest token is the largest candidate of this kind.
__device__ __forceinline__ Candidate lowest_token_first(uint32_t key, int token) {
  return make_candidate(key, ~static_cast<uint32_t>(token));
}

__device__ __forceinline__ int token_of_lowest_first(Candidate candidate) {
  return static_cast<int>(~static_cast<uint32_t>(candidate));
}

// One row's logits, and what turns them into scores, in this order; what is off has a value that
// changes nothing.
template <typename T>
struct RowScores {
  const T* logits;
  const uint32_t* seen;          // or null
  const int64_t* eos_token_ids;  // suppressed too
  const int64_t* suppressed_tokens;
  int num_eos, num_suppressed, vocab_size;
  float max_logit, log_sum;  // score = (logit - max_logit) - log_sum
  float repetition_penalty, temperature;
  float offset;  // added last
};

// What a thread reads of a chunk: of tokens first + t, first + t + kSelectThreads, ... for thread
// t.
struct ChunkLogits {
  float logits[kTokensPerThread];
  uint32_t seen;  // bit i: of the i-th
};

template <typename T>
__device__ __forceinline__ ChunkLogits load_chunk(const RowScores<T>& row, int chunk) {
  const int first = chunk * kTokensPerBlock + threadIdx.x;
  T logits[kTokensPerThread];
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int token = first + i * kSelectThreads;
    logits[i] = token < row.vocab_size ? row.logits[token] : T(0.0f);
  }
  ChunkLogits loaded;
  loaded.seen = 0;
  if (row.seen != nullptr) {
#pragma unroll
    for (int i = 0; i < kTokensPerThread; ++i) {
      const int token = first + i * kSelectThreads;
      if (token < row.vocab_size) loaded.seen |= (row.seen[token / 32] >> (token % 32) & 1u) << i;
    }
  }
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) loaded.logits[i] = to_float(logits[i]);
  return loaded;
}

// Which of a thread's tokens are in a short list: bit i for the i-th.
__device__ __forceinline__ uint32_t own_tokens(int chunk, const int64_t* tokens, int count) {
  uint32_t own = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int64_t place = tokens[i] - int64_t(chunk) * kTokensPerBlock;
    if (place >= 0 && place < kTokensPerBlock && place % kSelectThreads == threadIdx.x)
      own |= 1u << (place / kSelectThreads);
  }
  return own;
}

__device__ __forceinline__ void mark_tokens(SelectShared& shared, int chunk, const int64_t* tokens,
                                            int count) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kSelectThreads) {
    const int64_t place = tokens[i] - int64_t(chunk) * kTokensPerBlock;
    if (place >= 0 && place < kTokensPerBlock)
      atomicOr(&shared.suppressed[place / 32], 1u << (place % 32));
  }
}

constexpr int kShortList = 16;

// The thread's suppressed tokens. Up to kShortList of them every thread looks through them all,
// which needs no barrier. Every thread of the block calls.
template <typename T>
__device__ __forceinline__ uint32_t suppressed_tokens(const RowScores<T>& row, int chunk,
                                                      SelectShared& shared) {
  if (row.num_eos + row.num_suppressed <= kShortList) {
    return own_tokens(chunk, row.suppressed_tokens, row.num_suppressed) |
           own_tokens(chunk, row.eos_token_ids, row.num_eos);
  }
  __syncthreads();  // the bits of the chunk before are read
  if (threadIdx.x < kTokensPerBlock / 32) shared.suppressed[threadIdx.x] = 0;
  __syncthreads();
  mark_tokens(shared, chunk, row.suppressed_tokens, row.num_suppressed);
  mark_tokens(shared, chunk, row.eos_token_ids, row.num_eos);
  __syncthreads();
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int place = i * kSelectThreads + threadIdx.x;
    own |= (shared.suppressed[place / 32] >> (place % 32) & 1u) << i;
  }
  return own;
}

// Keys of a chunk's scores, 0 past the row's end. Every thread of the block calls. No fused
// multiply-add here or where keys are read: a score must come out the same in every kernel.
// kPlain: there is no penalty, the temperature is 1, and no more than kShortList tokens are
// suppressed; the code is shorter then, and a launch between others takes the time that its
// instructions take to come: fairseq's hypothesis_step went from 7.6 to 2.2 us by that alone.
template <bool kPlain = false, typename T>
__device__ __forceinline__ void chunk_keys(const RowScores<T>& row, int chunk,
                                           const ChunkLogits& loaded, SelectShared& shared,
                                           uint32_t (&keys)[kTokensPerThread]) {
  const uint32_t suppressed = kPlain
                                  ? own_tokens(chunk, row.suppressed_tokens, row.num_suppressed) |
                                        own_tokens(chunk, row.eos_token_ids, row.num_eos)
                                  : suppressed_tokens(row, chunk, shared);
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const int token = chunk * kTokensPerBlock + i * kSelectThreads + threadIdx.x;
    float score = __fsub_rn(__fsub_rn(loaded.logits[i], row.max_logit), row.log_sum);
    if (!kPlain && (loaded.seen >> i & 1u)) {
      score = score < 0.0f ? __fmul_rn(score, row.repetition_penalty)
                           : __fdiv_rn(score, row.repetition_penalty);
    }
    if (suppressed >> i & 1u) score = -INFINITY;
    if (!kPlain && row.temperature != 1.0f) score = __fdiv_rn(score, row.temperature);
    keys[i] = token < row.vocab_size ? order_key(__fadd_rn(score, row.offset)) : 0;
  }
}

__device__ __forceinline__ Candidate warp_max(Candidate value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const Candidate other = __shfl_xor_sync(kFullMask, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ Candidate warp_min(Candidate value) { return ~warp_max(~value); }

__device__ __forceinline__ Candidate block_max(Candidate value, SelectShared& shared) {
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared.largest[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  return warp_max(shared.largest[threadIdx.x % kSelectWarps]);
}

__device__ __forceinline__ Mass block_sum(Mass value, SelectShared& shared) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullMask, value, offset);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared.totals[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  Mass sum = 0;
  for (int warp = 0; warp < kSelectWarps; ++warp) sum += shared.totals[warp];
  return sum;
}

// Sum over the block's threads from this one's value on (kDescending) or up to it, itself
// included. The caller has a barrier between two calls.
template <bool kDescending>
__device__ __forceinline__ Mass block_scan(Mass value, SelectShared& shared) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Mass other = kDescending ? __shfl_down_sync(kFullMask, value, offset)
                                   : __shfl_up_sync(kFullMask, value, offset);
    if (kDescending ? lane + offset < kWarpSize : lane >= offset) value += other;
  }
  if (lane == (kDescending ? 0 : kWarpSize - 1)) shared.totals[warp] = value;
  __syncthreads();
  for (int other = 0; other < kSelectWarps; ++other) {
    if (kDescending ? other > warp : other < warp) value += shared.totals[other];
  }
  return value;
}

// Adds to a 64-bit sum kept as two words: 64-bit atomics on shared memory are loops of
// compare-and-swap, and these are not. Sums of integers come out the same in any order.
__device__ __forceinline__ void add_weight(uint32_t* low, uint32_t* high, Mass weight) {
  const uint32_t addend = static_cast<uint32_t>(weight);
  const uint32_t before = atomicAdd(low, addend);
  const uint32_t carried = static_cast<uint32_t>(weight >> 32) + (before + addend < before);
  if (carried != 0) atomicAdd(high, carried);
}

// The smallest candidate with less than `target` (> 0) of weight above it: of the count-th largest
// where every weight is 1. 0 if all weights together don't reach the target. `for_each(f)` calls
// f(candidate, weight) for this thread's share, the same each time, and may hold barriers.
//
// Every round spreads what lies between the smallest and the largest candidate in question over a
// bin a thread and goes on with the bin in which the target is reached, until that holds one
// candidate, or no more than `slack` of weight: then the result is the bin's lower end, and
// there may be as much too much above it.
template <typename ForEach>
__device__ Candidate find_threshold(ForEach for_each, Mass target, Mass slack,
                                    SelectShared& shared) {
  Candidate first = 1, last = ~Candidate(0);
  Mass above = 0;
  __syncthreads();  // whoever used `shared` before has read it
  while (true) {
    Candidate smallest = ~Candidate(0), largest = 0;
    for_each([&](Candidate candidate, Mass) {
      if (candidate < first || candidate > last) return;
      smallest = candidate < smallest ? candidate : smallest;
      largest = candidate > largest ? candidate : largest;
    });
    smallest = warp_min(smallest);
    largest = warp_max(largest);
    if (threadIdx.x % kWarpSize == 0) {
      shared.smallest[threadIdx.x / kWarpSize] = smallest;
      shared.largest[threadIdx.x / kWarpSize] = largest;
    }
    shared.low[threadIdx.x] = shared.high[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x == 0) shared.bin_first = 0;
    smallest = warp_min(shared.smallest[threadIdx.x % kSelectWarps]);
    largest = warp_max(shared.largest[threadIdx.x % kSelectWarps]);
    if (largest == 0) return 0;
    if (largest == smallest) return smallest;

    int shift = 0;
    constexpr int kBinBits = 9;
    static_assert(1 << kBinBits == kSelectThreads, "a bin a thread");
    if (largest - smallest >= kSelectThreads) shift = 64 - __clzll(largest - smallest) - kBinBits;
    for_each([&](Candidate candidate, Mass weight) {
      if (candidate < smallest || candidate > largest) return;
      const int bin = static_cast<int>((candidate - smallest) >> shift);
      add_weight(&shared.low[bin], &shared.high[bin], weight);
    });
    __syncthreads();
    const Mass weight = static_cast<Mass>(shared.high[threadIdx.x]) << 32 | shared.low[threadIdx.x];
    const Mass reached = above + block_scan<true>(weight, shared);
    if (reached >= target && reached - weight < target) {  // one thread, or none
      const Candidate bin_first = smallest + (static_cast<Candidate>(threadIdx.x) << shift);
      const Candidate width = Candidate(1) << shift;
      shared.bin_first = bin_first;
      shared.bin_last = largest - bin_first < width ? largest : bin_first + (width - 1);
      shared.above_bin = reached - weight;
      shared.bin_weight = weight;
    }
    __syncthreads();
    first = shared.bin_first;
    last = shared.bin_last;
    above = shared.above_bin;
    if (first == 0 || shift == 0 || shared.bin_weight <= slack) return first;
  }
}

// Numbers the candidates from `lowest` on, out of a thread's kTokensPerThread, in no order; the
// others get ~0. Their count is shared.count until the next call.
__device__ __forceinline__ void number_candidates(const Candidate (&candidates)[kTokensPerThread],
                                                  Candidate lowest,
                                                  uint32_t (&numbers)[kTokensPerThread],
                                                  SelectShared& shared) {
  __syncthreads();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    const bool wanted = candidates[i] >= lowest && candidates[i] != 0;
    numbers[i] = wanted ? atomicAdd(&shared.count, 1u) : ~0u;
  }
  __syncthreads();
}

// Appends the numbered ones to a list in global memory; what is past its capacity is counted and
// not written.
__device__ __forceinline__ void append(const Candidate (&candidates)[kTokensPerThread],
                                       const uint32_t (&numbers)[kTokensPerThread], Candidate* list,
                                       uint32_t* list_size, uint32_t capacity,
                                       SelectShared& shared) {
  if (threadIdx.x == 0 && shared.count > 0) shared.offset = atomicAdd(list_size, shared.count);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i) {
    if (numbers[i] != ~0u && shared.offset + numbers[i] < capacity)
      list[shared.offset + numbers[i]] = candidates[i];
  }
}

// The count-th largest of the warps' largest candidates, for count <= kSelectWarps. The block has
// at least `count` candidates from there on, and seldom many more.
__device__ __forceinline__ Candidate
guess_threshold(const Candidate (&candidates)[kTokensPerThread], int count, SelectShared& shared) {
  Candidate largest = 0;
#pragma unroll
  for (int i = 0; i < kTokensPerThread; ++i)
    largest = candidates[i] > largest ? candidates[i] : largest;
  largest = warp_max(largest);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared.largest[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  const Candidate own = shared.largest[threadIdx.x % kSelectWarps];
  int above = 0;
#pragma unroll
  for (int warp = 0; warp < kSelectWarps; ++warp) above += shared.largest[warp] > own;
  // Less than `count` above: among those the smallest is the one. Warps without candidates are 0.
  return warp_min(above < count ? own : ~Candidate(0));
}

// Appends the `count` largest of a block's candidates, or all if there are fewer, and maybe some
// more; with kTies in any case those whose key is that of the last.
template <bool kTies>
__device__ __forceinline__ void append_largest(const Candidate (&candidates)[kTokensPerThread],
                                               int count, Candidate* list, uint32_t* list_size,
                                               uint32_t capacity, SelectShared& shared) {
  constexpr Candidate kMask = kTies ? ~Candidate(0xffffffffu) : ~Candidate(0);
  uint32_t numbers[kTokensPerThread];
  // A guess, and where that lets too many in, a search: one copy of the code behind either.
#pragma unroll 1
  for (bool exact = count > kSelectWarps;; exact = true) {
    Candidate lowest;
    if (exact) {
      lowest = find_threshold(
          [&](auto f) {
#pragma unroll
            for (int i = 0; i < kTokensPerThread; ++i) f(candidates[i], 1);
          },
          count, kListSlack, shared);
    } else {
      lowest = guess_threshold(candidates, count, shared);
    }
    number_candidates(candidates, lowest & kMask, numbers, shared);
    if (exact || shared.count <= static_cast<uint32_t>(count + kListSlack)) break;
  }
  append(candidates, numbers, list, list_size, capacity, shared);
}

// Whether this block is the last of its row's gridDim.x to come here; it then sees what the others
// wrote before, and has put the counter back.
__device__ __forceinline__ bool is_last_block_of_row(uint32_t* arrivals, SelectShared& shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.is_last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
    if (shared.is_last) *arrivals = 0;
  }
  __syncthreads();
  if (shared.is_last) __threadfence();
  return shared.is_last;
}

}  // namespace eet_patch::cuda
