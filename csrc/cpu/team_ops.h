// Ops as a part of a running team: what the composites string together inside one parallel region.
//
// Every thread of the team calls them with the same arguments. None waits at its end: whoever reads
// the result calls team.barrier() first.
#pragma once

#include "cpu/team.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

// `packed_input` is scratch of linear_packed_bytes(args) bytes that all threads of the team share.
void linear_team(const Team& team, const LinearArgs& args, float* packed_input);
int64_t linear_packed_bytes(const LinearArgs& args);
inline int64_t linear_work(const LinearArgs& args) {
  return args.rows * args.in_features * args.out_features * args.num_weights;
}

void attention_team(const Team& team, const AttentionArgs& args);
inline int64_t attention_work(const AttentionArgs& args) {
  return 2 * args.batch * args.num_heads * args.q_len * args.kv_len * args.head_dim;
}

void layernorm_team(const Team& team, const LayerNormArgs& args);

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
