// Skinny product for fp16 and bf16 on sm_90 and later: the weights are the m = 16 operand of
// mma.m16n8k16 and the rows of the batch its n = 8, so that few rows waste nothing. A warp of its
// own streams the weights through a ring in shared memory by bulk tensor copies. It fills the ring,
// and brings what follows to L2, before the kernel ahead has ended (programmatic dependent launch):
// the memory stays busy while the short chain of dependent steps runs that makes the input. K is
// split over the blocks of a cluster where the tiles alone would not fill the chip; partial sums
// are pushed to the block that finishes the row and added in a fixed order. With few rows a launch
// costs what its instructions after the wait cost: whatever can be worked out before stands before.
#pragma once

#include "common/mma.cuh"
#include "cuda/linear_stream_tile.cuh"

namespace eet_patch::cuda {

// A block (or cluster) owns tiles of kNormTile output columns and walks them, a cluster one alone;
// each rank of a cluster owns k_per_rank consecutive k. Dynamic shared memory: the ring, `panels`
// parts of the block's input, normalised, of kPartK columns each (all of them, or those on their
// way), partial sums, barriers. kPostNorm: the residual is normalised on its way in, and the input
// is not. Limits: rows <= kRows, in_features (and out_features when kInOut) multiples of 8, 16-byte
// aligned operands. Moves every weight once.
template <typename T, int kRows, bool kInOut, bool kPostNorm>
__global__ void __launch_bounds__(kStreamThreads, kRows <= 8    ? 4
                                                  : kRows <= 16 ? 3
                                                                : 2)
    linear_stream_kernel(const LinearParams<T> p, const __grid_constant__ LinearMaps maps,
                         int panels, int k_per_rank, int ring_stages) {
#if __CUDA_ARCH__ >= 900
  using Tile = StreamTile<kRows>;
  constexpr int kVector = kVectorSize<T>;
  constexpr int kSlots = (kRows + kStreamWarps - 1) / kStreamWarps;  // rows a warp may finish
  extern __shared__ __align__(kBoxAlignment) unsigned char shared[];

  const int rank = cluster_rank(), ranks = cluster_size();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int rows = p.rows;
  const bool norm = !kPostNorm && p.norm_weight != nullptr;
  const uint32_t ring_address = shared_address(shared);
  T* panel = reinterpret_cast<T*>(shared + ring_stages * Tile::kChunkBytes);
  unsigned char* after = reinterpret_cast<unsigned char*>(panel) + panels * Tile::panel_bytes(rows);
  float* sums = reinterpret_cast<float*>(after);
  after += Tile::sum_bytes(rows, ranks);
  const uint32_t full = shared_address(after), empty = full + Tile::kMaxStages * 8,
                 arrived = empty + Tile::kMaxStages * 8;
  float* means = reinterpret_cast<float*>(after + (2 * Tile::kMaxStages + 1) * 8);
  float* scales = means + kRows;

  const int k_begin = rank * k_per_rank, k_end = min(p.in_features, k_begin + k_per_rank);
  const int chunks = (k_end - k_begin + Tile::kChunkK - 1) / Tile::kChunkK;
  const int tiles_per_weight = (p.out_features + kNormTile - 1) / kNormTile;
  const int tiles = tiles_per_weight * p.num_weights;
  const int tile_step = gridDim.x / ranks;
  int tile = blockIdx.x / ranks;
  auto weight_of = [&](int t) { return (t >= tiles_per_weight) + (t >= 2 * tiles_per_weight); };

  // The producer: lines of a chunk are rows of its k (in, out) or of its columns (out, in).
  int load_tile = tile, load_chunk = 0, load_count = 0;
  auto with_box = [&](int t, int chunk, auto&& function) {
    const int which = weight_of(t), column = (t - which * tiles_per_weight) * kNormTile;
    const int k = k_begin + chunk * Tile::kChunkK;
    function(maps.weight + which, kInOut ? column : k, kInOut ? k : column);
  };
  auto load = [&](int stage) {
    const uint32_t barrier = full + stage * 8;
    barrier_expect(barrier, Tile::kChunkBytes);
    with_box(load_tile, load_chunk, [&](const CUtensorMap* map, int inner, int outer) {
      copy_box(ring_address + stage * Tile::kChunkBytes, map, inner, outer, barrier);
    });
    ++load_count;
    if (++load_chunk == chunks) load_chunk = 0, load_tile += tile_step;
  };
  const bool is_producer = threadIdx.x == kStreamWorkers;
  if (is_producer) {
#pragma unroll 1
    for (int i = 0; i < ring_stages; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, kStreamWarps);
    }
    const int own_rows = rows > rank ? (rows - rank + ranks - 1) / ranks : 0;
    barrier_init(arrived, 1);
    barrier_init_fence();
#pragma unroll 1
    for (int i = 0; i < ring_stages && load_tile < tiles; ++i) load(i);
    barrier_expect(arrived, own_rows * ranks * kNormTile * 4);
    if (Tile::kPrefetchChunks > 0 && load_tile == tile) {
#pragma unroll 1
      for (int i = load_chunk; i < min(chunks, load_chunk + Tile::kPrefetchChunks); ++i) {
        with_box(tile, i, [](const CUtensorMap* map, int inner, int outer) {
          prefetch_box(map, inner, outer);
        });
      }
    }
  }

