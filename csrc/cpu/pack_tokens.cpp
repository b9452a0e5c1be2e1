// Where the real tokens of a padded batch stand once the padding is taken out. The threads share
// the rows of the batch for reading the mask; placing the tokens is left to one of them.
#include "cpu/attention_mask.h"
#include "cpu/team.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

constexpr int64_t kKeys = 64;  // a stretch of a mask's line, as terms

// What one row's mask says: 0 or -1 in `rows`, the number of real tokens, and whether it says more
// than which tokens are padding.
template <typename T>
struct MaskRow {
  const PackTokensArgs& args;
  int64_t row;
  int32_t* rows;

  MaskRow(const PackTokensArgs& all, int64_t index)
      : args(all), row(index), rows(all.rows + index * all.seq_len) {}

  // Calls visit(key, term) for every entry of one line.
  template <typename Visit>
  void line(int64_t head, int64_t query, const Visit& visit) const {
    if (args.mask.kind == MaskKind::kIntKeep) {
      const int64_t* entries = static_cast<const int64_t*>(args.mask.data) +
                               row * args.mask.batch_stride + head * args.mask.head_stride +
                               query * args.mask.query_stride;
      for (int64_t key = 0; key < args.seq_len; ++key) {
        const int64_t entry = entries[key * args.mask.key_stride];
        visit(key, entry == 1 ? 0.0f : entry == 0 ? -kInfinity : 1.0f);
      }
      return;
    }
    float terms[kKeys];
    for (int64_t first = 0; first < args.seq_len; first += kKeys) {
      const int64_t keys = min64(kKeys, args.seq_len - first);
      mask_terms<T>(terms, args.mask, row, head, query, first, keys);
      for (int64_t key = 0; key < keys; ++key) visit(first + key, terms[key]);
    }
  }

  bool says_more() const {
    bool more = false;
    for (int64_t key = 0; key < args.seq_len; ++key) rows[key] = -1;
    for (int64_t head = 0; head < args.num_heads; ++head) {
      for (int64_t query = 0; query < args.q_len; ++query) {
        line(head, query, [&](int64_t key, float term) {
          if (term == 0.0f) {
            rows[key] = 0;
          } else if (term != -kInfinity) {
            more = true;
          }
        });
      }
    }
    if (more || args.num_heads * args.q_len == 1) return more;
    for (int64_t head = 0; head < args.num_heads; ++head) {
      for (int64_t query = 0; query < args.q_len; ++query) {
        if (args.q_len > 1 && rows[query] != 0) continue;
        line(head, query,
             [&](int64_t key, float term) { more = more || (term == 0.0f) != (rows[key] == 0); });
      }
    }
    return more;
  }
};

}  // namespace

Status pack_tokens(const PackTokensArgs& args, const Context& context) {
  const int64_t work = args.batch * args.num_heads * args.q_len * args.seq_len;
  parallel(threads_for(work, context), [&](const Team& team) {
    const Range share = team.share(args.batch);
    for (int64_t row = share.begin; row < share.end; ++row) {
      int32_t* rows = args.rows + row * args.seq_len;
      bool more = false;
      if (args.mask.kind == MaskKind::kNone) {
        for (int64_t key = 0; key < args.seq_len; ++key) rows[key] = 0;
      } else {
        for_dtype(args.dtype,
                  [&](auto element) { more = MaskRow<decltype(element)>(args, row).says_more(); });
      }
      args.scratch[row] = more;
    }
  });

  int64_t total = 0, longest = 0;
  bool more = false;
  for (int64_t row = 0; row < args.batch; ++row) {
    const int64_t before = total;
    args.cu_seqlens[row] = before;
    args.short_cu_seqlens[row] = int32_t(before);
    for (int64_t place = row * args.seq_len; place < (row + 1) * args.seq_len; ++place) {
      if (args.rows[place] != 0) continue;
      args.tokens[total] = int32_t(place);
      args.rows[place] = int32_t(total++);
    }
    longest = max64(longest, total - before);
    more = more || args.scratch[row] != 0;
  }
  for (int64_t i = args.batch; i <= args.max_batch; ++i) {
    args.cu_seqlens[i] = total;
    args.short_cu_seqlens[i] = int32_t(total);
  }
  for (int64_t i = total; i < args.capacity; ++i) args.tokens[i] = -1;
  args.summary[0] = total;
  args.summary[1] = longest;
  args.summary[2] = more;
  args.summary[3] = args.ticket;
  return Status{};
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
