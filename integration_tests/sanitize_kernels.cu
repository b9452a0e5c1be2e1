// Every CUDA kernel of the extension over odd and real sizes, for compute-sanitizer. There is no
// torch in the process, so no caching allocator hides an access out of bounds: each operand is a
// cudaMalloc of exactly its size, and the device is synchronised after each call. Values are not
// looked at here; the pytest tests in ops/ check them. `small` as argument runs the reduced set,
// for racecheck. Linked with csrc/cuda/*.cu (-Icsrc); the exit status is 1 if a call failed.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "ops.h"

namespace eet_patch {
namespace {

constexpr float kEps = 1e-5f;
constexpr float kSoftmaxScale = 0.1f;
enum class MaskCase { kNone, kCausal, kAddElement, kBoolKeepAndPadding };
constexpr int64_t kBatch = 2, kHeads = 2, kBlockHeads = 4;

int calls = 0;
int errors = 0;

int summarize() {
  std::printf("sanitize_kernels: %d calls, %d errors\n", calls, errors);
  return errors != 0;
}

// For the CUDA calls of this program itself: a failure there leaves nothing to go on with.
void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  ++errors;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(summarize());
}

template <typename Args>
void call(const char* name, Status (*op)(const Args&, const Context&), const Args& args) {
  const Status status = op(args, Context());
  const cudaError_t error = cudaDeviceSynchronize();
  ++calls;
  if (status.ok() && error == cudaSuccess) return;
  ++errors;
  std::printf("%s, dtype %d: status %d, then %s\n", name, static_cast<int>(args.dtype), status.code,
              cudaGetErrorString(error));
}

// The device memory of a test, an allocation for each operand.
class Operands {
 public:
  explicit Operands(DType dtype) : element_bytes_(dtype == DType::kFloat32 ? 4 : 2) {}
  Operands(const Operands&) = delete;
  ~Operands() {
    for (void* address : addresses_) require(cudaFree(address), "cudaFree");
  }

  // 16-bit patterns that are positive numbers below 1 in fp16 and bf16; a pair is one in fp32.
  void* elements(int64_t count) {
    std::vector<uint16_t> host(count * element_bytes_ / 2);
    for (uint16_t& bits : host) bits = uint16_t(0x3800 + std::rand() % 0x300);
    return copy(host);
  }
  int64_t* integers(const std::vector<int64_t>& host) { return static_cast<int64_t*>(copy(host)); }
  // Each 0 or 1: a bool mask, or a workspace.
  void* bytes(int64_t count) {
    std::vector<uint8_t> host(count);
    for (uint8_t& byte : host) byte = uint8_t(std::rand() % 2);
    return copy(host);
  }

 private:
  template <typename V>
  void* copy(const std::vector<V>& host) {
    void* address = nullptr;
    if (host.empty()) return address;
    require(cudaMalloc(&address, host.size() * sizeof(V)), "cudaMalloc");
    addresses_.push_back(address);
    require(cudaMemcpy(address, host.data(), host.size() * sizeof(V), cudaMemcpyHostToDevice),
            "cudaMemcpy");
    return address;
  }