  // This thread's 16-byte units of a part stand in one column, every kRowStep-th row. Behind k_end
  // come zeros, for there the weights may be another rank's. The first part comes by registers, the
  // shortest way; those after it are copied ahead and normalised where they lie.
  const int part_row = threadIdx.x / Tile::kPartUnits,
            part_column = threadIdx.x % Tile::kPartUnits * kVector;
  const T* part_source = p.input + part_row * p.input_stride + k_begin + part_column;
  const uint32_t part_target =
      shared_address(panel) + (part_row * Tile::kPartStride + part_column) * int(sizeof(T));
  const uint32_t panel_bytes = Tile::panel_bytes(rows);
  constexpr int kRowStepBytes = Tile::kRowStep * Tile::kPartStride * int(sizeof(T));
  uint4 norm_weight, norm_bias;
  auto load_part_norm = [&](int part) {
    const int k = k_begin + part * Tile::kPartK + part_column;
    const bool inside = norm && k < k_end;
    norm_weight = inside ? load_weights(p.norm_weight + k) : make_uint4(0, 0, 0, 0);
    norm_bias =
        inside && p.norm_bias != nullptr ? load_weights(p.norm_bias + k) : make_uint4(0, 0, 0, 0);
  };
  auto for_units = [&](int part, auto&& function) {
    const int at = part * Tile::kPartK;
    const bool inside = k_begin + at + part_column < k_end;
#pragma unroll
    for (int i = 0; i < Tile::kHeld; ++i) {
      if (part_row + i * Tile::kRowStep >= rows) break;
      function(i, part_source + i * Tile::kRowStep * p.input_stride + at, inside);
    }
  };
  auto copy_part = [&](int part, int slot) {
    const uint32_t target = part_target + slot * panel_bytes;
    for_units(part, [&](int i, const T* source, bool inside) {
      copy_async_16(target + i * kRowStepBytes, inside ? source : p.input, inside);
    });
  };
  auto normalise_unit = [&](uint4& unit, int row) {
    float values[kVector], weight[kVector], bias[kVector];
    unpack_vector<T>(unit, values);
    unpack_vector<T>(norm_weight, weight);
    unpack_vector<T>(norm_bias, bias);
    const float scale = scales[row], shift = -means[row] * scale;
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      values[j] = fmaf(fmaf(values[j], scale, shift), weight[j], bias[j]);
    unit = make_uint4(pack2<T>(values[0], values[1]), pack2<T>(values[2], values[3]),
                      pack2<T>(values[4], values[5]), pack2<T>(values[6], values[7]));
  };
  auto normalise_part = [&](int part, int slot) {  // what this thread copied
    const uint32_t target = part_target + slot * panel_bytes;
    for_units(part, [&](int i, const T*, bool) {
      uint4 unit = load_shared(target + i * kRowStepBytes);
      normalise_unit(unit, part_row + i * Tile::kRowStep);
      store_shared(target + i * kRowStepBytes, unit);
    });
  };

