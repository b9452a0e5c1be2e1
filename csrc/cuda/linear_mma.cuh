// Skinny product on tensor cores for fp16 and bf16: the weights are the n = 8 operand of
// mma.m16n8k16 and the rows of the batch its m. Weights go from memory straight to registers, one
// unit of work ahead of the products; k is permuted the same way on both sides so that a 16-byte
// load is a fragment. K is split over the warps of a block; partial sums are added in a fixed
// order. For chips before sm_90; linear_stream.cuh serves the others.
#pragma once

#include "common/mma.cuh"
#include "cuda/linear_params.cuh"

namespace eet_patch::cuda {

constexpr int kMmaWarps = 8;
constexpr int kMmaThreads = kMmaWarps * kWarpSize;

// kRows (8, 16, 32 or 64) bounds the rows of the batch. A unit is what a warp loads at once.
template <int kRows, bool kInOut>
struct MmaTile {
  static constexpr int kSlice = kRows < 16 ? kRows : 16;  // rows of one product that are real
  static constexpr int kSlices = kRows / kSlice;
  static constexpr int kProducts = kInOut        ? 8
                                   : kRows <= 16 ? 1
                                                 : kRows / 16;  // n = 8 column groups of a tile
  static constexpr int kColumns = 8 * kProducts;
  static constexpr int kWarpK = kInOut ? 16 : 32;    // k of one warp step
  static constexpr int kStepK = kWarpK * kMmaWarps;  // k of one block step
  static constexpr int kUnitSteps = kInOut ? (kRows <= 16 ? 2 : 1) : 4 / kProducts;
  static constexpr int kLoads = kInOut ? 4 : kProducts;  // 16-byte loads of a lane in a step
  static constexpr int kPad = kInOut ? 16 : 32;  // elements; keeps fragment loads off shared banks
  // Partial sums, kept in the order of the fragments when kInOut (strides that keep both sides off
  // shared banks).
  static constexpr int kRegisters = kSlice / 4;  // accumulators of a product that are real
  static constexpr int kRegisterStride = 34;
  static constexpr int kProductStride = kInOut ? (kSlice == 8 ? 68 : 164) : kSlice * 8;
  static constexpr int kWarpSums = kProductStride * kProducts;
  static constexpr int kSumBuffers = kProducts == 1 ? 2 : 1;
  static constexpr int kSumBytes = kSumBuffers * kMmaWarps * kWarpSums * 4;
};

// A block owns tiles of kColumns output columns and walks them. Dynamic shared memory: the block's
// part of the input, normalised, `panel_k` columns at a time (all of them where they fit, else
// staged again for every tile), then partial sums. Limits: rows <= kRows, in_features (and
// out_features when kInOut) multiples of 8, 16-byte aligned operands. Moves every weight once.
template <typename T, int kRows, bool kInOut>
__global__ void __launch_bounds__(kMmaThreads, kRows <= 16 ? 2 : 1)
    linear_mma_kernel(const LinearParams<T> p, int panel_k) {
#if __CUDA_ARCH__ < 900
  using Tile = MmaTile<kRows, kInOut>;
  constexpr int kUnitK = Tile::kUnitSteps * Tile::kStepK;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float means[kRows], scales[kRows];
  const int panel_stride = panel_k + Tile::kPad;
  T* panel = reinterpret_cast<T*>(shared);
  float* sums = reinterpret_cast<float*>(
      shared + ((int64_t(p.rows) * panel_stride * sizeof(T) + 15) & ~int64_t(15)));
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, g = lane / 4,
            q = lane % 4;
  const int tiles_per_weight = (p.out_features + Tile::kColumns - 1) / Tile::kColumns;
  const int tiles = tiles_per_weight * p.num_weights;
  const int tile_step = gridDim.x;
  const int units = (p.in_features + kUnitK - 1) / kUnitK;
  const int panel_units = panel_k / kUnitK;

  auto load = [&](uint4(&buffer)[Tile::kUnitSteps][Tile::kLoads], int tile, int unit) {
    const int which = tile / tiles_per_weight,
              column = (tile - which * tiles_per_weight) * Tile::kColumns;
    const int k_lane = unit * kUnitK + warp * Tile::kWarpK + (kInOut ? 4 : 8) * q;
    const int n_lane = column + g * (kInOut ? 8 : 1);
    const int k_limit = tile < tiles ? p.in_features : 0;
    const T* source = p.weight(which) + (kInOut ? int64_t(k_lane) * p.out_features + n_lane
                                                : int64_t(n_lane) * p.in_features + k_lane);
#pragma unroll
    for (int s = 0; s < Tile::kUnitSteps; ++s) {
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        // (in, out): 8 columns of rows 4q .. 4q + 3. (out, in): k 8q .. 8q + 7 of column g of
        // product i.
        const int n = kInOut ? n_lane : n_lane + i * 8;
        const T* from = source + (kInOut ? int64_t(s * Tile::kStepK + i) * p.out_features
                                         : int64_t(i) * 8 * p.in_features + s * Tile::kStepK);
        buffer[s][i] = k_lane + s * Tile::kStepK < k_limit && n < p.out_features
                           ? load_weights(from)
                           : make_uint4(0, 0, 0, 0);
      }
    }
  };

