// Element types, activations, norm placement and mask forms shared by both backends and the
// bindings.
#pragma once

#include <cstdint>

namespace eet_patch {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

enum class Activation : int { kNone = 0, kGeluErf = 1, kGeluTanh = 2, kRelu = 3, kSilu = 4 };

// Where the layer norm of a block stands: kPre normalises the block's input and adds the raw input
// back, kPost normalises the sum of the input and the block's output.
enum class NormPlacement : int { kNone = 0, kPre = 1, kPost = 2 };

// Form of an attention mask. Additive masks are added to the scaled scores; an entry that is -inf
// or the lowest finite value of its type excludes its key altogether. A query whose keys are all
// excluded yields zeros.
enum class MaskKind : int {
  kNone = 0,
  kBoolKeep = 1,    // bool, true = attend
  kBoolDrop = 2,    // bool, true = do not attend
  kAddFloat32 = 3,  // float32, added
  kAddElement = 4,  // element type of the operands, added
  kIntKeep = 5,     // int64, 1 = attend, 0 = do not; read by pack_tokens alone
};

// Sizes and strides are counted in elements, never in bytes.
struct AttentionMask {
  const void* data = nullptr;
  MaskKind kind = MaskKind::kNone;
  int64_t batch_stride = 0, head_stride = 0, query_stride = 0,
          key_stride = 0;  // 0 where the mask is broadcast
};

struct HeadStrides {  // of a (batch, head, token, head_dim) view whose last dimension is contiguous
  int64_t batch = 0, head = 0, token = 0;
};

}  // namespace eet_patch
