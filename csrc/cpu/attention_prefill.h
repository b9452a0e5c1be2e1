// Attention of a block of queries: both products through the register tile of microkernel.h, online
// softmax in between.
//
// One thread owns a block of queries of one head. Blocks of keys are packed once for all its
// queries (keys transposed, values straight, both fp32); a tile of kTileRows queries then forms its
// scores, softmax weights and weighted values in L1. As FlashAttention (Dao et al. 2022,
// arXiv:2205.14135), so no (q_len, kv_len) matrix exists.
#pragma once

#include "cpu/attention_softmax.h"
#include "cpu/microkernel.h"
#include "cpu/pack.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

constexpr int64_t kKeyBlock = 128;
constexpr int64_t kMaxQueryBlock = 256;

// Scratch of one thread: about 200 KB for head_dim 64, 900 KB for 256.
struct QueryBlockScratch {
  float *query, *out, *key, *value, *scores, *weights, *terms;
  RunningSoftmax* running;
  int64_t depth, out_ld, panel_floats_value;

  QueryBlockScratch(int64_t head_dim, int64_t queries) {
    depth = round_up(head_dim, kLanes);
    out_ld = depth;
    panel_floats_value = kKeyBlock * kTileColumns;
    const int64_t rows = queries + kTileRows;
    const int64_t sizes[8] = {
        rows * depth,          rows * out_ld,
        kKeyBlock * depth,     ceil_div(head_dim, kTileColumns) * panel_floats_value,
        kTileRows * kKeyBlock, kTileRows * kKeyBlock,
        kTileRows * kKeyBlock, round_up(rows * 2, kLanes)};
    int64_t total = 0;
    for (const int64_t size : sizes) total += size;
    float* next = static_cast<float*>(
        thread_scratch(ScratchSlot::kAttention, total * int64_t(sizeof(float))));
    float** const parts[7] = {&query, &out, &key, &value, &scores, &weights, &terms};
    for (int i = 0; i < 7; ++i) {
      *parts[i] = next;
      next += sizes[i];
    }
    running = reinterpret_cast<RunningSoftmax*>(next);
  }
};

template <typename T>
void pack_keys_values(const AttentionArgs& args, const HeadView<T>& view,
                      const QueryBlockScratch& scratch, int64_t key, int64_t count) {
  const T* keys = view.key + key * args.key_strides.token;
  for (int64_t j = 0; j < count; j += kTileColumns) {
    pack_transposed(scratch.key + j * scratch.depth, kTileColumns,
                    keys + j * args.key_strides.token, args.key_strides.token,
                    min64(kTileColumns, count - j), args.head_dim);
  }
  const T* values = view.value + key * args.value_strides.token;
  for (int64_t d = 0; d < args.head_dim; d += kTileColumns) {
    pack_straight(scratch.value + d / kTileColumns * scratch.panel_floats_value, kTileColumns,
                  values + d, args.value_strides.token, min64(kTileColumns, args.head_dim - d),
                  count, round_up(count, kLanes));
  }
}

// Queries [first, first + count), count <= kMaxQueryBlock.
template <typename T>
void attend_query_block(const AttentionArgs& args, const HeadView<T>& view, int64_t first,
                        int64_t count) {
  const int64_t head_dim = args.head_dim;
  const QueryBlockScratch scratch(head_dim, count);
  const int64_t tile_rows = ceil_div(count, ceil_div(count, kTileRows));  // evened out
  const int64_t depth_chunks = scratch.depth / kLanes, chunk_stride = tile_rows * kLanes;

  for (int64_t i = 0; i < count; ++i) {
    pack_row(scratch.query + i / tile_rows * tile_rows * scratch.depth + i % tile_rows * kLanes,
             chunk_stride, view.query + (first + i) * args.query_strides.token, head_dim,
             args.softmax_scale);
    for (int64_t d = 0; d < scratch.out_ld; d += kLanes)
      store(scratch.out + i * scratch.out_ld + d, zero());
    scratch.running[i] = RunningSoftmax();
  }

  const bool masked = args.mask.kind != MaskKind::kNone;
  const int64_t end = view.key_limit(first + count - 1);
  for (int64_t key = view.key_begin; key < end; key += kKeyBlock) {
    const int64_t keys = min64(kKeyBlock, end - key);
    pack_keys_values(args, view, scratch, key, keys);
    if (masked && args.mask.query_stride == 0) {  // the same for all queries
      mask_terms<T>(scratch.terms, args.mask, view.batch, view.head, 0, key, keys);
    }
    for (int64_t tile = 0; tile < count; tile += tile_rows) {
      const int64_t rows = min64(tile_rows, count - tile);
      const int64_t visible = min64(keys, view.key_limit(first + tile + rows - 1) - key);
      if (visible <= 0) continue;
      const float* query = scratch.query + tile * scratch.depth;
      for (int64_t j = 0; j < visible; j += kTileColumns) {
        micro_kernel_for(rows, visible - j)(query, chunk_stride, scratch.key + j * scratch.depth,
                                            kTileColumns, depth_chunks, scratch.scores + j,
                                            kKeyBlock, false);
      }
      const int64_t padded = round_up(visible, kLanes);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t q = first + tile + i;
        const float* terms = masked ? scratch.terms : nullptr;
        if (masked && args.mask.query_stride != 0) {
          mask_terms<T>(scratch.terms, args.mask, view.batch, view.head, q, key, visible);
        }
        const int64_t limit = max64(min64(visible, view.key_limit(q) - key), 0);
        const float factor =
            softmax_step(scratch.scores + i * kKeyBlock, terms, limit, padded,
                         scratch.weights + i * kLanes, rows * kLanes, scratch.running + tile + i);
        if (factor != 1.0f) {
          float* out = scratch.out + (tile + i) * scratch.out_ld;
          for (int64_t d = 0; d < scratch.out_ld; d += kLanes)
            store(out + d, load(out + d) * set1(factor));
        }
      }
      for (int64_t d = 0; d < head_dim; d += kTileColumns) {
        micro_kernel_for(rows, head_dim - d)(
            scratch.weights, rows * kLanes,
            scratch.value + d / kTileColumns * scratch.panel_floats_value, kTileColumns,
            padded / kLanes, scratch.out + tile * scratch.out_ld + d, scratch.out_ld, true);
      }
    }
  }

  for (int64_t i = 0; i < count; ++i) {
    const float sum = scratch.running[i].sum;
    const Vec scale = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
    T* row = view.out + (first + i) * args.out_strides.token;
    const float* out = scratch.out + i * scratch.out_ld;
    for (int64_t d = 0; d < head_dim; d += kLanes)
      store_upto(row + d, load(out + d) * scale, head_dim - d);
  }
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
