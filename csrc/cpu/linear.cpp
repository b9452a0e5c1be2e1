// Linear products of any number of rows: few rows straight from the weight (linear_skinny.h), more
// by a blocked product after Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (2008), as BLIS arranges it.
//
// Blocked product: the team packs the input rows together (fp32, layer norm applied on the way),
// then each thread packs panels of its own columns of the weight into L2 and runs the register tile
// over all of its rows.
#include "cpu/linear_skinny.h"
#include "cpu/microkernel.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

constexpr int64_t kPackedInputBytes =
    int64_t(4) << 20;  // of the shared packed input; more rows go in several blocks
constexpr int64_t kPackedWeightBytes = int64_t(512)
                                       << 10;  // of one thread's packed panels: half of a 1 MB L2
// Terms added in one go: longer sums are cut, which bounds the chain of roundings.
constexpr int64_t kDepthChunks = 512 / kLanes;

struct BlockedPlan {
  int64_t depth;        // in_features up to whole chunks
  int64_t block_rows;   // rows packed at a time
  int64_t tile_rows;    // rows of one register tile, evened out over the block
  int64_t panels_each;  // panels of kTileColumns in one weight
  int64_t panels;

  explicit BlockedPlan(const LinearArgs& args) {
    depth = round_up(args.in_features, kLanes);
    const int64_t fitting = max64(kPackedInputBytes / (depth * 4) / kTileRows, 8) * kTileRows;
    const int64_t blocks = ceil_div(args.rows, fitting);
    block_rows = ceil_div(args.rows, blocks);
    tile_rows = ceil_div(block_rows, ceil_div(block_rows, kTileRows));
    panels_each = ceil_div(args.out_features, kTileColumns);
    panels = panels_each * args.num_weights;
  }
  int64_t tiles(int64_t rows) const { return ceil_div(rows, tile_rows); }
};

template <typename T>
void pack_input_rows(const Team& team, const LinearArgs& args, const BlockedPlan& plan,
                     float* packed, int64_t row, int64_t rows) {
  const int64_t chunk_stride = plan.tile_rows * kLanes;
  const Range mine = team.share(rows);
  for (int64_t i = mine.begin; i < mine.end; ++i) {
    const T* source = static_cast<const T*>(args.input) + (row + i) * args.input_stride;
    float* dst =
        packed + i / plan.tile_rows * plan.tile_rows * plan.depth + i % plan.tile_rows * kLanes;
    if (args.norm_weight != nullptr) {
      pack_row_normalised(dst, chunk_stride, source, args.in_features,
                          static_cast<const T*>(args.norm_weight),
                          static_cast<const T*>(args.norm_bias), args.norm_eps);
    } else {
      pack_row(dst, chunk_stride, source, args.in_features, 1.0f);
    }
  }
}

// Whole panels of an (in, out) weight from column `column` on: row by row over all of them, so that
// memory is read in runs of count * kTileColumns elements, a few rows ahead of the loads.
template <typename T>
void pack_whole_panels(const LinearArgs& args, const BlockedPlan& plan, float* packed,
                       const T* weight, int64_t column, int64_t count) {
  constexpr int64_t kRowsAhead = 8;
  const int64_t panel_floats = plan.depth * kTileColumns;
  for (int64_t k = 0; k < args.in_features; ++k) {
    const T* source = weight + k * args.out_features + column;
    float* dst = packed + k * kTileColumns;
    for (int64_t p = 0; p < count; ++p) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        __builtin_prefetch(source + kRowsAhead * args.out_features + v * kLanes);
        store(dst + v * kLanes, load(source + v * kLanes));
      }
      source += kTileColumns;
      dst += panel_floats;
    }
  }
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t i = args.in_features * kTileColumns; i < panel_floats; i += kLanes) {
      store(packed + p * panel_floats + i, zero());
    }
  }
}

// Panels [first, first + count) of all weights, each depth x kTileColumns.
template <typename T>
void pack_panels(const LinearArgs& args, const BlockedPlan& plan, float* packed, int64_t first,
                 int64_t count) {
  const int64_t panel_floats = plan.depth * kTileColumns;
  for (int64_t p = 0; p < count;) {
    const int64_t index = (first + p) / plan.panels_each, panel = (first + p) % plan.panels_each;
    const int64_t column = panel * kTileColumns;
    const int64_t width = min64(kTileColumns, args.out_features - column);
    const T* weight = static_cast<const T*>(args.weight[index]);
    float* dst = packed + p * panel_floats;
    const int64_t whole = min64(args.out_features / kTileColumns - panel, count - p);
    if (args.in_out && whole > 0) {
      pack_whole_panels(args, plan, dst, weight, column, whole);
      p += whole;
      continue;
    }
    if (args.in_out) {
      pack_straight(dst, kTileColumns, weight + column, args.out_features, width, args.in_features,
                    plan.depth);
    } else {
      pack_transposed(dst, kTileColumns, weight + column * args.in_features, args.in_features,
                      width, args.in_features);
    }
    ++p;
  }
}

