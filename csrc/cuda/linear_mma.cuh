// Skinny product on tensor cores for fp16 and bf16: the weights are the m = 16 operand of
// mma.m16n8k16 and the rows of the batch its n = 8, so that few rows waste nothing. Weights stream
// through a ring of chunks in shared memory, which fills before the kernel ahead has ended
// (programmatic dependent launch): the memory stays busy while the short chain of dependent steps
// after it runs. K is split over the blocks of a cluster where the tiles alone would not fill the
// chip; partial sums are pushed to the block that finishes the row and added in a fixed order.
#pragma once

#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "cuda/linear_params.cuh"

namespace eet_patch::cuda {

constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = kLinearWarps * kWarpSize;

// kRows (8, 16, 32 or 64) bounds the rows of the batch.
template <int kRows>
struct LinearTile {
  static constexpr int kChunkK = 64;  // a chunk is kNormTile columns of kChunkK k: 8 KB
  static constexpr int kChunkBytes = kNormTile * kChunkK * 2;
  static constexpr int kStages = 5;
  static constexpr int kRowGroups = kRows / 8;      // products of n = 8
  static constexpr int kPad = 8;                    // elements; keeps fragments off shared banks
  static constexpr int kSumStride = kNormTile + 4;  // likewise
  static constexpr int kBlocks = kRows <= 8 ? 4 : kRows <= 16 ? 3 : 2;  // of a multiprocessor

  // Partial sums that one block receives: of its rows, from both halves of every rank's warps.
  __host__ __device__ static constexpr int sum_bytes(int rows, int ranks) {
    return (rows + ranks - 1) / ranks * 2 * ranks * kSumStride * 4;
  }
};

// As copy_async_16, and the rest of the line goes to L2 at once.
__device__ __forceinline__ void copy_weights_async(void* target, const void* source, bool valid) {
#if __CUDA_ARCH__ >= 800
  const int bytes = valid ? 16 : 0;
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(target)),
      "l"(source), "r"(bytes)
      : "memory");
#else
  copy_async_16(target, source, valid);
#endif
}

__device__ __forceinline__ void prefetch_line(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Mean and 1 / sqrt(variance + eps) of every input row, a warp a row, from what the producer left
// of each tile of it (Chan et al. 1983, Algorithms for computing the sample variance).
template <typename T>
__device__ __forceinline__ void merged_statistics(const LinearParams<T>& p, float* means,
                                                  float* scales) {
  constexpr int kHeld = 4;
  const int lane = threadIdx.x % kWarpSize;
  const int tiles = (p.in_features + kNormTile - 1) / kNormTile;
  for (int row = threadIdx.x / kWarpSize; row < p.rows; row += kLinearWarps) {
    const float2* partials = p.norm_partials + int64_t(row) * tiles;
    float count = 0.0f, mean = 0.0f, squares = 0.0f;
    for (int first = 0; first < tiles; first += kHeld * kWarpSize) {
      float2 held[kHeld];
      float counts[kHeld];
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int tile = first + i * kWarpSize + lane;
        held[i] = tile < tiles ? __ldcg(partials + tile) : make_float2(0.0f, 0.0f);
        counts[i] = tile < tiles ? float(min(kNormTile, p.in_features - tile * kNormTile)) : 0.0f;
        sum += counts[i] * held[i].x;
      }
      const float part =
          float(min(p.in_features, (first + kHeld * kWarpSize) * kNormTile) - first * kNormTile);
      const float part_mean = warp_sum(sum) / part;
      sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const float delta = held[i].x - part_mean;
        sum += held[i].y + counts[i] * delta * delta;
      }
      sum = warp_sum(sum);
      const float delta = part_mean - mean, all = count + part;
      squares += sum + delta * delta * count * part / all;
      mean += delta * part / all;
      count = all;
    }
    if (lane == 0) {
      means[row] = mean;
      scales[row] = rsqrtf(squares / p.in_features + p.norm_eps);
    }
  }
}

