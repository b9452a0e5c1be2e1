// Chooses the instruction-set build at first use and forwards the ops of eet_patch::cpu to it.
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/arch_ops.h"

namespace eet_patch {
namespace cpu {
namespace {

struct OpTable {
  const char* name;
  Status (*embedding)(const EmbeddingArgs&, const Context&);
  Status (*layernorm)(const LayerNormArgs&, const Context&);
  Status (*bias_residual_layernorm)(const BiasResidualLayerNormArgs&, const Context&);
  Status (*bias_activation)(const BiasActivationArgs&, const Context&);
  Status (*linear)(const LinearArgs&, const Context&);
  Status (*attention)(const AttentionArgs&, const Context&);
  Status (*attention_block)(const AttentionBlockArgs&, const Context&);
  Status (*ffn)(const FfnArgs&, const Context&);
  Status (*step_attention)(const StepAttentionArgs&, const Context&);
  Status (*decode_layers)(const DecodeLayersArgs&, const Context&);
  Status (*pack_tokens)(const PackTokensArgs&, const Context&);
  Status (*gather_rows)(const GatherRowsArgs&, const Context&);
  int64_t (*attention_block_workspace_bytes)(const AttentionBlockArgs&);
  int64_t (*ffn_workspace_bytes)(const FfnArgs&);
  int64_t (*decode_layers_workspace_bytes)(const DecodeLayersArgs&);
};

#define EET_OP_TABLE(arch)                                                                         \
  OpTable {                                                                                        \
    #arch, arch::embedding, arch::layernorm, arch::bias_residual_layernorm, arch::bias_activation, \
        arch::linear, arch::attention, arch::attention_block, arch::ffn, arch::step_attention,     \
        arch::decode_layers, arch::pack_tokens, arch::gather_rows,                                 \
        arch::attention_block_workspace_bytes, arch::ffn_workspace_bytes,                          \
        arch::decode_layers_workspace_bytes                                                        \
  }

OpTable choose_table() {
#ifdef EET_CPU_X86
  const char* limit = std::getenv("EET_CPU_CAPABILITY");
  const bool only_portable = limit != nullptr && std::strcmp(limit, "portable") == 0;
  const bool only_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !only_portable && !only_avx2) return EET_OP_TABLE(avx512);
  if (has_avx2 && !only_portable) return EET_OP_TABLE(avx2);
#endif
  return EET_OP_TABLE(portable);
}

const OpTable& table() {
  static const OpTable chosen = choose_table();
  return chosen;
}

struct ThreadScratch {
  void* data[int(ScratchSlot::kCount)] = {};
  int64_t bytes[int(ScratchSlot::kCount)] = {};
  ~ThreadScratch() {
    for (void* block : data) std::free(block);
  }
};

}  // namespace

void* thread_scratch(ScratchSlot slot, int64_t bytes) {
  static thread_local ThreadScratch scratch;
  const int index = int(slot);
  if (scratch.bytes[index] < bytes) {
    std::free(scratch.data[index]);
    scratch.bytes[index] = 0;
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    scratch.data[index] = std::aligned_alloc(4096, size_t(rounded));
    if (scratch.data[index] == nullptr) throw std::bad_alloc();
    scratch.bytes[index] = rounded;
  }
  return scratch.data[index];
}

Status embedding(const EmbeddingArgs& args, const Context& context) {
  return table().embedding(args, context);
}
Status layernorm(const LayerNormArgs& args, const Context& context) {
  return table().layernorm(args, context);
}
Status bias_residual_layernorm(const BiasResidualLayerNormArgs& args, const Context& context) {
  return table().bias_residual_layernorm(args, context);
}
Status bias_activation(const BiasActivationArgs& args, const Context& context) {
  return table().bias_activation(args, context);
}
Status linear(const LinearArgs& args, const Context& context) {
  return table().linear(args, context);
}
// Rows are blocked there already.
Status linear_tiles(const LinearTilesArgs& args, const Context& context) {
  return table().linear(args.product, context);
}
Status attention(const AttentionArgs& args, const Context& context) {
  return table().attention(args, context);
}
Status attention_block(const AttentionBlockArgs& args, const Context& context) {
  return table().attention_block(args, context);
}
Status ffn(const FfnArgs& args, const Context& context) { return table().ffn(args, context); }
Status step_attention(const StepAttentionArgs& args, const Context& context) {
  return table().step_attention(args, context);
}
Status decode_layers(const DecodeLayersArgs& args, const Context& context) {
  return table().decode_layers(args, context);
}
Status pack_tokens(const PackTokensArgs& args, const Context& context) {
  return table().pack_tokens(args, context);
}
Status gather_rows(const GatherRowsArgs& args, const Context& context) {
  return table().gather_rows(args, context);
}

int64_t attention_workspace_bytes(const AttentionArgs&) { return 0; }
int64_t attention_block_workspace_bytes(const AttentionBlockArgs& args) {
  return table().attention_block_workspace_bytes(args);
}
int64_t ffn_workspace_bytes(const FfnArgs& args) { return table().ffn_workspace_bytes(args); }
int64_t decode_layers_workspace_bytes(const DecodeLayersArgs& args) {
  return table().decode_layers_workspace_bytes(args);
}

const char* capability() { return table().name; }

}  // namespace cpu
}  // namespace eet_patch
