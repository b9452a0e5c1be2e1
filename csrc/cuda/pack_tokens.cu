// Where the real tokens of a padded batch stand once the padding is taken out: one kernel counts
// each row's tokens and looks whether the mask is one of padding alone, a second places them. The
// second's blocks add up the counts of all rows themselves, which spares a third. A mask of few
// entries, the same for all heads and queries, is looked at by one block, which does it all.
#include "common/attention_mask.cuh"
#include "common/launch.cuh"
#include "common/reduce.cuh"

namespace eet_patch::cuda {
namespace {

constexpr int kCountThreads = 1024;
constexpr int kPlaceWarps = 8;
constexpr int kPlaceThreads = kPlaceWarps * kWarpSize;

// A block owns a row of the batch. Leaves 0 or -1 in `rows` and the count and verdict of its row in
// `scratch`. Reads a mask that differs from query to query twice, else once.
template <typename T>
__global__ void __launch_bounds__(kCountThreads) count_tokens_kernel(const PackTokensArgs p) {
  release_dependents();
  const int seq_len = static_cast<int>(p.seq_len), row = blockIdx.x;
  int32_t* rows = p.rows + row * p.seq_len;
  const int64_t entries = p.num_heads * p.q_len * p.seq_len;
  const int64_t base = row * p.mask.batch_stride;
  auto term = [&](int64_t entry, int key) {
    const int64_t line = entry / seq_len;
    return mask_term<T>(p.mask, base + line / p.q_len * p.mask.head_stride +
                                    line % p.q_len * p.mask.query_stride + key * p.mask.key_stride);
  };
  for (int key = threadIdx.x; key < seq_len; key += kCountThreads) rows[key] = -1;
  __syncthreads();
  bool more = false;
#pragma unroll 4
  for (int64_t entry = threadIdx.x; entry < entries; entry += kCountThreads) {
    const int key = static_cast<int>(entry % seq_len);
    const float found = term(entry, key);
    if (found == 0.0f) {
      rows[key] = 0;  // whoever writes it, writes the same
    } else if (found != -INFINITY) {
      more = true;  // a bias, or a NaN
    }
  }
  __syncthreads();
  if (entries > seq_len) {
#pragma unroll 4
    for (int64_t entry = threadIdx.x; entry < entries; entry += kCountThreads) {
      const int key = static_cast<int>(entry % seq_len);
      const int query = static_cast<int>(entry / seq_len % p.q_len);
      if (p.q_len > 1 && rows[query] != 0) continue;
      more = more || (term(entry, key) == 0.0f) != (rows[key] == 0);
    }
  }
  int kept = 0;
  for (int first = 0; first < seq_len; first += kCountThreads) {
    const int key = first + threadIdx.x;
    kept += __syncthreads_count(key < seq_len && rows[key] == 0);
  }
  const int any = __syncthreads_or(more);
  if (threadIdx.x == 0) {
    p.scratch[row] = kept;
    p.scratch[p.batch + row] = any;
  }
}

__device__ __forceinline__ void write_summary(const PackTokensArgs& p, int total, int longest,
                                              bool more) {
  p.summary[0] = total;
  p.summary[1] = longest;
  p.summary[2] = more;
  __threadfence_system();
  *static_cast<volatile int64_t*>(p.summary + 3) = p.ticket;
}

__device__ __forceinline__ int block_total(int value, int* shared) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullMask, value, offset);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = 0;
#pragma unroll
  for (int warp = 0; warp < kPlaceWarps; ++warp) value += shared[warp];
  return value;
}

// A block owns a row of the batch and writes the places of its tokens. Reads every row's count.
__global__ void __launch_bounds__(kPlaceThreads) place_tokens_kernel(const PackTokensArgs p) {
  __shared__ int shared[kPlaceWarps];
  const int row = blockIdx.x, batch = static_cast<int>(p.batch);
  const int seq_len = static_cast<int>(p.seq_len);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  release_dependents();
  wait_for_predecessor();
  int before = 0, total = 0, longest = 0;
  bool more = false;
  for (int i = threadIdx.x; i < batch; i += kPlaceThreads) {
    const int count = p.scratch[i];
    total += count;
    if (i < row) before += count;
    longest = max(longest, count);
    more = more || p.scratch[batch + i] != 0;
  }
  total = block_total(total, shared);
  before = block_total(before, shared);
  const int any = __syncthreads_or(more);
  if (row == 0) {  // first of all: the host waits for it
    if (threadIdx.x == 0) shared[0] = 0;
    __syncthreads();
    atomicMax(shared, longest);  // of integers: the order does not matter
    __syncthreads();
    if (threadIdx.x == 0) write_summary(p, total, shared[0], any != 0);
    __syncthreads();
  }

  int32_t* rows = p.rows + row * p.seq_len;
  int next = before, padding = total + static_cast<int>(row * p.seq_len) - before;
  for (int first = 0; first < seq_len; first += kPlaceThreads) {
    const int key = first + threadIdx.x;
    const bool inside = key < seq_len, kept = inside && rows[key] == 0;
    const unsigned mine = __ballot_sync(kFullMask, kept);
    __syncthreads();  // the last chunk's counts have been read
    if (lane == 0) shared[warp] = __popc(mine);
    __syncthreads();
    int ahead = 0, chunk = 0;  // kept in this chunk: before this thread, and in all
#pragma unroll
    for (int other = 0; other < kPlaceWarps; ++other) {
      if (other < warp) ahead += shared[other];
      chunk += shared[other];
    }
    ahead += __popc(mine & ((1u << lane) - 1));
    if (kept) {
      rows[key] = next + ahead;
      p.tokens[next + ahead] = static_cast<int32_t>(row * p.seq_len) + key;
    } else if (inside) {
      p.tokens[padding + static_cast<int>(threadIdx.x) - ahead] = -1;
    }
    next += chunk;
    padding += min(kPlaceThreads, seq_len - first) - chunk;
  }

  if (threadIdx.x == 0) {
    p.cu_seqlens[row] = before;
    p.short_cu_seqlens[row] = before;
  }
  if (row != 0) return;
  for (int64_t i = p.batch + threadIdx.x; i <= p.max_batch; i += kPlaceThreads) {
    p.cu_seqlens[i] = total;
    p.short_cu_seqlens[i] = total;
  }
  for (int64_t i = p.batch * p.seq_len + threadIdx.x; i < p.capacity; i += kPlaceThreads)
    p.tokens[i] = -1;
}

