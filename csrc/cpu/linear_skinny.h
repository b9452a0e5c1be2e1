// Linear products of few rows (decoding): every weight is read once, at memory bandwidth, straight
// from where it lies.
//
// Each thread makes its own fp32 copy of the input rows (normalised where asked, at most
// kSkinnyRows * in_features floats) and owns a range of output columns, so no thread waits for
// another.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/pack.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

constexpr int kSkinnyRows = 8;
constexpr int64_t kColumnGrain =
    32;  // columns are shared out in runs of whole cache lines, also for 16-bit weights
constexpr int64_t kInputFloats = 8192;  // 32 KB of L1 for the input of the (out, in) order
constexpr int64_t kAccumulatorFloats =
    4096;  // 16 KB of L1 for the accumulators of the in_out order

// (out, in) order. R input rows times NW weight rows over `depth` of the in_features, accumulators
// along them. The NW rows that come next are prefetched: they follow in memory, but the hardware
// prefetcher stops at every page, and without the hint 4 rows of input got 20 GB/s on one core
// instead of 28 (Zen 5, fp32).
template <typename T, int R, int NW>
inline void dot_rows(const float* input, int64_t input_ld, const T* weight, int64_t in_features,
                     int64_t depth, float* tile, int64_t tile_ld, bool first) {
  Vec acc[R][NW];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NW; ++j) acc[i][j] = zero();
  }
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vec w[NW];
#pragma GCC unroll 8
    for (int j = 0; j < NW; ++j) {
      w[j] = load(weight + j * in_features + k);
      __builtin_prefetch(weight + (NW + j) * in_features + k);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Vec x = load(input + i * input_ld + k);
#pragma GCC unroll 8
      for (int j = 0; j < NW; ++j) acc[i][j] = fma(x, w[j], acc[i][j]);
    }
  }
  if (k < depth) {
#pragma GCC unroll 8
    for (int j = 0; j < NW; ++j) {
      const Vec w = load_partial(weight + j * in_features + k, depth - k);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) acc[i][j] = fma(load(input + i * input_ld + k), w, acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NW; ++j) {
      const float sum = reduce_add(acc[i][j]);
      tile[i * tile_ld + j] = first ? sum : tile[i * tile_ld + j] + sum;
    }
  }
}

// (in, out) order. Adds KU rows of the weight, each a contiguous run of `columns`, to the R
// accumulator rows in L1, and prefetches the next KU. Four rows at a time for 8 rows of input: 27
// GB/s on one core, with two it was 19 (Zen 5, fp32).
template <typename T, int R, int KU>
inline void add_weight_rows(const float* input, int64_t input_ld, const T* weight,
                            int64_t weight_ld, int64_t columns, float* acc, int64_t acc_ld,
                            bool first) {
  Vec x[R][KU];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int u = 0; u < KU; ++u) x[i][u] = set1(input[i * input_ld + u]);
  }
  const auto step = [&](const Vec(&w)[KU], int64_t j) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      Vec sum = first ? zero() : load(acc + i * acc_ld + j);
#pragma GCC unroll 8
      for (int u = 0; u < KU; ++u) sum = fma(x[i][u], w[u], sum);
      store(acc + i * acc_ld + j, sum);
    }
  };
  int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    Vec w[KU];
#pragma GCC unroll 8
    for (int u = 0; u < KU; ++u) {
      w[u] = load(weight + u * weight_ld + j);
      __builtin_prefetch(weight + (KU + u) * weight_ld + j);
    }
    step(w, j);
  }
  if (j < columns) {
    Vec w[KU];
#pragma GCC unroll 8
    for (int u = 0; u < KU; ++u) w[u] = load_partial(weight + u * weight_ld + j, columns - j);
    step(w, j);
  }
}