// A block (or cluster) owns tiles of kNormTile output columns and walks them, a cluster one alone;
// each rank of a cluster owns k_per_rank consecutive k. A warp multiplies 16 of the columns with
// half of every chunk. Dynamic shared memory: the block's part of the input, normalised, `panel_k`
// columns at a time (all of them where they fit, else staged again on the way), partial sums, and
// the ring, which may be shorter where a block has fewer chunks than kStages. Limits: rows <=
// kRows, in_features (and out_features when kInOut) multiples of 8, 16-byte aligned operands. Moves
// every weight once.
template <typename T, int kRows, bool kInOut>
__global__ void __launch_bounds__(kLinearThreads, LinearTile<kRows>::kBlocks)
    linear_mma_kernel(const LinearParams<T> p, int panel_k, int k_per_rank) {
  using Tile = LinearTile<kRows>;
  constexpr int kVector = kVectorSize<T>;
  constexpr int kSlots = Tile::kRowGroups;  // rows that a warp finishes at most
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float means[kRows], scales[kRows];
  const int panel_stride = panel_k + Tile::kPad;
  const int rank = cluster_rank(), ranks = cluster_size();
  T* panel = reinterpret_cast<T*>(shared);
  float* sums = reinterpret_cast<float*>(panel + p.rows * panel_stride);
  unsigned char* ring = reinterpret_cast<unsigned char*>(sums) + Tile::sum_bytes(p.rows, ranks);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int matrix = lane / 8, line = lane % 8;             // of ldmatrix
  const int column_group = warp % 4 * 16, half = warp / 4;  // of this warp
  const int tiles_per_weight = (p.out_features + kNormTile - 1) / kNormTile;
  const int tiles = tiles_per_weight * p.num_weights;
  const int tile_step = gridDim.x / ranks;
  const int k_begin = rank * k_per_rank, k_end = min(p.in_features, k_begin + k_per_rank);
  const int chunks = (k_end - k_begin + Tile::kChunkK - 1) / Tile::kChunkK;
  auto weight_of = [&](int tile) {
    return (tile >= tiles_per_weight) + (tile >= 2 * tiles_per_weight);
  };

  // Rows of a chunk are lines of its k (in, out) or of its columns (out, in), 128 bytes each; the
  // 16-byte units of a line are permuted so that ldmatrix meets every bank once.
  int load_tile = blockIdx.x / ranks, load_chunk = 0;
  auto load = [&](int stage) {
    if (load_tile < tiles) {
      const int which = weight_of(load_tile);
      const int column = (load_tile - which * tiles_per_weight) * kNormTile;
      const int unit = threadIdx.x % 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = threadIdx.x / 8 + 32 * i;
        const int k = k_begin + load_chunk * Tile::kChunkK + (kInOut ? row : unit * kVector);
        const int n = column + (kInOut ? unit * kVector : row);
        const bool valid = k < k_end && n < p.out_features;
        const int64_t at =
            kInOut ? int64_t(k) * p.out_features + n : int64_t(n) * p.in_features + k;
        copy_weights_async(
            ring + stage * Tile::kChunkBytes + row * 128 + ((unit ^ (row & 7)) * kVectorBytes),
            p.weight(which) + (valid ? at : 0), valid);
      }
      if (++load_chunk == chunks) load_chunk = 0, load_tile += tile_step;
    }
    copy_async_commit();
  };

  // The panel's part of the input, normalised; zeros behind k_end, where the weights read as zero.
  auto stage_panel = [&](int first_k, bool with_statistics) {
    constexpr int kHeld = 2;
    const int units = panel_k / kVector, all = p.rows * units;
    const bool norm = p.norm_weight != nullptr;
    for (int base = 0; base < all; base += kHeld * kLinearThreads) {
      uint4 held[kHeld], weights[kHeld], biases[kHeld];
      int rows[kHeld], columns[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int e = base + i * kLinearThreads + threadIdx.x;
        rows[i] = e / units, columns[i] = (e - rows[i] * units) * kVector;
        const int k = first_k + columns[i];
        const bool valid = e < all && k < k_end;
        held[i] = weights[i] = biases[i] = make_uint4(0, 0, 0, 0);
        if (valid) {
          held[i] = __ldcg(
              reinterpret_cast<const uint4*>(p.input + int64_t(rows[i]) * p.input_stride + k));
          if (norm) weights[i] = *reinterpret_cast<const uint4*>(p.norm_weight + k);
          if (p.norm_bias != nullptr) biases[i] = *reinterpret_cast<const uint4*>(p.norm_bias + k);
        }
      }
      if (norm && with_statistics && base == 0) {
        if (p.norm_partials != nullptr) {
          merged_statistics(p, means, scales);
        } else {
          row_statistics<T, kVector>(p, means, scales);
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (base + i * kLinearThreads + static_cast<int>(threadIdx.x) >= all) break;
        if (norm) {
          float values[kVector], weight[kVector], bias[kVector];
          unpack_vector<T>(held[i], values);
          unpack_vector<T>(weights[i], weight);
          unpack_vector<T>(biases[i], bias);
          const float mean = means[rows[i]], scale = scales[rows[i]];
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            values[j] = (values[j] - mean) * scale * weight[j] + bias[j];
          held[i] = make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                               pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7]));
        }
        *reinterpret_cast<uint4*>(panel + rows[i] * panel_stride + columns[i]) = held[i];
      }
    }
  };

  float c[Tile::kRowGroups][4] = {};
  auto multiply = [&](int stage, int panel_column) {
    const unsigned char* chunk = ring + stage * Tile::kChunkBytes;
    uint32_t a[2][4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int k = half * 32 + step * 16;
      if constexpr (kInOut) {
        const int row = k + matrix / 2 * 8 + line, unit = column_group / kVector + matrix % 2;
        ldmatrix_x4_trans(a[step], chunk + row * 128 + (unit ^ line) * kVectorBytes);
      } else {
        const int row = column_group + matrix % 2 * 8 + line, unit = k / kVector + matrix / 2;
        ldmatrix_x4(a[step], chunk + row * 128 + (unit ^ line) * kVectorBytes);
      }
    }
#pragma unroll
    for (int group = 0; group < Tile::kRowGroups; ++group) {
      // Rows that the batch does not have repeat its last one; the rows of a product do not mix.
      const int row = min(group * 8 + line, p.rows - 1);
      uint32_t b[4];
      ldmatrix_x4(b, panel + row * panel_stride + panel_column + half * 32 + matrix * 8);
      mma_m16n8k16<T>(c[group], a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1]);
      mma_m16n8k16<T>(c[group], a[1][0], a[1][1], a[1][2], a[1][3], b[2], b[3]);
    }
  };

  // Row r of the batch is finished by rank r % ranks, there by a warp, two columns a lane; bias and
  // residual of it are asked for when the tile begins.
  float2 bias_terms;
  float2 residual_terms[kSlots];
  const bool pairs = p.pairs;
  auto load_pair = [&](const T* source, int n) {
    if (pairs)
      return n < p.out_features ? unpack2<T>(__ldcg(reinterpret_cast<const uint32_t*>(source + n)))
                                : make_float2(0.0f, 0.0f);
    return make_float2(n < p.out_features ? to_float(source[n]) : 0.0f,
                       n + 1 < p.out_features ? to_float(source[n + 1]) : 0.0f);
  };
  auto load_bias = [&](int tile) {
    const int which = weight_of(tile);
    const T* bias = p.bias(which);
    bias_terms = make_float2(0.0f, 0.0f);
    if (tile < tiles && bias != nullptr)
      bias_terms = load_pair(bias, (tile - which * tiles_per_weight) * kNormTile + 2 * lane);
  };
  auto load_residual = [&](int tile) {
    if (p.residual == nullptr || tile >= tiles) return;
    const int which = weight_of(tile);
    const int n = (tile - which * tiles_per_weight) * kNormTile + 2 * lane;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int row = (slot * kLinearWarps + warp) * ranks + rank;
      if (row >= p.rows) break;
      residual_terms[slot] =
          load_pair(p.residual + row * p.out_stride + int64_t(which) * p.out_features, n);
    }
  };

  auto finish_tile = [&](int tile) {
    const int g = lane / 4, q = lane % 4;
#pragma unroll
    for (int group = 0; group < Tile::kRowGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = group * 8 + 2 * q + i % 2, column = column_group + g + i / 2 * 8;
        if (row < p.rows) {
          const int slot = row / ranks, owner = row - slot * ranks;
          float* target = sums + (slot * 2 * ranks + rank * 2 + half) * Tile::kSumStride + column;
          if (ranks == 1) {
            *target = c[group][i];
          } else {
            store_to_rank(target, owner, c[group][i]);
          }
        }
        c[group][i] = 0.0f;
      }
    }
    if (ranks == 1) {
      __syncthreads();
    } else {
      cluster_arrive();
      cluster_wait();
    }
    const int which = weight_of(tile);
    const int column = (tile - which * tiles_per_weight) * kNormTile, n = column + 2 * lane;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int local = slot * kLinearWarps + warp, row = local * ranks + rank;
      if (row >= p.rows) break;
      const float* source = sums + local * 2 * ranks * Tile::kSumStride + 2 * lane;
      float2 sum = make_float2(0.0f, 0.0f);
      for (int i = 0; i < 2 * ranks; ++i) {
        const float2 part = *reinterpret_cast<const float2*>(source + i * Tile::kSumStride);
        sum.x += part.x;
        sum.y += part.y;
      }
      sum.x = activate(sum.x + bias_terms.x, p.activation);
      sum.y = activate(sum.y + bias_terms.y, p.activation);
      if (p.residual != nullptr) {
        sum.x += residual_terms[slot].x;
        sum.y += residual_terms[slot].y;
      }
      T* target = p.out + row * p.out_stride + int64_t(which) * p.out_features + n;
      const uint32_t packed = pack2<T>(sum.x, sum.y);
      if (pairs) {
        if (n < p.out_features) *reinterpret_cast<uint32_t*>(target) = packed;
      } else {
        if (n < p.out_features) target[0] = from_float<T>(sum.x);
        if (n + 1 < p.out_features) target[1] = from_float<T>(sum.y);
      }
      if (p.out_partials != nullptr) {
        const float2 stored = unpack2<T>(packed);
        const bool first = n < p.out_features, second = n + 1 < p.out_features;
        const float mean = warp_sum((first ? stored.x : 0.0f) + (second ? stored.y : 0.0f)) /
                           min(kNormTile, p.out_features - column);
        const float x = first ? stored.x - mean : 0.0f, y = second ? stored.y - mean : 0.0f;
        const float squares = warp_sum(x * x + y * y);
        if (lane == 0) p.out_partials[int64_t(row) * tiles + tile] = make_float2(mean, squares);
      }
    }
  };

