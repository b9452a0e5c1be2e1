// What fairseq's SequenceGenerator (0.12) does with the best continuations of every hypothesis,
// some fifty calls of torch there and two waits for the device. One launch, a block for each
// sentence; which continuations win is found by counting, for each of them, how many come before
// it.
#include "cuda/token_scores.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kHypothesisThreads = 256;
static_assert(kHypothesisThreads >= kMaxCandidates, "a thread for each continuation");

struct HypothesisShared {
  uint32_t keys[kMaxBeams * kMaxCandidates];  // of all continuations
  int candidate_tokens[kMaxBeams * kMaxCandidates];
  int best[kMaxCandidates];  // the kept ones in order
  float scores[kMaxCandidates];
  int tokens[kMaxCandidates], parents[kMaxCandidates];
  bool ends[kMaxCandidates], blocked[kMaxCandidates];
  int next[kMaxBeams];   // the kept one that each row is now
  int filed[kMaxBeams];  // where a kept one that ends is filed, or -1
  int slots[kMaxBeams];
};

// How many of `count` keys, largest first, come before `own` of another beam.
__device__ __forceinline__ int keys_before(const uint32_t* keys, int count, uint32_t own,
                                           bool wins_ties) {
  int low = 0, high = count;
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high) / 2;
    if (wins_ties ? keys[middle] >= own : keys[middle] > own) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One block per sentence, of at most kBeams hypotheses: few of them make short code, which counts