  int64_t element_bytes_;
  std::vector<void*> addresses_;
};

// Brace lists follow the order of the fields in csrc/ops.h.
void run_row_ops(DType dtype, int64_t rows, int64_t size) {
  Operands memory(dtype);
  const auto matrix = [&] { return memory.elements(rows * size); };
  const auto vector = [&] { return memory.elements(size); };
  const LayerNormArgs norm = {matrix(), matrix(), vector(), vector(), rows, size, kEps, dtype};
  call("layernorm", cuda::layernorm, norm);
  BiasResidualLayerNormArgs sum_norm = {matrix(), matrix(), matrix(), vector(),
                                        matrix(), vector(), vector()};
  sum_norm.rows = rows;
  sum_norm.hidden_size = size;
  sum_norm.eps = kEps;
  sum_norm.dtype = dtype;
  call("bias_residual_layernorm", cuda::bias_residual_layernorm, sum_norm);
  const BiasActivationArgs activation = {
      matrix(), matrix(), vector(), rows, size, Activation::kGeluErf, dtype};
  call("bias_activation", cuda::bias_activation, activation);
}

// Tables of two rows: every index is the first or the last.
void run_embedding(DType dtype, int64_t rows, int64_t size) {
  Operands memory(dtype);
  const auto table = [&] { return memory.elements(2 * size); };
  std::vector<int64_t> ids(rows);
  for (int64_t& id : ids) id = std::rand() % 2;
  EmbeddingArgs args = {memory.elements(rows * size), table(), table(), table()};
  args.input_ids = memory.integers(ids);
  args.position_ids = memory.integers(ids);
  args.norm_weight = memory.elements(size);
  args.norm_bias = memory.elements(size);
  args.rows = args.position_count = rows;
  args.hidden_size = size;
  args.vocab_size = args.num_positions = args.num_token_types = 2;
  args.token_type_count = 1;
  args.word_scale = 1.0f;
  args.eps = kEps;
  args.dtype = dtype;
  call("embedding", cuda::embedding, args);
}

void run_linear(DType dtype, int64_t rows, int64_t in_size, int64_t out_size, bool in_out) {
  Operands memory(dtype);
  const int num_weights = rows == 4 ? 3 : 1;
  const int64_t stride = num_weights * out_size;
  LinearArgs args = {memory.elements(rows * stride), memory.elements(rows * in_size)};
  for (int i = 0; i < num_weights; ++i) {
    args.weight[i] = memory.elements(in_size * out_size);
    args.bias[i] = memory.elements(out_size);
  }
  args.residual = memory.elements(rows * stride);
  if (rows != 13) {
    args.norm_weight = memory.elements(in_size);
    args.norm_bias = memory.elements(in_size);
  }
  args.rows = rows;
  args.in_features = args.input_stride = in_size;
  args.out_features = out_size;
  args.out_stride = stride;
  args.num_weights = num_weights;
  args.in_out = in_out;
  args.activation = Activation::kGeluTanh;
  args.norm_eps = kEps;
  args.dtype = dtype;
  call("linear", cuda::linear, args);
}

void call_attention(AttentionArgs args, DType dtype, Operands& memory) {
  args.num_heads = args.num_kv_heads = kHeads;
  args.softmax_scale = kSoftmaxScale;
  args.dtype = dtype;
  args.workspace_bytes = cuda::attention_workspace_bytes(args);
  args.workspace = memory.bytes(args.workspace_bytes);
  call("attention", cuda::attention, args);
}

void run_attention(DType dtype, int64_t head_dim, int64_t q_len, int64_t kv_len, MaskCase mask) {
  Operands memory(dtype);
  const int64_t q_size = kHeads * q_len * head_dim, kv_size = kHeads * kv_len * head_dim;
  AttentionArgs args = {memory.elements(kBatch * q_size), memory.elements(kBatch * q_size),
                        memory.elements(kBatch * kv_size), memory.elements(kBatch * kv_size)};
  args.out_strides = args.query_strides = {q_size, q_len * head_dim, head_dim};
  args.key_strides = args.value_strides = {kv_size, kv_len * head_dim, head_dim};
  args.causal = mask == MaskCase::kCausal;
  if (mask == MaskCase::kAddElement) {
    void* data = memory.elements(kBatch * q_len * kv_len);
    args.mask = {data, MaskKind::kAddElement, q_len * kv_len, 0, kv_len, 1};
  } else if (mask == MaskCase::kBoolKeepAndPadding) {
    args.mask = {memory.bytes(kBatch * kv_len), MaskKind::kBoolKeep, kv_len, 0, 0, 1};
    args.kv_start = memory.integers({3, kv_len});  // the second batch row sees no key at all
  }
  args.batch = kBatch;
  args.head_dim = head_dim;
  args.q_len = q_len;
  args.kv_len = kv_len;
  call_attention(args, dtype, memory);
}

// Sequences of 5, 0 and 70 tokens.
void run_packed_attention(DType dtype, int64_t head_dim, bool causal) {
  Operands memory(dtype);
  const auto tokens = [&] { return memory.elements(75 * kHeads * head_dim); };
  const HeadStrides strides = {0, head_dim, kHeads * head_dim};
  AttentionArgs args = {tokens(), tokens(), tokens(), tokens(), strides, strides, strides, strides};
  args.cu_seqlens = memory.integers({0, 5, 5, 75});
  args.batch = 3;
  args.head_dim = head_dim;
  args.q_len = args.kv_len = 70;
  args.causal = causal;
  call_attention(args, dtype, memory);
}

// What the two composites have in common.
template <typename Args>
Args block_args(DType dtype, int64_t rows, int64_t size, bool in_out, NormPlacement norm,
                Operands& memory) {
  Args args = {memory.elements(rows * size), memory.elements(rows * size)};
  args.in_out = in_out;
  args.norm_weight = memory.elements(size);
  args.norm_bias = memory.elements(size);
  args.norm_eps = kEps;
  args.norm = norm;
  args.add_residual = true;
  args.dtype = dtype;
  return args;
}

// One matrix for query, key and value where the norm comes first, else three.
void run_attention_block(DType dtype, int64_t head_dim, int64_t q_len, bool in_out,
                         NormPlacement norm) {
  constexpr int64_t kPast = 150;
  const int64_t size = kBlockHeads * head_dim, cache_len = kPast + q_len + 1;
  Operands memory(dtype);
  auto args = block_args<AttentionBlockArgs>(dtype, kBatch * q_len, size, in_out, norm, memory);
  args.num_qkv_weights = norm == NormPlacement::kPre ? 1 : 3;
  for (int i = 0; i < args.num_qkv_weights; ++i) {
    args.qkv_weight[i] = memory.elements(size * size * 3 / args.num_qkv_weights);
    args.qkv_bias[i] = memory.elements(size * 3 / args.num_qkv_weights);
  }
  args.out_weight = memory.elements(size * size);
  args.out_bias = memory.elements(size);
  args.key_cache = memory.elements(kBatch * size * cache_len);
  args.value_cache = memory.elements(kBatch * size * cache_len);
  args.cache_strides = {size * cache_len, cache_len * head_dim, head_dim};
  args.past_len = kPast;
  args.batch = kBatch;
  args.num_heads = kBlockHeads;
  args.head_dim = head_dim;
  args.q_len = q_len;
  args.total_tokens = kBatch * q_len;
  args.causal = true;
  args.softmax_scale = kSoftmaxScale;
  args.workspace_bytes = cuda::attention_block_workspace_bytes(args);
  args.workspace = memory.bytes(args.workspace_bytes);
  call("attention_block", cuda::attention_block, args);
}

void run_ffn(DType dtype, int64_t rows, int64_t size, bool in_out, NormPlacement norm) {
  Operands memory(dtype);
  auto args = block_args<FfnArgs>(dtype, rows, size, in_out, norm, memory);
  args.fc1_weight = memory.elements(4 * size * size);
  args.fc1_bias = memory.elements(4 * size);
  args.fc2_weight = memory.elements(4 * size * size);
  args.fc2_bias = memory.elements(size);
  args.rows = rows;
  args.hidden_size = size;
  args.intermediate_size = 4 * size;
  args.activation = Activation::kGeluErf;
  args.workspace_bytes = cuda::ffn_workspace_bytes(args);
  args.workspace = memory.bytes(args.workspace_bytes);
  call("ffn", cuda::ffn, args);
}

void run_all_row_ops(DType dtype, bool small) {
  for (int64_t size : {1, 7, 64, 768, 1023, 4096, 9001})
    for (int64_t rows : {1, 5, 300}) {
      if (small && (rows > 5 || size > 1023)) continue;
      run_row_ops(dtype, rows, size);
      run_embedding(dtype, rows, size);
    }
}

void run_all_linear(DType dtype, bool small) {
  constexpr int64_t kShapes[][2] = {{1, 1},      {65, 63},   {72, 40},   {768, 768},
                                    {1000, 504}, {768, 100}, {4096, 72}, {5120, 64}};
  for (const auto& [in_features, out_features] : kShapes)
    for (int64_t rows : {1, 4, 8, 13, 30, 64})
      for (bool in_out : {false, true}) {
        if (small && (in_features > 1000 || rows == 8 || rows == 30)) continue;
        run_linear(dtype, rows, in_features, out_features, in_out);
      }
}

void run_all_attention(DType dtype, bool small) {
  constexpr int64_t kLengths[][2] = {{70, 70}, {1, 70}, {1, 300}, {5, 33}};
  for (int64_t head_dim : {1, 17, 40, 64, 80, 96, 128, 160, 256}) {
    if (small && (head_dim == 1 || head_dim == 96)) continue;
    for (const auto& [q_len, kv_len] : kLengths) {
      run_attention(dtype, head_dim, q_len, kv_len, MaskCase::kNone);
      run_attention(dtype, head_dim, q_len, kv_len, MaskCase::kCausal);
      if (small) continue;
      run_attention(dtype, head_dim, q_len, kv_len, MaskCase::kAddElement);
      run_attention(dtype, head_dim, q_len, kv_len, MaskCase::kBoolKeepAndPadding);
    }
    for (bool causal : {false, true}) run_packed_attention(dtype, head_dim, causal);
  }
}

void run_all_blocks(DType dtype) {
  for (int64_t head_dim : {13, 64})
    for (int64_t q_len : {1, 3})
      for (bool in_out : {false, true})
        for (auto norm : {NormPlacement::kNone, NormPlacement::kPre, NormPlacement::kPost}) {
          run_attention_block(dtype, head_dim, q_len, in_out, norm);
          run_ffn(dtype, kBatch * q_len, kBlockHeads * head_dim, in_out, norm);
        }
}

}  // namespace
}  // namespace eet_patch

int main(int argc, char** argv) {
  using namespace eet_patch;
  const bool small = argc > 1 && std::strcmp(argv[1], "small") == 0;
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    run_all_row_ops(dtype, small);
    run_all_linear(dtype, small);
    run_all_attention(dtype, small);
    run_all_blocks(dtype);
  }
  return summarize();
}
