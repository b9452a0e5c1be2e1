// What one instruction-set build of the CPU backend offers: the ops of ops.h inside the namespace
// of that build.
//
// Every <op>.cpp here is compiled once per instruction set with EET_CPU_ARCH naming it (avx512,
// avx2, portable). Whatever those files share must live in that namespace too: an inline function
// outside it would have one definition for the whole program, and the linker might keep the AVX-512
// copy for a machine without AVX-512.
#pragma once

#include "ops.h"

namespace eet_patch {
namespace cpu {

#define EET_DECLARE_ARCH_OPS(arch)                                                               \
  namespace arch {                                                                               \
  Status embedding(const EmbeddingArgs& args, const Context& context);                           \
  Status layernorm(const LayerNormArgs& args, const Context& context);                           \
  Status bias_residual_layernorm(const BiasResidualLayerNormArgs& args, const Context& context); \
  Status bias_activation(const BiasActivationArgs& args, const Context& context);                \
  Status linear(const LinearArgs& args, const Context& context);                                 \
  Status attention(const AttentionArgs& args, const Context& context);                           \
  Status attention_block(const AttentionBlockArgs& args, const Context& context);                \
  Status ffn(const FfnArgs& args, const Context& context);                                       \
  Status step_attention(const StepAttentionArgs& args, const Context& context);                  \
  Status decode_layers(const DecodeLayersArgs& args, const Context& context);                    \
  Status pack_tokens(const PackTokensArgs& args, const Context& context);                        \
  Status gather_rows(const GatherRowsArgs& args, const Context& context);                        \
  int64_t attention_block_workspace_bytes(const AttentionBlockArgs& args);                       \
  int64_t ffn_workspace_bytes(const FfnArgs& args);                                              \
  int64_t decode_layers_workspace_bytes(const DecodeLayersArgs& args);                           \
  }

#if defined(__x86_64__) || defined(_M_X64)
#define EET_CPU_X86 1
EET_DECLARE_ARCH_OPS(avx512)
EET_DECLARE_ARCH_OPS(avx2)
#endif
EET_DECLARE_ARCH_OPS(portable)

// Scratch of the calling thread, 64-byte aligned, grown on demand and freed when the thread ends.
// Slots are independent. Defined once, in dispatch.cpp.
enum class ScratchSlot : int { kPackedInput = 0, kPackedWeight = 1, kAttention = 2, kCount = 3 };
void* thread_scratch(ScratchSlot slot, int64_t bytes);

}  // namespace cpu
}  // namespace eet_patch