// where a launch's instructions have to be fetched anew in every step. Every thread owns whole
// columns of key_rows, so it reads all of a column before it writes, and no two buffers are needed.
// Moves at most 3 * num_beams * lengths words.
template <int kBeams>
__global__ void __launch_bounds__(kHypothesisThreads)
    hypothesis_step_kernel(const HypothesisStepArgs args) {
  __shared__ HypothesisShared shared;
  release_dependents();
  const int thread = static_cast<int>(threadIdx.x);
  const int beams = static_cast<int>(args.num_beams), kept = static_cast<int>(args.kept);
  const int64_t first_row = blockIdx.x * args.num_beams, capacity = args.capacity;

  // What the step before left is read ahead of the continuations: the launches ahead, those of
  // top_candidates, let this one start behind a wait of their own, when that step has ended. All
  // read before anything is written, which is behind barriers.
  const int64_t place = args.places[blockIdx.x];
  const int step = args.lengths[first_row];
  int slot = 0, was_ignored = 0;
  int64_t position_id = 0;
  if (thread < beams) {
    slot = args.slots[first_row + thread];
    was_ignored = args.ignored[first_row + thread];
    position_id = args.position_ids[first_row + thread];
  }
  const int is_done = args.is_done[place], before = args.ended[place];
  wait_for_predecessor();
  if (is_done != 0) return;
#pragma unroll 1
  for (int i = thread; i < beams * kept; i += kHypothesisThreads) {
    const float score = args.scores[first_row * kept + i];
    shared.candidate_tokens[i] = args.candidate_tokens[first_row * kept + i];
    shared.keys[i] = order_key(score == score ? score : -INFINITY);
  }
  if (thread < kept) shared.best[thread] = 0;
  if (thread < beams) shared.slots[thread] = slot;
  __syncthreads();

  // The best continuations of all rows. Those of one row are in order.
#pragma unroll 1
  for (int i = thread; i < beams * kept; i += kHypothesisThreads) {
    const int beam = i / kept;
    int rank = i % kept;
#pragma unroll 1
    for (int other = 0; other < beams && rank < kept; ++other) {
      if (other == beam) continue;
      rank += keys_before(shared.keys + other * kept, kept, shared.keys[i], other < beam);
    }
    if (rank < kept) shared.best[rank] = i;
  }
  __syncthreads();
  if (thread < kept) {
    const int best = shared.best[thread];
    const float score = score_of(shared.keys[best]);
    const int token = shared.candidate_tokens[best];
    const bool ignored = was_ignored != 0;
    const bool ends = token == args.eos && score > -INFINITY && !ignored;
    shared.scores[thread] = score;
    shared.tokens[thread] = token;
    shared.parents[thread] = best / kept;
    shared.ends[thread] = ends;
    shared.blocked[thread] = ends || ignored;
  }
  __syncthreads();

  // Those that go on, in their order, and behind them the others in theirs.
  if (thread < kept) {
    int free_before = 0, all_free = 0, ends_before = 0;
#pragma unroll 1
    for (int i = 0; i < kept; ++i) {
      all_free += !shared.blocked[i];
      if (i < thread) {
        free_before += !shared.blocked[i];
        ends_before += shared.ends[i];
      }
    }
    const int rank = shared.blocked[thread] ? all_free + thread - free_before : free_before;
    if (rank < beams) shared.next[rank] = thread;
    if (thread < beams) {  // only the best of all may end
      const int to = before + ends_before;
      const bool filed = shared.ends[thread] && to < beams;
      shared.filed[thread] = filed ? to : -1;
      if (filed) {
        args.ended_scores[place * beams + to] = shared.scores[thread];
        args.ended_lengths[place * beams + to] = step + 1;
      }
    }
  }
  __syncthreads();
  if (thread == 0) {
    int ending = 0;
#pragma unroll 1
    for (int i = 0; i < beams; ++i) ending += shared.ends[i];
    const int after = min(beams, before + ending);
    args.ended[place] = after;
    if (ending > 0 && after == beams) args.is_done[place] = 1;
  }
  if (thread < beams) {
    const int64_t row = first_row + thread;
    const int from = shared.next[thread], token = shared.tokens[from];
    const int64_t at = shared.slots[thread] * capacity + step + 1;
    args.running_scores[row] = shared.scores[from];
    args.ignored[row] = shared.blocked[from];
    args.input_ids[row] = token;
    args.position_ids[row] = position_id + 1;
    args.lengths[row] = step + 1;
    args.tokens[at] = token;
    args.history_scores[at] = shared.scores[from];
  }

  // Where each position of a hypothesis stands. What ends is copied out before the rows are put in
  // their new order. A row alone has its past where it was.
  const int first_position = beams == 1 && shared.filed[0] < 0 ? step : 0;
#pragma unroll 1
  for (int position = first_position + thread; position <= step; position += kHypothesisThreads) {
    int32_t* const running = args.key_rows + first_row * capacity + position;
    int32_t* const ended = args.ended_rows + place * beams * capacity + position;
    int32_t rows[kBeams];
    const auto slot_of = [&](int kept_one) {
      const int parent = shared.parents[kept_one];
      return position == step ? shared.slots[parent] : running[parent * capacity];
    };
#pragma unroll
    for (int beam = 0; beam < kBeams; ++beam) {
      if (beam >= beams) continue;
      if (shared.filed[beam] >= 0) ended[shared.filed[beam] * capacity] = slot_of(beam);
      rows[beam] = slot_of(shared.next[beam]);
    }
#pragma unroll
    for (int beam = 0; beam < kBeams; ++beam) {
      if (beam < beams) running[beam * capacity] = rows[beam];
    }
  }
}

}  // namespace

Status hypothesis_step(const HypothesisStepArgs& args, const Context& context) {
  if (args.sentences == 0) return Status();
  if (args.num_beams < 1 || args.num_beams > kMaxBeams || args.kept < args.num_beams ||
      args.kept > kMaxCandidates) {
    return Status{Status::kUnsupported};
  }
  LaunchConfig config;
  config.stream = stream_of(context);
  config.block = dim3(kHypothesisThreads);
  config.grid = dim3(static_cast<unsigned>(args.sentences));
  config.chained = args.chained;
  if (args.num_beams == 1) return to_status(launch(config, hypothesis_step_kernel<1>, args));
  if (args.num_beams <= 8) return to_status(launch(config, hypothesis_step_kernel<8>, args));
  return to_status(launch(config, hypothesis_step_kernel<kMaxBeams>, args));
}

}  // namespace eet_patch::cuda