  // Fragments. Rows that the batch does not have repeat its last one; the rows of a product do not
  // mix.
  const int matrix = lane / 8, line = lane % 8;
  const uint32_t weight_offset =
      kInOut ? (matrix / 2 * 8 + line) * 128 + (((warp * 2 + matrix % 2) ^ line) * kVectorBytes)
             : (warp * 16 + matrix % 2 * 8 + line) * 128 + ((matrix / 2 ^ line) * kVectorBytes);
  const uint32_t panel_address = shared_address(panel) + matrix * 8 * int(sizeof(T));
  float c[Tile::kRowGroups][2][4] = {};  // even and odd steps, so that products overlap
  auto multiply = [&](uint32_t chunk, uint32_t inputs) {
    uint32_t a[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if constexpr (kInOut) {
        ldmatrix_x4_trans(a[step], chunk + weight_offset + step * 16 * 128);
      } else {
        ldmatrix_x4(a[step], chunk + (weight_offset ^ (step * 2 * kVectorBytes)));
      }
    }
#pragma unroll
    for (int group = 0; group < Tile::kRowGroups; ++group) {
      const int row = min(group * 8 + line, rows - 1);
      const uint32_t source = inputs + row * Tile::kPartStride * int(sizeof(T));
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, source + step * 16 * int(sizeof(T)));
        mma_m16n8k16<T>(c[group][0], a[step][0], a[step][1], a[step][2], a[step][3], b[0], b[1]);
        mma_m16n8k16<T>(c[group][1], a[step + 1][0], a[step + 1][1], a[step + 1][2], a[step + 1][3],
                        b[2], b[3]);
      }
    }
  };

  // Row r of the batch is finished by rank r % ranks, there by a warp, two columns a lane; bias and
  // residual of it are asked for when the tile begins.
  float2 bias_terms, residual_weight, residual_bias;
  uint32_t residual_terms[kSlots];  // two elements each
  const bool pairs = p.pairs;
  const int own_row = warp * ranks + rank, slot_rows = kStreamWarps * ranks;
  const int own_slots = own_row < rows ? (rows - own_row + slot_rows - 1) / slot_rows : 0;
  const int64_t own_offset = own_row * p.out_stride + 2 * lane,
                slot_stride = slot_rows * p.out_stride;
  auto load_pair = [&](const T* source, int n) -> uint32_t {
    if (n >= p.out_features) return 0;
    if (pairs) return __ldcg(reinterpret_cast<const uint32_t*>(source));
    return pack2<T>(to_float(load_fresh(source)),
                    n + 1 < p.out_features ? to_float(load_fresh(source + 1)) : 0.0f);
  };
  auto column_of = [&](int t, int which) { return (t - which * tiles_per_weight) * kNormTile; };
  auto load_bias = [&](int t) {
    const int which = weight_of(t);
    const int n = column_of(t, which) + 2 * lane;
    auto load_terms = [&](const T* terms) {
      return t < tiles && terms != nullptr ? unpack2<T>(load_pair(terms + n, n))
                                           : make_float2(0.0f, 0.0f);
    };
    bias_terms = load_terms(p.bias(which));
    if constexpr (kPostNorm) {
      residual_weight = load_terms(p.residual_norm_weight);
      residual_bias = load_terms(p.residual_norm_bias);
    }
  };
  auto load_residual = [&](int t) {
    if (p.residual == nullptr || t >= tiles) return;
    const int which = weight_of(t), column = column_of(t, which);
    const T* source = p.residual + own_offset + int64_t(which) * p.out_features + column;
    for_slots<kSlots>(own_slots, [&](int slot) {
      residual_terms[slot] = load_pair(source, column + 2 * lane);
      source += slot_stride;
    });
  };

  const int g = lane / 4, q = lane % 4;
  const uint32_t rank_reciprocal = (65536u + ranks - 1) / ranks;  // exact for rows below 65536 / 8
  const uint32_t sum_target = shared_address(sums) + (rank * Tile::kSumStride + warp * 16 + g) * 4;
  auto finish_tile = [&] {
#pragma unroll
    for (int group = 0; group < Tile::kRowGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = group * 8 + 2 * q + i;
        if (row < rows) {
          const float low = c[group][0][i] + c[group][1][i];
          const float high = c[group][0][i + 2] + c[group][1][i + 2];
          const int slot = row * rank_reciprocal >> 16, owner = row - slot * ranks;
          const uint32_t target = sum_target + slot * ranks * (Tile::kSumStride * 4);
          if (ranks == 1) {
            store_shared(target, low);
            store_shared(target + 8 * 4, high);
          } else {
            const uint32_t remote = address_in_rank(target, owner);
            const uint32_t barrier = address_in_rank(arrived, owner);
            push(remote, low, barrier);
            push(remote + 8 * 4, high, barrier);
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) c[group][j][i] = c[group][j][i + 2] = 0.0f;
      }
    }
    if (ranks == 1) {
      workers_sync();
    } else {
      if (own_slots == 0) return;
      barrier_wait(arrived, 0);
    }
    const int which = weight_of(tile), column = column_of(tile, which), n = column + 2 * lane;
    const bool first = n < p.out_features, second = n + 1 < p.out_features;
    T* target = p.out + own_offset + int64_t(which) * p.out_features + column;
    const float* source = sums + warp * ranks * Tile::kSumStride + 2 * lane;
    for_slots<kSlots>(own_slots, [&](int slot) {
      float2 sum = bias_terms;
#pragma unroll 4
      for (int i = 0; i < ranks; ++i) {
        const float2 part = *reinterpret_cast<const float2*>(source + i * Tile::kSumStride);
        sum.x += part.x;
        sum.y += part.y;
      }
      source += slot_rows * Tile::kSumStride;
      if (p.activation != Activation::kNone) {
        sum.x = activate_fast(sum.x, p.activation);
        sum.y = activate_fast(sum.y, p.activation);
      }
      if (p.residual != nullptr) {
        float2 residual = unpack2<T>(residual_terms[slot]);
        if constexpr (kPostNorm) {
          const int row = own_row + slot * slot_rows;
          const float scale = scales[row], shift = -means[row] * scale;
          residual.x = fmaf(fmaf(residual.x, scale, shift), residual_weight.x, residual_bias.x);
          residual.y = fmaf(fmaf(residual.y, scale, shift), residual_weight.y, residual_bias.y);
        }
        sum.x += residual.x;
        sum.y += residual.y;
      }
      const uint32_t packed = pack2<T>(sum.x, sum.y);
      if (pairs) {
        if (first) *reinterpret_cast<uint32_t*>(target) = packed;
      } else {
        if (first) target[0] = from_float<T>(sum.x);
        if (second) target[1] = from_float<T>(sum.y);
      }
      target += slot_stride;
      if (p.out_partials != nullptr) {
        const float2 stored = unpack2<T>(packed);
        const float mean =
            __fdividef(warp_sum((first ? stored.x : 0.0f) + (second ? stored.y : 0.0f)),
                       float(min(kNormTile, p.out_features - column)));
        const float x = first ? stored.x - mean : 0.0f, y = second ? stored.y - mean : 0.0f;
        const float squares = warp_sum(fmaf(x, x, y * y));
        if (lane == 0)
          p.out_partials[(own_row + slot * slot_rows) * tiles + tile] = make_float2(mean, squares);
      }
    });
    if (ranks == 1) workers_sync();  // the sums may be written anew
  };

  if (warp < kStreamWarps) {
    load_bias(tile);
    load_part_norm(0);
  }
  __syncthreads();  // the barriers are known to all
  if (ranks > 1) {
    cluster_arrive();
    cluster_wait();
  }
  if (!p.release_late) release_dependents();
  if (warp == kStreamWarps) {
    if (p.release_late) {
      wait_for_predecessor();
      release_dependents();
    }
    if (!is_producer) return;
    int stage = 0;
#pragma unroll 1
    for (uint32_t parity = 0; load_tile < tiles; ++stage) {
      if (stage == ring_stages) stage = 0, parity ^= 1;
      barrier_wait(empty + stage * 8, parity);
      load(stage);
    }
    return;
  }
  const int norm_size = kPostNorm ? p.out_features : p.in_features;
  const float2* partials = (kPostNorm ? p.residual_partials : p.norm_partials) +
                           min(static_cast<int>(threadIdx.x) / (kStreamWorkers / kRows), rows - 1) *
                               ((norm_size + kNormTile - 1) / kNormTile);
  wait_for_predecessor();
  if (p.release_late) release_dependents();
  const int parts = (chunks + Tile::kPartChunks - 1) / Tile::kPartChunks;
  {
    uint4 held[Tile::kHeld];
    for_units(0, [&](int i, const T* source, bool inside) {
      held[i] = inside ? load_input(source) : make_uint4(0, 0, 0, 0);
    });
#pragma unroll 1
    for (int part = 1; part < max(panels, Tile::kPanels); ++part) {
      if (part < min(panels, parts)) copy_part(part, part);
      copy_async_commit();
    }
    if (kPostNorm || (norm && p.norm_partials != nullptr)) {
      merged_statistics<kRows>(partials, rows, norm_size, p.norm_eps, means, scales);
    } else if (norm) {
      row_statistics<T, kVector>(p, means, scales, kStreamWarps);
    }
    if (norm) workers_sync();
    for_units(0, [&](int i, const T*, bool) {
      if (norm) normalise_unit(held[i], part_row + i * Tile::kRowStep);
      store_shared(part_target + i * kRowStepBytes, held[i]);
    });
    workers_sync();
  }
  load_residual(tile);

  bool all_there = false;  // parts that all have a place stay there for the next tiles
  int stage = 0, slot = 0;
  uint32_t parity = 0;
