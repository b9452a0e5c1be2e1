// The bookkeeping of beam search after each step, where transformers' `_beam_search` (4.56 to 5.23)
// has some sixty calls of torch. One launch, a block for each batch row; which candidates win is
// found by counting, for each of them, how many come before it, as there are few.
//
// A batch row needs to know of the others only whether the search is over. It reads that from what
// all of them left in the step before, so blocks don't wait for each other.
#include "cuda/token_scores.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kBeamThreads = 512;
static_assert(kBeamThreads >= kMaxBeams + kMaxCandidates, "a thread for each sequence");
constexpr float kNever = -1.0e9f;  // the score of what can't be chosen, as transformers has it

struct BeamShared {
  uint32_t keys[kMaxBeams * kMaxCandidates];  // of all candidates
  int best[kMaxCandidates];                   // the kept candidates in order
  uint32_t running_keys[kMaxCandidates];      // of each kept one as one that goes on,
  uint32_t
      ended_keys[kMaxBeams + kMaxCandidates];  // and behind those ended before, as an ended one
  float running_scores[kMaxCandidates], ended_scores[kMaxBeams + kMaxCandidates];
  int parents[kMaxCandidates], tokens[kMaxCandidates];
  int next[kMaxBeams];        // the kept one that each running beam is now
  int ended_from[kMaxBeams];  // the place among ended_keys that each ended one comes from
  float new_scores[kMaxBeams];
  bool ends[kMaxCandidates], has_ended[kMaxBeams];
  int outlook;
};