  auto stage = [&](int first_unit) {
    constexpr int kVector = kVectorSize<T>;
    const int vectors = panel_k / kVector;
    for (int i = threadIdx.x; i < p.rows * vectors; i += kMmaThreads) {
      const int row = i / vectors, local = (i - row * vectors) * kVector;
      const int k = first_unit * kUnitK + local;
      // Beyond in_features the weights read as zero, so these must be finite: zero too.
      T* target = panel + row * panel_stride + local;
      const T* source = p.input + row * p.input_stride + k;
      if (p.norm_weight == nullptr) {
        copy_async_16(target, k < p.in_features ? source : p.input, k < p.in_features);
        continue;
      }
      uint4 packed = make_uint4(0, 0, 0, 0);
      if (k < p.in_features) {
        float values[kVector];
        load_vector(source, values);
        apply_norm(p, values, k, means[row], scales[row]);
        packed = make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                            pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7]));
      }
      *reinterpret_cast<uint4*>(target) = packed;
    }
    copy_async_commit();
  };

  float c[Tile::kSlices][Tile::kProducts][4] = {};
  auto multiply = [&](const uint4(&buffer)[Tile::kUnitSteps][Tile::kLoads], int local_unit,
                      int k_left) {
#pragma unroll
    for (int s = 0; s < Tile::kUnitSteps; ++s) {
      const int k = (local_unit * Tile::kUnitSteps + s) * Tile::kStepK + warp * Tile::kWarpK;
      if (k >= k_left) break;  // the whole warp is beyond its k
#pragma unroll
      for (int slice = 0; slice < Tile::kSlices; ++slice) {
        // Rows that the batch does not have repeat its last one; a product's rows do not mix.
        const T* low = panel + min(slice * 16 + g, p.rows - 1) * panel_stride + k;
        const T* high = panel + min(slice * 16 + 8 + g, p.rows - 1) * panel_stride + k;
        if constexpr (kInOut) {
          const uint2 a = *reinterpret_cast<const uint2*>(low + 4 * q);
          const uint2 b =
              kRows > 8 ? *reinterpret_cast<const uint2*>(high + 4 * q) : make_uint2(0, 0);
          const uint4* w = buffer[s];
          const uint32_t rows[4][4] = {{w[0].x, w[0].y, w[0].z, w[0].w},
                                       {w[1].x, w[1].y, w[1].z, w[1].w},
                                       {w[2].x, w[2].y, w[2].z, w[2].w},
                                       {w[3].x, w[3].y, w[3].z, w[3].w}};
#pragma unroll
          for (int j = 0; j < 8; ++j) {  // product j holds columns 8 g + j of the tile
            const int select = j % 2 == 0 ? 0x5410 : 0x7632;
            mma_m16n8k16<T>(c[slice][j], a.x, b.x, a.y, b.y,
                            __byte_perm(rows[0][j / 2], rows[1][j / 2], select),
                            __byte_perm(rows[2][j / 2], rows[3][j / 2], select));
          }
        } else {
          const uint4 a = *reinterpret_cast<const uint4*>(low + 8 * q);
          const uint4 b =
              kRows > 8 ? *reinterpret_cast<const uint4*>(high + 8 * q) : make_uint4(0, 0, 0, 0);
#pragma unroll
          for (int i = 0; i < Tile::kProducts; ++i) {
            const uint4 w = buffer[s][i];
            mma_m16n8k16<T>(c[slice][i], a.x, b.x, a.y, b.y, w.x, w.y);
            mma_m16n8k16<T>(c[slice][i], a.z, b.z, a.w, b.w, w.z, w.w);
          }
        }
      }
    }
  };

  // Where a thread finishes one element of a tile, it asks for that element's bias and residual
  // when the tile begins.
  constexpr bool kEarlyTerms = Tile::kSlices * Tile::kSlice * Tile::kColumns <= kMmaThreads;
  float bias_term = 0.0f, residual_term = 0.0f;
  auto load_terms = [&](int tile) {
    bias_term = residual_term = 0.0f;
    if (!kEarlyTerms || tile >= tiles) return;
    const int which = tile / tiles_per_weight, row = threadIdx.x / Tile::kColumns;
    const int n = (tile - which * tiles_per_weight) * Tile::kColumns + threadIdx.x % Tile::kColumns;
    if (row >= p.rows || n >= p.out_features) return;
    const T* bias = p.bias(which);
    if (bias != nullptr) bias_term = to_float(bias[n]);
    if (p.residual != nullptr) {
      residual_term =
          to_float(p.residual[row * p.out_stride + int64_t(which) * p.out_features + n]);
    }
  };

  int parity = 0;
  auto finish_tile = [&](int tile) {
    const int which = tile / tiles_per_weight;
    const int column = (tile - which * tiles_per_weight) * Tile::kColumns;
#pragma unroll
    for (int slice = 0; slice < Tile::kSlices; ++slice) {
      float* buffer = sums + parity * kMmaWarps * Tile::kWarpSums;
      float* mine = buffer + warp * Tile::kWarpSums;
#pragma unroll
      for (int i = 0; i < Tile::kProducts; ++i) {
#pragma unroll
        for (int r = 0; r < Tile::kRegisters; ++r) {
          const int at =
              kInOut ? r * Tile::kRegisterStride + lane : (g + 8 * (r / 2)) * 8 + 2 * q + r % 2;
          mine[i * Tile::kProductStride + at] = c[slice][i][r];
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) c[slice][i][r] = 0.0f;
      }
      __syncthreads();
      for (int e = threadIdx.x; e < Tile::kSlice * Tile::kColumns; e += kMmaThreads) {
        const int slice_row = e / Tile::kColumns, n = e % Tile::kColumns;
        const int row = slice * 16 + slice_row;
        if (row >= p.rows || column + n >= p.out_features) continue;
        int at;
        if constexpr (kInOut) {
          const int r = (n / 8) % 2 + 2 * (slice_row / 8), owner = (slice_row % 8) * 4 + n / 16;
          at = (n % 8) * Tile::kProductStride + r * Tile::kRegisterStride + owner;
        } else {
          at = (n / 8) * Tile::kProductStride + slice_row * 8 + n % 8;
        }
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kMmaWarps; ++w) sum += buffer[w * Tile::kWarpSums + at];
        if (kEarlyTerms) {  // (out, in) tiles, whose blocks stand alone
          const int64_t at_out = row * p.out_stride + int64_t(which) * p.out_features + column + n;
          p.out[at_out] = from_float<T>(activate(sum + bias_term, p.activation) + residual_term);
        } else {
          finish_element(p, row, which, column + n, sum);
        }
      }
      if (Tile::kSumBuffers == 2) {
        parity ^= 1;
      } else {
        __syncthreads();
      }
    }
  };

  uint4 even[Tile::kUnitSteps][Tile::kLoads], odd[Tile::kUnitSteps][Tile::kLoads];
  int tile = blockIdx.x, unit = 0;
  load(even, tile, 0);
  release_dependents();
  wait_for_predecessor();
  if (p.norm_weight != nullptr) {
    row_statistics<T, kVectorSize<T>>(p, means, scales, kMmaWarps);
    __syncthreads();
  }
  stage(0);
  copy_async_wait<0>();
  __syncthreads();

  load_terms(tile);

  bool staged = true;
  auto advance = [&](const uint4(&buffer)[Tile::kUnitSteps][Tile::kLoads],
                     uint4(&next)[Tile::kUnitSteps][Tile::kLoads]) {
    const bool last = unit + 1 == units;
    load(next, last ? tile + tile_step : tile, last ? 0 : unit + 1);
    const int local_unit = unit % panel_units;
    if (units > panel_units && local_unit == 0 && !staged) {
      __syncthreads();
      stage(unit);
      copy_async_wait<0>();
      __syncthreads();
    }
    staged = false;
    multiply(buffer, local_unit, p.in_features - (unit - local_unit) * kUnitK);
    unit = last ? 0 : unit + 1;
    if (last) {
      finish_tile(tile);
      tile += tile_step;
      load_terms(tile);
    }
  };
  while (true) {
    if (tile >= tiles) break;
    advance(even, odd);
    if (tile >= tiles) break;
    advance(odd, even);
  }
#else
  __trap();  // the launcher takes linear_stream_kernel
#endif
}

}  // namespace eet_patch::cuda