#pragma unroll 1
  for (; tile < tiles; tile += tile_step) {
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
      const bool last = part + 1 == parts;
      all_there = all_there || (last && parts == panels);
      const bool more = !all_there && !(last && tile + tile_step >= tiles);
      const int next = last ? 0 : part + 1;
      if (more) load_part_norm(next);
      const uint32_t inputs = panel_address + slot * panel_bytes;
      const int part_chunks = min(Tile::kPartChunks, chunks - part * Tile::kPartChunks);
#pragma unroll 1
      for (int chunk = 0; chunk < part_chunks; ++chunk) {
        barrier_wait(full + stage * 8, parity);
        multiply(ring_address + stage * Tile::kChunkBytes,
                 inputs + chunk * Tile::kChunkK * int(sizeof(T)));
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + stage * 8);
        if (++stage == ring_stages) stage = 0, parity ^= 1;
      }
      if (last) finish_tile();
      const int done = slot;
      if (++slot == panels) slot = 0;
      if (!more) continue;
      copy_async_wait<Tile::kPanels - 2>();
      if (norm) normalise_part(next, slot);
      workers_sync();  // the next part is there, and nobody reads the last one any more
      const int ahead = part + panels;
      if (parts > panels && (ahead < parts || tile + tile_step < tiles))
        copy_part(ahead < parts ? ahead : ahead - parts, done);
      copy_async_commit();
    }
    load_bias(tile + tile_step);
    load_residual(tile + tile_step);
  }
#else
  __trap();  // the launcher takes linear_mma_kernel
#endif
}

}  // namespace eet_patch::cuda
