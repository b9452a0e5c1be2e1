// The end of every linear product: bias, activation and residual on a tile of fp32 sums, stored as
// T.
#pragma once

#include "cpu/math.h"
#include "cpu/team_ops.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

// Panels of kTileColumns or ranges of columns never cross from one of the side-by-side weights to
// the next.
template <typename T>
struct LinearView {
  T* out;
  const T* residual;  // or null
  int64_t out_stride;
  const T* bias[3];
  int64_t out_features;

  explicit LinearView(const LinearArgs& args)
      : out(static_cast<T*>(args.out)),
        residual(static_cast<const T*>(args.residual)),
        out_stride(args.out_stride),
        out_features(args.out_features) {
    for (int i = 0; i < 3; ++i)
      bias[i] = i < args.num_weights ? static_cast<const T*>(args.bias[i]) : nullptr;
  }
};

// Rows [row, row + rows) and columns [column, column + width) of weight `index`; the tile has `ld`
// floats a row and may be read up to the next whole vector.
template <typename T, Activation kActivation>
void finish_tile(const LinearView<T>& view, const float* tile, int64_t ld, int64_t row,
                 int64_t rows, int index, int64_t column, int64_t width) {
  const T* bias = view.bias[index] == nullptr ? nullptr : view.bias[index] + column;
  const int64_t offset = row * view.out_stride + index * view.out_features + column;
  T* out = view.out + offset;
  const T* residual = view.residual == nullptr ? nullptr : view.residual + offset;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; j += kLanes) {
      const int64_t n = width - j;
      Vec x = load(tile + j);
      if (bias != nullptr) x = x + load_upto(bias + j, n);
      x = activate<kActivation>(x);
      if (residual != nullptr) x = x + load_upto(residual + j, n);
      store_upto(out + j, x, n);
    }
    tile += ld;
    out += view.out_stride;
    if (residual != nullptr) residual += view.out_stride;
  }
}

template <typename T>
using FinishTile = void (*)(const LinearView<T>&, const float*, int64_t, int64_t, int64_t, int,
                            int64_t, int64_t);

template <typename T>
inline FinishTile<T> finish_tile_for(Activation activation) {
  FinishTile<T> finish = nullptr;
  for_activation(activation, [&](auto tag) { finish = finish_tile<T, decltype(tag)::kValue>; });
  return finish;
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