// How many of `count` keys, largest first, come before `own` of another beam.
__device__ __forceinline__ int count_before(const uint32_t* keys, int count, uint32_t own,
                                            bool wins_ties) {
  int low = 0, high = count;
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

// The place of keys[place] among `count`, in no order: larger ones first, of equal ones the first.
__device__ __forceinline__ int rank_of(const uint32_t* keys, int count, int place) {
  const uint32_t own = keys[place];
  int rank = 0;
  for (int i = 0; i < count; ++i) rank += keys[i] > own || (keys[i] == own && i < place);
  return rank;
}

// What torch makes of a division by a number from the host: on CUDA a product with its reciprocal.
__device__ __forceinline__ float over(float score, float penalty) {
  return __fmul_rn(score, __fdiv_rn(1.0f, penalty));
}

// Whether a running beam of `possible` score, the best there is, may still beat an ended sequence.
__device__ __forceinline__ bool may_win(const BeamShared& shared, int beams, float possible) {
  float worst = shared.new_scores[0];
  for (int beam = 1; beam < beams; ++beam) {
    const float score = shared.new_scores[beam];
    worst = worst != worst || worst < score ? worst : score;  // a NaN stays, as in torch.amin
  }
  bool wins = false;
  for (int beam = 0; beam < beams; ++beam)
    wins |= possible > (shared.has_ended[beam] ? worst : kNever);
  return wins;
}

// One block per batch row, gridDim.x of them. Every thread owns whole columns of what is moved from
// beam to beam, so it reads all of a column before it writes, and no two buffers are needed. Moves
// at most 2 * num_beams * (2 * generated + seen_words) words.
__global__ void __launch_bounds__(kBeamThreads) beam_step_kernel(const BeamStepArgs args) {
  __shared__ BeamShared shared;
  const int thread = static_cast<int>(threadIdx.x);
  const int beams = static_cast<int>(args.num_beams), kept = static_cast<int>(args.kept);
  const int per_beam = static_cast<int>(args.per_beam);
  const int candidates = static_cast<int>(args.num_sources) * per_beam;
  const int64_t batch_row = blockIdx.x, first_row = batch_row * beams;

  // The same in all rows of the batch row; written at the end, behind barriers.
  const int generated = args.generated[first_row], limit = *args.limit;
  const int first_column = args.lengths[first_row] - generated;
  for (int i = thread; i < candidates; i += kBeamThreads)
    shared.keys[i] = order_key(args.scores[batch_row * candidates + i]);
  if (thread < kept) shared.best[thread] = 0;
  if (thread == 0) shared.outlook = 0;
  __syncthreads();
  if (generated >= limit) return;
  if (generated > 0) {
    int outlook = 0;
    for (int64_t i = thread; i < args.batch; i += kBeamThreads)
      outlook |= args.outlook[(generated - 1) * args.batch + i];
    if (outlook != 0) atomicOr(&shared.outlook, outlook);
    __syncthreads();
    if (shared.outlook != kBeamsGoOn) return;
  }
  const bool is_last = generated + 1 == limit;

  // The best candidates of all beams. Those of one beam are in order.
  for (int i = thread; i < candidates; i += kBeamThreads) {
    const int beam = i / per_beam;
    int rank = i % per_beam;
    for (int other = 0; other * per_beam < candidates && rank < kept; ++other) {
      if (other == beam) continue;
      rank += count_before(shared.keys + other * per_beam, per_beam, shared.keys[i], other < beam);
    }
    if (rank < kept) shared.best[rank] = i;
  }
  bool had_ended = true;
  if (thread < beams) had_ended = args.has_ended[first_row + thread] != 0;
  const bool was_full = __syncthreads_and(had_ended);

  // Each of them as one that goes on, and as one that ends.
  bool hit = true;
  if (thread < kept) {
    const int64_t candidate = batch_row * candidates + shared.best[thread];
    const float score = args.scores[candidate];
    const int token = args.candidate_tokens[candidate];
    const int parent = shared.best[thread] / per_beam;
    hit = is_last;
    for (int i = 0; i < args.num_eos; ++i) hit |= args.eos_token_ids[i] == token;
    const float running = hit ? __fadd_rn(score, kNever) : score;
    // Only the num_beams best may end; the others are there to go on.
    const bool ends = hit && thread < beams;
    float ended = over(score, args.length_penalties[generated]);
    if (args.stop_when_full && was_full) ended = __fadd_rn(ended, kNever);
    if (args.improvable[batch_row] == 0) ended = __fadd_rn(ended, kNever);
    if (!ends) ended = __fadd_rn(ended, kNever);
    shared.running_scores[thread] = running;
    shared.running_keys[thread] = order_key(running);
    shared.ended_scores[beams + thread] = ended;
    shared.ended_keys[beams + thread] = order_key(ended);
    shared.ends[thread] = ends;
    shared.parents[thread] = parent;
    shared.tokens[thread] = token;
    args.top_scores[batch_row * kept + thread] = score;
    args.top_parents[batch_row * kept + thread] = parent;
  }
  if (thread < beams) {
    const float score = args.ended_scores[first_row + thread];
    shared.ended_scores[thread] = score;
    shared.ended_keys[thread] = order_key(score);
  }
  const bool all_hit = __syncthreads_and(hit);

  if (thread < kept) {
    const int rank = rank_of(shared.running_keys, kept, thread);
    if (rank < beams) shared.next[rank] = thread;
  }
  if (thread < beams + kept) {
    const int rank = rank_of(shared.ended_keys, beams + kept, thread);
    if (rank < beams) shared.ended_from[rank] = thread;
  }
  __syncthreads();

  // The ended sequences but for their indices. All are read before one is written.
  bool has_ended = true, moves = false;
  int ended_token = 0, ended_length = 0;
  if (thread < beams) {
    const int from = shared.ended_from[thread];
    moves = from != thread;
    if (from < beams) {
      has_ended = args.has_ended[first_row + from] != 0;
      ended_token = args.ended_tokens[first_row + from];
      ended_length = args.ended_lengths[first_row + from];
    } else {
      has_ended = shared.ends[from - beams];
      ended_token = shared.tokens[from - beams];
      ended_length = generated + 1;
    }
    shared.new_scores[thread] = shared.ended_scores[from];
    shared.has_ended[thread] = has_ended;
  }
  const bool is_full = __syncthreads_and(has_ended);
  const bool ended_moves = __syncthreads_or(moves);
  if (thread < beams) {
    const int64_t row = first_row + thread;
    args.ended_scores[row] = shared.new_scores[thread];
    args.ended_tokens[row] = ended_token;
    args.ended_lengths[row] = ended_length;
    args.has_ended[row] = has_ended;
    args.generated[row] = generated + 1;
    if (!is_last) {
      const int from = shared.next[thread], token = shared.tokens[from];
      args.running_scores[row] = shared.running_scores[from];
      args.tokens[row * args.tokens_stride + generated] = token;
      args.input_ids[row] = token;
      args.position_ids[row] += 1;
      args.lengths[row] += 1;
    }
  }
  if (thread == 0) {
    const float penalty = args.length_penalties[args.max_steps + generated];
    const bool improvable =
        args.improvable[batch_row] != 0 &&
        may_win(shared, beams, over(shared.running_scores[shared.next[0]], penalty));
    args.improvable[batch_row] = improvable;
    args.outlook[generated * args.batch + batch_row] = (improvable ? kImprovable : 0) |
                                                       (all_hit ? 0 : kContinuable) |
                                                       (args.stop_when_full && is_full ? 0 : kOpen);
  }

  // Where each step of a sequence went on from. What has ended is copied out of the running beams'
  // columns before those are put in their new order.
  for (int step = thread; step <= generated; step += kBeamThreads) {
    int32_t* const running = args.key_rows + first_row * args.capacity + first_column + step;
    int32_t* const ended = args.ended_indices + first_row * args.max_steps + step;
    int32_t rows[kMaxBeams];
    const auto row_of = [&](int kept_one) {
      const int parent = shared.parents[kept_one];
      return step == generated ? static_cast<int32_t>(first_row) + parent
                               : running[parent * args.capacity];
    };
    if (ended_moves) {
#pragma unroll
      for (int beam = 0; beam < kMaxBeams; ++beam) {
        if (beam >= beams) continue;
        const int from = shared.ended_from[beam];
        rows[beam] = from < beams ? ended[from * args.max_steps] : row_of(from - beams);
      }
#pragma unroll
      for (int beam = 0; beam < kMaxBeams; ++beam) {
        if (beam < beams) ended[beam * args.max_steps] = rows[beam];
      }
    }
    if (is_last) continue;
#pragma unroll
    for (int beam = 0; beam < kMaxBeams; ++beam) {
      if (beam < beams) rows[beam] = row_of(shared.next[beam]);
    }
#pragma unroll
    for (int beam = 0; beam < kMaxBeams; ++beam) {
      if (beam < beams) running[beam * args.capacity] = rows[beam];
    }
  }
  if (args.seen == nullptr || is_last) return;
  const int64_t num_words = args.seen_words;
  for (int64_t word = thread; word < num_words; word += kBeamThreads) {
    uint32_t* const column = args.seen + first_row * num_words + word;
    uint32_t bits[kMaxBeams];
#pragma unroll
    for (int beam = 0; beam < kMaxBeams; ++beam) {
      if (beam >= beams) continue;
      const int from = shared.next[beam], token = shared.tokens[from];
      bits[beam] = column[shared.parents[from] * num_words];
      if (token / 32 == word) bits[beam] |= 1u << (token % 32);
    }
#pragma unroll
    for (int beam = 0; beam < kMaxBeams; ++beam) {
      if (beam < beams) column[beam * num_words] = bits[beam];
    }
  }
}

}  // namespace

Status beam_step(const BeamStepArgs& args, const Context& context) {
  if (args.batch == 0) return Status();
  if (args.num_beams < 1 || args.num_beams > kMaxBeams || args.num_sources < 1 ||
      args.num_sources > args.num_beams || args.per_beam < 1 || args.per_beam > kMaxCandidates ||
      args.kept < args.num_beams || args.kept > kMaxCandidates ||
      args.kept > args.num_sources * args.per_beam) {
    return Status{Status::kUnsupported};
  }
  LaunchConfig config;
  config.stream = stream_of(context);
  config.block = dim3(kBeamThreads);
  config.grid = dim3(static_cast<unsigned>(args.batch));
  return to_status(launch(config, beam_step_kernel, args));
}

}  // namespace eet_patch::cuda
