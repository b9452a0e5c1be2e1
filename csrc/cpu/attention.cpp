// Scaled dot-product attention: chooses between single queries and blocks of them, and shares the
// work out by its cost.
#include "cpu/attention_decode.h"
#include "cpu/attention_prefill.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

// Fewer queries than this don't repay packing the keys and values.
constexpr int64_t kDecodeQueries = 4;
constexpr int64_t kMinQueryBlock = 32;

int64_t query_block_size(const AttentionArgs& args, int team_size) {
  if (args.q_len < kDecodeQueries) return 1;
  int64_t size = min64(args.q_len, kMaxQueryBlock);
  while (size >= 2 * kMinQueryBlock &&
         args.batch * args.num_heads * ceil_div(args.q_len, size) < 4 * int64_t(team_size)) {
    size = ceil_div(size, 2);
  }
  return size;
}

// Calls body(batch, head, first query, queries, cost) for every item, always in the same order.
template <typename T, typename Body>
void for_items(const AttentionArgs& args, int64_t block, const Body& body) {
  for (int64_t batch = 0; batch < args.batch; ++batch) {
    const HeadView<T> view(args, batch, 0);
    for (int64_t head = 0; head < args.num_heads; ++head) {
      for (int64_t first = 0; first < view.q_len; first += block) {
        const int64_t queries = min64(block, view.q_len - first);
        const int64_t middle = max64(view.key_limit(first + queries / 2) - view.key_begin, 0);
        body(batch, head, first, queries, queries * (middle + 8));
      }
    }
  }
}

// An item belongs to the thread in whose share of the total cost its middle falls: static, and even
// also where lengths differ or the causal triangle makes late queries dearer.
template <typename T>
void attention_share(const Team& team, const AttentionArgs& args) {
  const int64_t block = query_block_size(args, team.size);
  int64_t total = 0;
  if (team.size > 1) {
    for_items<T>(args, block,
                 [&](int64_t, int64_t, int64_t, int64_t, int64_t cost) { total += cost; });
  }
  int64_t before = 0;
  for_items<T>(
      args, block, [&](int64_t batch, int64_t head, int64_t first, int64_t queries, int64_t cost) {
        const int64_t owner = team.size > 1 ? (2 * before + cost) * team.size / (2 * total) : 0;
        before += cost;
        if (owner != team.rank) return;
        const HeadView<T> view(args, batch, head);
        if (block == 1) {
          decode_query(args, view, first);
        } else {
          attend_query_block(args, view, first, queries);
        }
      });
}

}  // namespace

void attention_team(const Team& team, const AttentionArgs& args) {
  for_dtype(args.dtype, [&](auto element) { attention_share<decltype(element)>(team, args); });
}

Status attention(const AttentionArgs& args, const Context& context) {
  Status status;
  if (args.head_dim > kMaxHeadDim) {
    status.code = Status::kUnsupported;
    return status;
  }
  parallel(threads_for(attention_work(args) / 4, context),
           [&](const Team& team) { attention_team(team, args); });
  return status;
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
