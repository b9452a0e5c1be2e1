// Every CUDA kernel of the extension over odd and real sizes, for compute-sanitizer. There is no
// torch in the process, so no caching allocator hides an access out of bounds: each operand is a
// cudaMalloc of exactly its size, and the device is synchronised after each call. Values are not
// looked at here; the pytest tests in ops/ check them. `small` as argument runs the reduced set,
// for racecheck; names of parts (see main) run only those, so that a sanitizer, which takes one
// core, can look at several at once. Linked with csrc/cuda/*.cu (-Icsrc); the exit status is 1 if a
// call failed or none was made.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/linear_tiles.h"
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
  return errors != 0 || calls == 0;
}

// For the CUDA calls of this program itself: a failure there leaves nothing to go on with.
void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  ++errors;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(summarize());
}

template <typename Args>
auto dtype_of(const Args& args, int) -> decltype(static_cast<int>(args.dtype)) {
  return static_cast<int>(args.dtype);
}
template <typename Args>
int dtype_of(const Args&, long) {
  return -1;  // an op over one type
}

template <typename Args>
void call(const char* name, Status (*op)(const Args&, const Context&), const Args& args) {
  const Status status = op(args, Context());
  const cudaError_t error = cudaDeviceSynchronize();
  ++calls;
  if (status.ok() && error == cudaSuccess) return;
  ++errors;
  std::printf("%s, dtype %d: status %d, then %s\n", name, dtype_of(args, 0), status.code,
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
  template <typename V>
  V* values(const std::vector<V>& host) {
    return static_cast<V*>(copy(host));
  }
  void* zeros(int64_t count) { return copy(std::vector<uint8_t>(count)); }
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
  sum_norm.chained = true;
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
  std::vector<int32_t> tokens(rows, -1);
  for (int64_t row = 0; row < rows; row += 2) tokens[row] = static_cast<int32_t>(rows - 1 - row);
  args.tokens = memory.values(tokens);
  args.chained = true;
  call("embedding", cuda::embedding, args);
}

void run_gather_rows(DType dtype, int64_t rows, int64_t size) {
  Operands memory(dtype);
  std::vector<int32_t> index(rows);
  for (int32_t& at : index) at = std::rand() % 3 - 1;  // of two rows, or none
  const int64_t row_bytes = size * (dtype == DType::kFloat32 ? 4 : 2);
  const GatherRowsArgs args = {memory.elements(rows * size), memory.elements(2 * size),
                               memory.values(index), rows, row_bytes};
  call("gather_rows", cuda::gather_rows, args);
}

// A mask of keys alone, and one over heads, queries and keys.
void run_pack_tokens(DType dtype, int64_t batch, int64_t seq_len) {
  for (const bool by_query : {false, true}) {
    if (by_query && seq_len > 300) continue;
    Operands memory(dtype);
    PackTokensArgs args = {};
    args.num_heads = by_query ? kHeads : 1;
    args.q_len = by_query ? seq_len : 1;
    args.mask.kind = MaskKind::kBoolKeep;
    args.mask.data = memory.bytes(batch * args.num_heads * args.q_len * seq_len);
    args.mask.key_stride = 1;
    args.mask.query_stride = by_query ? seq_len : 0;
    args.mask.head_stride = by_query ? seq_len * seq_len : 0;
    args.mask.batch_stride = args.num_heads * args.q_len * seq_len;
    args.batch = batch;
    args.seq_len = seq_len;
    args.capacity = batch * seq_len + 5;
    args.max_batch = batch + 3;
    args.dtype = dtype;
    args.tokens = memory.values(std::vector<int32_t>(args.capacity));
    args.rows = memory.values(std::vector<int32_t>(batch * seq_len));
    args.cu_seqlens = memory.integers(std::vector<int64_t>(args.max_batch + 1));
    args.short_cu_seqlens = memory.values(std::vector<int32_t>(args.max_batch + 1));
    args.summary = memory.integers(std::vector<int64_t>(4));
    args.scratch = memory.values(std::vector<int32_t>(2 * batch));
    call("pack_tokens", cuda::pack_tokens, args);
  }
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

void run_linear_tiles(DType dtype, int64_t rows, int64_t in_size, int64_t out_size, int tile) {
  Operands memory(dtype);
  LinearTilesArgs args = {};
  args.tile = tile;
  LinearArgs& product = args.product;
  product.num_weights = rows % 2 == 0 ? 3 : 1;
  product.out_features = out_size;
  product.out_stride = product.num_weights * out_size;
  product.out = memory.elements(rows * product.out_stride);
  product.input = memory.elements(rows * in_size);
  for (int i = 0; i < product.num_weights; ++i) {
    product.weight[i] = memory.elements(in_size * out_size);
    product.bias[i] = memory.elements(out_size);
  }
  product.rows = rows;
  product.in_features = product.input_stride = in_size;
  product.dtype = dtype;
  for (Activation activation : {Activation::kNone, Activation::kGeluErf, Activation::kSilu}) {
    product.activation = activation;
    call("linear_tiles", cuda::linear_tiles, args);
  }
  product.activation = Activation::kNone;
  product.residual = memory.elements(rows * product.out_stride);
  call("linear_tiles", cuda::linear_tiles, args);
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

// More tiles than stages hold, on a GPU that multiplies by warpgroups: the views of a stacked
// product, whose arrays end with the last sequence.
void run_packed_tiles(DType dtype, int64_t head_dim) {
  Operands memory(dtype);
  constexpr int64_t kTokens = 5 + 450 + 128;
  const int64_t width = kHeads * head_dim;
  char* stacked = static_cast<char*>(memory.elements(kTokens * 3 * width));
  const HeadStrides strides = {0, head_dim, 3 * width};
  AttentionArgs args = {memory.elements(kTokens * width), stacked, stacked + 2 * width,
                        stacked + 4 * width};
  args.out_strides = {0, head_dim, width};
  args.query_strides = args.key_strides = args.value_strides = strides;
  args.cu_seqlens = memory.integers({0, 5, 455, kTokens, kTokens});
  args.batch = 4;
  args.head_dim = head_dim;
  args.total_tokens = kTokens;
  args.q_len = args.kv_len = 512;
  for (const int tile : {-1, 2, 4, 5, 6}) {
    args.tile = tile;
    if (tile < 0 || head_dim == 64) call_attention(args, dtype, memory);
  }
  args.tile = -1;
  args.cu_seqlens = memory.integers({0, 5, 5, 133});
  args.batch = 3;
  args.q_len = args.kv_len = 128;
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

// Rows of different length and padding; `scattered` reads the past of beams from other cache rows.
void run_decode_layers(DType dtype, int rows, int64_t heads, int64_t head_dim, bool in_out,
                       bool scattered, bool post_norm = false, int64_t cross_len = 0) {
  constexpr int64_t kCapacity = 200, kLayers = 2;
  const int sentences = (rows + 1) / 2;
  const int64_t size = heads * head_dim, inner = 4 * size;
  Operands memory(dtype);
  DecodeLayersArgs args = {};
  std::vector<DecodeLayer> layers(kLayers);
  for (DecodeLayer& layer : layers) {
    const auto vector = [&](int64_t count) { return memory.elements(count); };
    layer = {vector(size), vector(size)};
    layer.qkv_weight[0] = vector(3 * size * size);
    layer.qkv_bias[0] = vector(3 * size);
    layer.out_weight = vector(size * size);
    layer.out_bias = vector(size);
    layer.norm2_weight = vector(size);
    layer.norm2_bias = vector(size);
    layer.fc1_weight = vector(size * inner);
    layer.fc1_bias = vector(inner);
    layer.fc2_weight = vector(size * inner);
    layer.fc2_bias = vector(size);
    layer.key_cache = vector((rows + 1) * size * kCapacity);
    layer.value_cache = vector((rows + 1) * size * kCapacity);
    layer.softmax_scale = kSoftmaxScale;
    if (cross_len == 0) continue;
    layer.cross_norm_weight = vector(size);
    layer.cross_norm_bias = vector(size);
    layer.cross_query_weight = vector(size * size);
    layer.cross_query_bias = vector(size);
    layer.cross_out_weight = vector(size * size);
    layer.cross_out_bias = vector(size);
    layer.cross_keys = vector(sentences * cross_len * size);
    layer.cross_values = vector(sentences * cross_len * size);
  }
  std::vector<int32_t> lengths(rows), starts(rows), slots(rows);
  for (int row = 0; row < rows; ++row) {
    lengths[row] = (row * 67 + 199) % kCapacity;
    starts[row] = row % 2 == 0 ? 0 : lengths[row] / 3;
    slots[row] = rows - row;
  }
  args.out = memory.elements(rows * size);
  args.hidden_states = args.out;
  args.layers = layers.data();
  args.device_layers = memory.values(layers);
  args.lengths = memory.values(lengths);
  args.kv_start = memory.values(starts);
  args.cache_rows = memory.values(slots);
  if (scattered) args.key_rows = memory.values(std::vector<int32_t>(rows * kCapacity, 0));
  args.cache_strides = {size * kCapacity, kCapacity * head_dim, head_dim};
  args.capacity = args.max_kv_len = kCapacity;
  args.rows = rows;
  args.num_layers = kLayers;
  args.num_heads = heads;
  args.head_dim = head_dim;
  args.intermediate_size = inner;
  args.num_qkv_weights = 1;
  args.in_out = in_out;
  args.post_norm = post_norm;
  if (cross_len > 0) {
    std::vector<int32_t> begins(rows), ends(rows), from(rows);
    for (int row = 0; row < rows; ++row) {
      from[row] = row / 2;
      ends[row] = static_cast<int32_t>(cross_len - row / 2 % cross_len);
      begins[row] = row % 3 == 2 ? ends[row] : ends[row] / 4;  // some see nothing
    }
    args.cross_start = memory.values(begins);
    args.cross_lengths = memory.values(ends);
    args.cross_rows = memory.values(from);
    args.cross_strides = {cross_len * size, head_dim, size};
    args.max_cross_len = cross_len;
    args.cross_weights_position_stride = cross_len;
    args.cross_weights_row_stride = kCapacity * cross_len;
    args.cross_weights =
        memory.values(std::vector<float>((rows + 1) * kCapacity * cross_len, 0.0f));
  }
  args.norm_eps = kEps;
  args.activation = Activation::kGeluTanh;
  args.dtype = dtype;
  args.vocab_size = 1003;
  args.head_weight = memory.elements(args.vocab_size * size);
  args.head_norm_weight = memory.elements(size);
  args.head_norm_bias = memory.elements(size);
  args.logits = memory.elements(rows * args.vocab_size);
  args.workspace_bytes = cuda::decode_layers_workspace_bytes(args);
  args.workspace = memory.zeros(args.workspace_bytes);
  call("decode_layers", cuda::decode_layers, args);
  call("decode_layers", cuda::decode_layers, args);  // over the state that the first one left
  if (!post_norm) return;
  args.head_norm_weight = args.head_norm_bias = nullptr;  // the last layer's norm is the head's
  call("decode_layers", cuda::decode_layers, args);
}

// Rows whose past is all scattered, and sentences that `shared_rows` of them look at.
void run_step_attention(DType dtype, int64_t rows, int64_t shared_rows, int64_t heads,
                        int64_t head_dim, bool appends) {
  constexpr int64_t kCapacity = 70;
  const int64_t size = heads * head_dim;
  Operands memory(dtype);
  std::vector<int32_t> lengths(rows), starts(rows), cache_rows(rows), key_rows(rows * kCapacity);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t sentence = row / shared_rows;
    lengths[row] = static_cast<int32_t>(sentence * 13 % (kCapacity - 1));
    starts[row] = lengths[row] / 4;
    cache_rows[row] = static_cast<int32_t>(appends ? rows - 1 - row : sentence);
    for (int64_t key = 0; key < kCapacity; ++key) {
      const int64_t from = key < lengths[row] / 2
                               ? sentence * shared_rows
                               : row / shared_rows * shared_rows + (row + key) % shared_rows;
      key_rows[row * kCapacity + key] = static_cast<int32_t>(rows - 1 - from);
    }
  }
  StepAttentionArgs args = {};
  args.out = memory.elements(rows * size);
  args.query = memory.elements(rows * 3 * size);
  args.query_stride = 3 * size;
  args.key_offset = size;
  args.value_offset = 2 * size;
  args.key_cache = memory.elements(rows * kCapacity * size);
  args.value_cache = memory.elements(rows * kCapacity * size);
  args.cache_strides = {kCapacity * size, kCapacity * head_dim, head_dim};
  args.lengths = memory.values(lengths);
  args.kv_start = memory.values(starts);
  args.cache_rows = memory.values(cache_rows);
  if (appends) args.key_rows = memory.values(key_rows);
  args.capacity = args.max_kv_len = kCapacity;
  args.rows = rows;
  args.num_heads = heads;
  args.head_dim = head_dim;
  args.shared_rows = shared_rows;
  args.appends = appends;
  args.softmax_scale = 0.125f;
  args.dtype = dtype;
  if (!appends) {
    args.weights = memory.values(std::vector<float>(rows * kCapacity));
    args.weight_row_stride = args.num_weights = kCapacity;
  }
  call("step_attention", cuda::step_attention, args);
}

void run_select_token(DType dtype, int rows, int64_t vocab_size, bool sample, int64_t top_k,
                      float top_p) {
  constexpr int64_t kTokens = 12;
  Operands memory(dtype);
  const std::vector<int32_t> state(rows, 3);
  SelectTokenArgs args = {};
  args.logits = memory.elements(rows * vocab_size);
  args.logits_stride = vocab_size;
  args.tokens = memory.integers(std::vector<int64_t>(rows * kTokens));
  args.tokens_stride = kTokens;
  args.input_ids = memory.integers(std::vector<int64_t>(rows));
  args.position_ids = memory.integers(std::vector<int64_t>(rows));
  args.lengths = memory.values(state);
  args.finished = memory.values(std::vector<uint8_t>(rows));
  args.unfinished_count = memory.values(std::vector<int32_t>{rows});
  args.seen = memory.values(std::vector<uint32_t>(rows * ((vocab_size + 31) / 32), 5u));
  args.eos_token_ids = memory.integers({0, vocab_size - 1});
  args.suppressed_tokens = memory.integers({vocab_size / 2});
  args.num_eos = 2;
  args.num_suppressed = vocab_size > 3;
  if (sample) args.noise = memory.values(std::vector<float>(rows * vocab_size, 0.5f));
  args.rows = rows;
  args.vocab_size = vocab_size;
  args.top_k = top_k;
  args.repetition_penalty = 1.2f;
  args.temperature = 0.8f;
  args.top_p = top_p;
  args.min_p = 0.01f;
  args.dtype = dtype;
  args.workspace_bytes = cuda::select_token_workspace_bytes(args);
  args.workspace = memory.zeros(args.workspace_bytes);
  for (int step = 0; step < 2; ++step) call("select_token", cuda::select_token, args);

  TopCandidatesArgs candidates = {};
  candidates.count = 4 < vocab_size ? 4 : vocab_size;
  candidates.scores = memory.values(std::vector<float>(rows * candidates.count));
  candidates.tokens = memory.values(std::vector<int32_t>(rows * candidates.count));
  candidates.logits = args.logits;
  candidates.logits_stride = vocab_size;
  candidates.row_scores = memory.values(std::vector<float>(rows, -1.0f));
  candidates.lengths = args.lengths;
  candidates.seen = args.seen;
  candidates.rows = rows;
  candidates.vocab_size = vocab_size;
  candidates.repetition_penalty = 1.2f;
  candidates.dtype = dtype;
  candidates.workspace_bytes = cuda::top_candidates_workspace_bytes(candidates);
  candidates.workspace = memory.zeros(candidates.workspace_bytes);
  call("top_candidates", cuda::top_candidates, candidates);
  candidates.seen = nullptr;  // two other kernels
  call("top_candidates", cuda::top_candidates, candidates);
}

// A search from its first step to one behind its last.
void run_beam_step(int64_t batch, int64_t num_beams, int64_t kept, bool stop_when_full) {
  constexpr int64_t kLimit = 5, kContext = 3;
  const int64_t rows = batch * num_beams;
  Operands memory(DType::kFloat32);
  const auto filled = [&](auto value, int64_t count) {
    return memory.values(std::vector<decltype(value)>(count, value));
  };
  std::vector<float> scores(rows * kept);
  std::vector<int32_t> tokens(rows * kept), key_rows(rows * (kContext + kLimit));
  for (int64_t i = 0; i < rows * kept; ++i) {
    scores[i] = -0.25f * (i % kept) - 0.01f * (i / kept);
    tokens[i] = static_cast<int32_t>(i * 7 % 100);
  }
  BeamStepArgs args = {};
  args.scores = memory.values(scores);
  args.candidate_tokens = memory.values(tokens);
  args.running_scores = filled(0.0f, rows);
  args.generated = filled(int32_t{0}, rows);
  args.tokens = filled(int64_t{0}, rows * kLimit);
  args.tokens_stride = kLimit;
  args.input_ids = filled(int64_t{0}, rows);
  args.position_ids = filled(int64_t{0}, rows);
  args.lengths = filled(int32_t{kContext - 1}, rows);
  args.key_rows = memory.values(key_rows);
  args.seen_words = 4;
  args.seen = filled(uint32_t{1}, rows * args.seen_words);
  args.ended_scores = filled(-1e9f, rows);
  args.ended_tokens = filled(int32_t{0}, rows);
  args.ended_lengths = filled(int32_t{0}, rows);
  args.ended_indices = filled(int32_t{0}, rows * kLimit);
  args.has_ended = filled(uint8_t{0}, rows);
  args.improvable = filled(uint8_t{1}, batch);
  args.outlook = filled(uint8_t{0}, kLimit * batch);
  args.top_scores = filled(0.0f, batch * kept);
  args.top_parents = filled(int32_t{0}, batch * kept);
  args.limit = filled(int32_t{kLimit}, 1);
  args.length_penalties = filled(1.5f, 2 * kLimit);
  args.eos_token_ids = memory.integers({7, 14});
  args.num_eos = 2;
  args.batch = batch;
  args.num_beams = num_beams;
  args.per_beam = args.kept = kept;
  args.capacity = kContext + kLimit;
  args.max_steps = kLimit;
  args.stop_when_full = stop_when_full;
  for (int64_t step = 0; step <= kLimit; ++step) {
    args.num_sources = step == 0 ? 1 : num_beams;
    call("beam_step", cuda::beam_step, args);
  }
}

// A search until its sentences are done, and a step more.
void run_hypothesis_step(int64_t sentences, int64_t num_beams) {
  constexpr int64_t kCapacity = 12;
  const int64_t rows = sentences * num_beams, kept = 2 * num_beams;
  Operands memory(DType::kFloat32);
  const auto filled = [&](auto value, int64_t count) {
    return memory.values(std::vector<decltype(value)>(count, value));
  };
  std::vector<float> scores(rows * kept);
  std::vector<int32_t> tokens(rows * kept), slots(rows), places(sentences);
  for (int64_t i = 0; i < rows * kept; ++i) {
    scores[i] = -0.25f * (i % kept) - 0.01f * (i / kept);
    tokens[i] = static_cast<int32_t>(i * 7 % 5);
  }
  for (int64_t row = 0; row < rows; ++row) slots[row] = static_cast<int32_t>(rows - 1 - row);
  for (int64_t s = 0; s < sentences; ++s) places[s] = static_cast<int32_t>(sentences - 1 - s);
  HypothesisStepArgs args = {};
  args.scores = memory.values(scores);
  args.candidate_tokens = memory.values(tokens);
  args.running_scores = filled(0.0f, rows);
  args.ignored = filled(uint8_t{0}, rows);
  args.places = memory.values(places);
  args.slots = memory.values(slots);
  args.lengths = filled(int32_t{0}, rows);
  args.input_ids = filled(int64_t{0}, rows);
  args.position_ids = filled(int64_t{0}, rows);
  args.key_rows = filled(int32_t{0}, rows * kCapacity);
  args.tokens = filled(int64_t{0}, rows * kCapacity);
  args.history_scores = filled(0.0f, rows * kCapacity);
  args.ended = filled(int32_t{0}, sentences);
  args.is_done = filled(uint8_t{0}, sentences);
  args.ended_scores = filled(0.0f, rows);
  args.ended_lengths = filled(int32_t{0}, rows);
  args.ended_rows = filled(int32_t{0}, rows * kCapacity);
  args.sentences = sentences;
  args.num_beams = num_beams;
  args.kept = kept;
  args.capacity = kCapacity;
  args.eos = 2;
  for (int64_t step = 0; step + 1 < kCapacity; ++step)
    call("hypothesis_step", cuda::hypothesis_step, args);
}

void run_all_generation(DType dtype, bool small) {
  if (dtype == DType::kFloat32) {
    run_hypothesis_step(1, 1);
    run_hypothesis_step(3, 4);
    run_hypothesis_step(2, 32);
    for (bool stop_when_full : {false, true}) {
      run_beam_step(1, 1, 2, stop_when_full);
      run_beam_step(4, 4, 8, stop_when_full);
      run_beam_step(3, 7, 21, stop_when_full);
      run_beam_step(2, 32, 64, stop_when_full);
    }
  }
  for (int rows : {1, 3, 8, 16, 33})
    for (bool in_out : {true, false})
      for (bool scattered : {false, true}) {
        if (small && (rows > 8 || (scattered && !in_out))) continue;
        run_decode_layers(dtype, rows, 2, 64, in_out, scattered);
        run_decode_layers(dtype, rows, 2, 20, in_out, scattered);
        if (!small) run_decode_layers(dtype, rows, 4, 80, in_out, scattered);
        run_decode_layers(dtype, rows, 2, 64, in_out, scattered, true, 9);
        run_decode_layers(dtype, rows, 2, 20, in_out, scattered, false, 130);
      }
  for (bool appends : {false, true})
    for (int64_t shared_rows : {1, 5, 11}) {  // many heads, of which each warp has one
      run_step_attention(dtype, 80 * shared_rows, shared_rows, shared_rows == 1 ? 25 : 6, 64,
                         appends);
      // So many that a warp has one of all rows of a sentence.
      if (shared_rows > 1)
        run_step_attention(dtype, 80 * shared_rows, shared_rows, 12, 64, appends);
      if (!small) run_step_attention(dtype, 60 * shared_rows, shared_rows, 30, 24, appends);
    }
  for (int rows : {1, 5, 70})
    for (int64_t vocab_size : {31, 5000, 50257, 50264}) {
      if (small && (vocab_size > 5000 || (rows > 5 && vocab_size < 5000))) continue;
      run_select_token(dtype, rows, vocab_size, false, 0, 1.0f);
      run_select_token(dtype, rows, vocab_size, true, 7, 0.9f);
      run_select_token(dtype, rows, vocab_size, true, 0, 0.9f);
      run_select_token(dtype, rows, vocab_size, true, 0, 1.0f);
    }
}

void run_all_row_ops(DType dtype, bool small) {
  for (int64_t size : {1, 7, 64, 768, 1023, 4096, 9001})
    for (int64_t rows : {1, 5, 300}) {
      if (small && (rows > 5 || size > 1023)) continue;
      run_row_ops(dtype, rows, size);
      run_embedding(dtype, rows, size);
      run_gather_rows(dtype, rows, size);
    }
  for (int64_t seq_len : {1, 33, 300}) {
    run_pack_tokens(dtype, 1, seq_len);
    run_pack_tokens(dtype, 300, small ? 1 : seq_len);
  }
  run_pack_tokens(dtype, 9, 1000);  // more than one block takes
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

// More tiles than blocks, and more parts of the input than a block keeps: both come around again.
void run_walking_linear(bool small) {
  constexpr int64_t kInFeatures = 1608, kOutFeatures = 64 * 400 + 8;
  for (int64_t rows : {1, 8, 16, 40}) {
    if (small && rows != 8) continue;
    run_linear(DType::kFloat16, rows, kInFeatures, kOutFeatures, true);
  }
}

void run_all_linear_tiles(bool small) {
  int device = 0, major = 0, minor = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return;
  for (int tile = 0; tile < cuda::kNumTiles + cuda::kNumClusterShapes; ++tile) {
    run_linear_tiles(DType::kFloat16, 300, 392, 328, tile);
    // More k than the rings of a cluster's blocks hold.
    if (tile >= cuda::kNumTiles) run_linear_tiles(DType::kFloat16, 41, 2632, 104, tile);
    if (small) continue;
    run_linear_tiles(DType::kFloat16, 77, 72, 200, tile);
    run_linear_tiles(DType::kBFloat16, 1000, 1032, 776, tile);
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
  if (dtype == DType::kFloat32) return;
  for (int64_t head_dim : {32, 64, 128}) run_packed_tiles(dtype, head_dim);
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

// sanitize_kernels [small] [generation rows linear attention blocks walking tiles]: all parts
// unless some are named.
int main(int argc, char** argv) {
  using namespace eet_patch;
  bool small = false;
  std::vector<std::string> parts;
  for (int arg = 1; arg < argc; ++arg) {
    if (std::strcmp(argv[arg], "small") == 0) {
      small = true;
    } else {
      parts.push_back(argv[arg]);
    }
  }
  auto wanted = [&](const char* part) {
    return parts.empty() || std::find(parts.begin(), parts.end(), part) != parts.end();
  };
  for (DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (wanted("generation")) run_all_generation(dtype, small);
    if (wanted("rows")) run_all_row_ops(dtype, small);
    if (wanted("linear")) run_all_linear(dtype, small);
    if (wanted("attention")) run_all_attention(dtype, small);
    if (wanted("blocks")) run_all_blocks(dtype);
  }
  if (wanted("walking")) run_walking_linear(small);
  if (wanted("tiles")) run_all_linear_tiles(small);
  return summarize();
}