// How a team divides the tiles x panels of a block: `across` threads side by side, the rest below
// one another. Cost is what the busiest thread computes and packs (packing a column costs about as
// much as kPackCost rows of it).
struct Grid {
  int down, across;
};
Grid choose_grid(int size, int64_t tiles, int64_t panels, int64_t tile_rows) {
  constexpr int64_t kPackCost = 10;
  Grid best{1, size};
  int64_t best_cost = -1;
  for (int down = 1; down <= size; ++down) {
    const int across = size / down;
    const int64_t cost = ceil_div(panels, across) * (ceil_div(tiles, down) * tile_rows + kPackCost);
    if (best_cost < 0 || cost < best_cost) {
      best_cost = cost;
      best = Grid{down, across};
    }
  }
  return best;
}

template <typename T>
void linear_blocked(const Team& team, const LinearArgs& args, float* packed_input) {
  const BlockedPlan plan(args);
  const LinearView<T> view(args);
  const FinishTile<T> finish = finish_tile_for<T>(args.activation);
  const int64_t panel_floats = plan.depth * kTileColumns;
  const int64_t group = min64(max64(kPackedWeightBytes / 4 / panel_floats, 1), plan.panels);
  float* packed_weight = static_cast<float*>(
      thread_scratch(ScratchSlot::kPackedWeight, group * panel_floats * int64_t(sizeof(float))));
  alignas(64) float sums[kTileRows * kTileColumns];

  for (int64_t row = 0; row < args.rows; row += plan.block_rows) {
    const int64_t rows = min64(plan.block_rows, args.rows - row);
    const int64_t tiles = plan.tiles(rows);
    if (row > 0) team.barrier();  // the packed rows of the block before are still being read
    pack_input_rows<T>(team, args, plan, packed_input, row, rows);
    team.barrier();

    const Grid grid = choose_grid(team.size, tiles, plan.panels, plan.tile_rows);
    if (team.rank >= grid.down * grid.across) continue;
    const Range my_tiles = Team{team.rank / grid.across, grid.down, nullptr}.share(tiles);
    const Range my_panels = Team{team.rank % grid.across, grid.across, nullptr}.share(plan.panels);
    for (int64_t first = my_panels.begin; first < my_panels.end; first += group) {
      const int64_t count = min64(group, my_panels.end - first);
      pack_panels<T>(args, plan, packed_weight, first, count);
      for (int64_t tile = my_tiles.begin; tile < my_tiles.end; ++tile) {
        const int64_t tile_row = tile * plan.tile_rows;
        const int64_t tile_rows = min64(plan.tile_rows, rows - tile_row);
        const float* a = packed_input + tile_row * plan.depth;
        for (int64_t p = 0; p < count; ++p) {
          const int64_t column = (first + p) % plan.panels_each * kTileColumns;
          const int64_t width = min64(kTileColumns, args.out_features - column);
          const MicroKernel kernel = micro_kernel_for(tile_rows, width);
          const int64_t chunks = plan.depth / kLanes, chunk_stride = plan.tile_rows * kLanes;
          for (int64_t c = 0; c < chunks; c += kDepthChunks) {
            kernel(a + c * chunk_stride, chunk_stride,
                   packed_weight + p * panel_floats + c * kLanes * kTileColumns, kTileColumns,
                   min64(kDepthChunks, chunks - c), sums, kTileColumns, c > 0);
          }
          finish(view, sums, kTileColumns, row + tile_row, tile_rows,
                 int((first + p) / plan.panels_each), column, width);
        }
      }
    }
  }
}

bool is_skinny(const LinearArgs& args) { return args.rows <= kSkinnyRows; }

}  // namespace

int64_t linear_packed_bytes(const LinearArgs& args) {
  if (is_skinny(args)) return 0;
  const BlockedPlan plan(args);
  return plan.tiles(plan.block_rows) * plan.tile_rows * plan.depth * int64_t(sizeof(float));
}

void linear_team(const Team& team, const LinearArgs& args, float* packed_input) {
  for_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (is_skinny(args)) {
      linear_skinny<T>(team, args);
    } else {
      linear_blocked<T>(team, args, packed_input);
    }
  });
}

Status linear(const LinearArgs& args, const Context& context) {
  if (args.rows == 0 || args.out_features == 0) return Status();
  float* packed =
      static_cast<float*>(thread_scratch(ScratchSlot::kPackedInput, linear_packed_bytes(args)));
  parallel(threads_for(linear_work(args) / 4, context),
           [&](const Team& team) { linear_team(team, args, packed); });
  return Status();
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
