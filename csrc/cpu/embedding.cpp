// Sum of word, position and token type rows, with an optional layer norm. One thread a row.
//
// Indices are checked before any row is read; a bad one leaves its row unwritten and turns the
// status.
#include <cstring>

#include "cpu/norm.h"
#include "cpu/team.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {
namespace {

bool inside(int64_t index, int64_t count) { return index >= 0 && index < count; }

// Returns whether an index was outside its table. The sum is kept in fp32 for the norm.
template <typename T>
bool embedding_rows(const Team& team, const EmbeddingArgs& args) {
  const int64_t size = args.hidden_size;
  const T* norm_weight = static_cast<const T*>(args.norm_weight);
  float* sum = nullptr;
  if (norm_weight != nullptr) {
    sum = static_cast<float*>(
        thread_scratch(ScratchSlot::kPackedWeight, size * int64_t(sizeof(float))));
  }
  const Vec scale = set1(args.word_scale);
  bool bad = false;
  const Range rows = team.share(args.rows);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    T* out = static_cast<T*>(args.out) + r * size;
    const int64_t token = args.tokens != nullptr ? int64_t(args.tokens[r]) : r;
    if (token < 0) {
      std::memset(out, 0, size_t(size) * sizeof(T));
      continue;
    }
    const int64_t word_index = args.input_ids[token];
    bool row_bad = !inside(word_index, args.vocab_size);
    int64_t position_index = 0, type_index = 0;
    if (args.position_weight != nullptr) {
      position_index = args.position_ids[token % args.position_count];
      row_bad |= !inside(position_index, args.num_positions);
    }
    if (args.token_type_weight != nullptr) {
      if (args.token_type_ids != nullptr)
        type_index = args.token_type_ids[token % args.token_type_count];
      row_bad |= !inside(type_index, args.num_token_types);
    }
    if (row_bad) {
      bad = true;
      continue;
    }
    const T* word = static_cast<const T*>(args.word_weight) + word_index * size;
    const T* position = args.position_weight == nullptr
                            ? nullptr
                            : static_cast<const T*>(args.position_weight) + position_index * size;
    const T* token_type = args.token_type_weight == nullptr
                              ? nullptr
                              : static_cast<const T*>(args.token_type_weight) + type_index * size;
    for (int64_t j = 0; j < size; j += kLanes) {
      const int64_t n = size - j;
      Vec x = load_upto(word + j, n) * scale;
      if (token_type != nullptr) x = x + load_upto(token_type + j, n);
      if (position != nullptr) x = x + load_upto(position + j, n);
      if (sum != nullptr) {
        store_upto(sum + j, x, n);
      } else {
        store_upto(out + j, x, n);
      }
    }
    if (sum != nullptr) {
      layernorm_row(out, sum, norm_weight, static_cast<const T*>(args.norm_bias), size, args.eps);
    }
  }
  return bad;
}

}  // namespace

Status embedding(const EmbeddingArgs& args, const Context& context) {
  int bad = 0;
  parallel(threads_for(2 * args.rows * args.hidden_size, context), [&](const Team& team) {
    for_dtype(args.dtype, [&](auto element) {
      if (embedding_rows<decltype(element)>(team, args))
        __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
    });
  });
  Status status;
  if (bad != 0) status.code = Status::kBadIndex;
  return status;
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