#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) load(stage);
  int tile = blockIdx.x / ranks;
  load_bias(tile);
  if (p.norm_weight != nullptr) {
    constexpr int kLine = 128 / int(sizeof(T));
    const int k = k_begin + threadIdx.x * kLine;  // 256 lines: the first 16384 k
    if (k < k_end) {
      prefetch_line(p.norm_weight + k);
      if (p.norm_bias != nullptr) prefetch_line(p.norm_bias + k);
    }
  }
  if (ranks > 1) cluster_arrive();  // every block of the cluster has started before sums are pushed
  if (!p.release_late) release_dependents();
  wait_for_predecessor();
  if (p.release_late) release_dependents();
  load_residual(tile);
  stage_panel(k_begin, true);
  if (ranks > 1) cluster_wait();

  const int panel_chunks = panel_k / Tile::kChunkK;
  int stage = 0;
  for (bool staged = true; tile < tiles; tile += tile_step) {
    int left = panel_chunks;  // of the panel
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > panel_chunks && (chunk == 0 || left == 0) && !staged) {
        __syncthreads();  // nobody reads the panel any more
        stage_panel(k_begin + chunk * Tile::kChunkK, false);
        left = panel_chunks;
      }
      staged = false;
      copy_async_wait<Tile::kStages - 2>();
      __syncthreads();
      load(stage == 0 ? Tile::kStages - 1 : stage - 1);
      multiply(stage, (panel_chunks - left) * Tile::kChunkK);
      --left;
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    finish_tile(tile);
    load_bias(tile + tile_step);
    load_residual(tile + tile_step);
  }
}

}  // namespace eet_patch::cuda