// Columns [begin, end) of weight `index`.
template <typename T, int R>
void skinny_columns(const LinearArgs& args, const LinearView<T>& view, FinishTile<T> finish,
                    const float* input, int64_t input_ld, float* acc, int64_t row, int index,
                    int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(args.weight[index]);
  const int64_t depth = args.in_features;
  if (args.in_out) {
    constexpr int kUnroll = R <= 2 ? 8 : 4;
    const int64_t step = kAccumulatorFloats / R / kColumnGrain * kColumnGrain;
    for (int64_t column = begin; column < end; column += step) {
      const int64_t columns = min64(step, end - column);
      const T* rows = weight + column;
      int64_t k = 0;
      for (; k + kUnroll <= depth; k += kUnroll) {
        add_weight_rows<T, R, kUnroll>(input + k, input_ld, rows + k * args.out_features,
                                       args.out_features, columns, acc, step, k == 0);
      }
      for (; k < depth; ++k) {
        add_weight_rows<T, R, 1>(input + k, input_ld, rows + k * args.out_features,
                                 args.out_features, columns, acc, step, k == 0);
      }
      finish(view, acc, step, row, R, index, column, columns);
    }
    return;
  }
#if defined(__AVX512F__)
  constexpr int kStreams = R <= 2 ? 8 : R <= 6 ? 4 : 3;
#else
  constexpr int kStreams = R == 1 ? 6 : R == 2 ? 4 : R <= 4 ? 3 : R <= 6 ? 2 : 1;
#endif
  const int64_t step = kInputFloats / R / kLanes * kLanes;
  for (int64_t column = begin; column < end; column += kColumnGrain) {
    const int64_t columns = min64(kColumnGrain, end - column);
    for (int64_t k = 0; k < depth; k += step) {
      const int64_t length = min64(step, depth - k);
      const T* rows = weight + column * depth + k;
      int64_t j = 0;
      for (; j + kStreams <= columns; j += kStreams) {
        dot_rows<T, R, kStreams>(input + k, input_ld, rows + j * depth, depth, length, acc + j,
                                 kColumnGrain, k == 0);
      }
      for (; j < columns; ++j) {
        dot_rows<T, R, 1>(input + k, input_ld, rows + j * depth, depth, length, acc + j,
                          kColumnGrain, k == 0);
      }
    }
    finish(view, acc, kColumnGrain, row, R, index, column, columns);
  }
}

template <typename T>
using SkinnyColumns = void (*)(const LinearArgs&, const LinearView<T>&, FinishTile<T>, const float*,
                               int64_t, float*, int64_t, int, int64_t, int64_t);

// The thread's share of all columns of all weights, for any number of rows (more than kSkinnyRows:
// in several passes).
template <typename T>
void linear_skinny(const Team& team, const LinearArgs& args) {
  static constexpr SkinnyColumns<T> kColumns[kSkinnyRows] = {
      skinny_columns<T, 1>, skinny_columns<T, 2>, skinny_columns<T, 3>, skinny_columns<T, 4>,
      skinny_columns<T, 5>, skinny_columns<T, 6>, skinny_columns<T, 7>, skinny_columns<T, 8>};
  const int64_t grains_each = ceil_div(args.out_features, kColumnGrain);
  const Range grains = team.share(grains_each * args.num_weights);
  if (grains.begin == grains.end) return;

  const LinearView<T> view(args);
  const FinishTile<T> finish = finish_tile_for<T>(args.activation);
  const int64_t input_ld = round_up(args.in_features, kLanes);
  float* acc = static_cast<float*>(
      thread_scratch(ScratchSlot::kPackedWeight,
                     (kAccumulatorFloats + kSkinnyRows * input_ld) * int64_t(sizeof(float))));
  float* input = acc + kAccumulatorFloats;
  for (int64_t row = 0; row < args.rows; row += kSkinnyRows) {
    const int64_t rows = min64(kSkinnyRows, args.rows - row);
    for (int64_t i = 0; i < rows; ++i) {
      const T* source = static_cast<const T*>(args.input) + (row + i) * args.input_stride;
      if (args.norm_weight != nullptr) {
        pack_row_normalised(input + i * input_ld, kLanes, source, args.in_features,
                            static_cast<const T*>(args.norm_weight),
                            static_cast<const T*>(args.norm_bias), args.norm_eps);
      } else {
        pack_row(input + i * input_ld, kLanes, source, args.in_features, 1.0f);
      }
    }
    for (int index = 0; index < args.num_weights; ++index) {
      const int64_t begin = max64(grains.begin - index * grains_each, 0) * kColumnGrain;
      const int64_t end =
          min64((grains.end - index * grains_each) * kColumnGrain, args.out_features);
      if (begin < end)
        kColumns[rows - 1](args, view, finish, input, input_ld, acc, row, index, begin, end);
    }
  }
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