constexpr int kFewThreads = 1024;
constexpr int kFewWarps = kFewThreads / kWarpSize;
constexpr int kFewEntries = 8;  // of a thread, side by side

// One block owns the whole batch, of up to kFewThreads * kFewEntries tokens: those that are kept
// before a thread's are its place in the packing. Reads the mask once.
template <typename T>
__global__ void __launch_bounds__(kFewThreads) pack_few_tokens_kernel(const PackTokensArgs p) {
  __shared__ int shared[kFewWarps];
  __shared__ int longest;
  release_dependents();
  const int seq_len = static_cast<int>(p.seq_len), batch = static_cast<int>(p.batch);
  const int padded = batch * seq_len, entries = (padded + kFewThreads - 1) / kFewThreads;
  const int first = threadIdx.x * entries;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  unsigned kept = 0;  // a bit an entry
  bool more = false;
#pragma unroll
  for (int i = 0; i < kFewEntries; ++i) {
    const bool inside = i < entries && first + i < padded;
    const int place = inside ? first + i : 0;  // all loads under way at once
    const float term = mask_term<T>(
        p.mask, place / seq_len * p.mask.batch_stride + place % seq_len * p.mask.key_stride);
    const float found = inside ? term : -INFINITY;
    if (found == 0.0f) {
      kept |= 1u << i;
    } else if (found != -INFINITY) {
      more = true;  // a bias, or a NaN
    }
  }
  int ahead = __popc(kept);
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kFullMask, ahead, offset);
    if (lane >= offset) ahead += other;
  }
  if (lane == kWarpSize - 1) shared[warp] = ahead;
  if (threadIdx.x == 0) longest = 0;
  const bool any = __syncthreads_or(more);
  ahead -= __popc(kept);
  int total = 0;
#pragma unroll
  for (int other = 0; other < kFewWarps; ++other) {
    if (other < warp) ahead += shared[other];
    total += shared[other];
  }

#pragma unroll
  for (int i = 0; i < kFewEntries; ++i) {
    const int place = first + i;
    if (i >= entries || place >= padded) break;
    if (place % seq_len == 0) {
      p.cu_seqlens[place / seq_len] = ahead;
      p.short_cu_seqlens[place / seq_len] = ahead;
    }
    const bool real = (kept >> i & 1) != 0;
    p.rows[place] = real ? ahead : -1;
    if (real) p.tokens[ahead++] = place;
  }
  for (int64_t i = batch + threadIdx.x; i <= p.max_batch; i += kFewThreads) {
    p.cu_seqlens[i] = total;
    p.short_cu_seqlens[i] = total;
  }
  __syncthreads();  // all starts are there
  for (int row = threadIdx.x; row < batch; row += kFewThreads)
    atomicMax(&longest, static_cast<int>(p.cu_seqlens[row + 1] - p.cu_seqlens[row]));
  __syncthreads();
  if (threadIdx.x == 0) write_summary(p, total, longest, any);
  for (int64_t i = total + threadIdx.x; i < p.capacity; i += kFewThreads) p.tokens[i] = -1;
}

}  // namespace

Status pack_tokens(const PackTokensArgs& args, const Context& context) {
  if (args.batch == 0 || args.seq_len == 0) return Status{Status::kUnsupported};
  LaunchConfig config;
  config.stream = stream_of(context);
  if (args.num_heads == 1 && args.q_len == 1 &&
      args.batch * args.seq_len <= kFewThreads * kFewEntries) {
    config.grid = dim3(1);
    config.block = dim3(kFewThreads);
    return to_status(dispatch_dtype(args.dtype, [&](auto element) {
      return launch(config, pack_few_tokens_kernel<decltype(element)>, args);
    }));
  }
  config.grid = dim3(static_cast<unsigned>(args.batch));
  config.block = dim3(kCountThreads);
  cudaError_t error = dispatch_dtype(args.dtype, [&](auto element) {
    return launch(config, count_tokens_kernel<decltype(element)>, args);
  });
  config.block = dim3(kPlaceThreads);
  config.chained = true;
  if (error == cudaSuccess) error = launch(config, place_tokens_kernel, args);
  return to_status(error);
}

}  // namespace eet_patch::cuda
