// The bound functions of decode_layers, and CUDA graphs.
#include "bindings_common.h"

namespace eet_patch {
namespace {

static_assert(sizeof(DecodeLayer) == 27 * 8, "eet_patch/ops/decode.py packs 27 fields of 8 bytes");

DecodeLayersArgs decode_layers_args(Address layers, int64_t capacity, int64_t max_kv_len,
                                    int64_t rows, int64_t num_layers, int64_t num_heads,
                                    int64_t head_dim, int64_t intermediate_size,
                                    int num_qkv_weights, bool in_out, int dtype) {
  DecodeLayersArgs args = {};
  args.layers = static_cast<const DecodeLayer*>(ptr(layers));
  args.cache_strides = {num_heads * capacity * head_dim, capacity * head_dim, head_dim};
  args.capacity = capacity;
  args.max_kv_len = max_kv_len;
  args.rows = rows;
  args.num_layers = num_layers;
  args.num_heads = num_heads;
  args.head_dim = head_dim;
  args.intermediate_size = intermediate_size;
  args.num_qkv_weights = num_qkv_weights;
  args.in_out = in_out;
  args.dtype = static_cast<DType>(dtype);
  return args;
}

void decode_layers(Address out, Address hidden_states, Address layers, Address device_layers,
                   Address lengths, Address kv_start, Address cache_rows, Address key_rows,
                   int64_t capacity, int64_t max_kv_len, int64_t rows, int64_t num_layers,
                   int64_t num_heads, int64_t head_dim, int64_t intermediate_size,
                   int num_qkv_weights, bool in_out, bool post_norm, Address cross_start,
                   Address cross_lengths, Address cross_rows, const Triple& cross_strides,
                   int64_t max_cross_len, Address cross_weights, int64_t cross_weights_row_stride,
                   int64_t cross_weights_position_stride, float norm_eps, int activation,
                   Address head_weight, Address head_norm_weight, Address head_norm_bias,
                   Address logits, int64_t vocab_size, bool chained, Address workspace,
                   int64_t workspace_bytes, int dtype, int device, Address stream,
                   int num_threads) {
  DecodeLayersArgs args =
      decode_layers_args(layers, capacity, max_kv_len, rows, num_layers, num_heads, head_dim,
                         intermediate_size, num_qkv_weights, in_out, dtype);
  args.out = ptr(out);
  args.hidden_states = ptr(hidden_states);
  args.device_layers = static_cast<const DecodeLayer*>(ptr(device_layers));
  args.lengths = static_cast<const int32_t*>(ptr(lengths));
  args.kv_start = static_cast<const int32_t*>(ptr(kv_start));
  args.cache_rows = static_cast<const int32_t*>(ptr(cache_rows));
  args.key_rows = static_cast<const int32_t*>(ptr(key_rows));
  args.post_norm = post_norm;
  args.cross_start = static_cast<const int32_t*>(ptr(cross_start));
  args.cross_lengths = static_cast<const int32_t*>(ptr(cross_lengths));
  args.cross_rows = static_cast<const int32_t*>(ptr(cross_rows));
  args.cross_strides = strides(cross_strides);
  args.max_cross_len = max_cross_len;
  args.cross_weights = static_cast<float*>(ptr(cross_weights));
  args.cross_weights_row_stride = cross_weights_row_stride;
  args.cross_weights_position_stride = cross_weights_position_stride;
  args.norm_eps = norm_eps;
  args.activation = static_cast<Activation>(activation);
  args.head_weight = ptr(head_weight);
  args.head_norm_weight = ptr(head_norm_weight);
  args.head_norm_bias = ptr(head_norm_bias);
  args.logits = ptr(logits);
  args.vocab_size = vocab_size;
  args.chained = chained;
  args.workspace = ptr(workspace);
  args.workspace_bytes = workspace_bytes;
  EET_RUN(decode_layers);
}

int64_t decode_layers_workspace_bytes(Address layers, int64_t capacity, int64_t max_kv_len,
                                      int64_t rows, int64_t num_layers, int64_t num_heads,
                                      int64_t head_dim, int64_t intermediate_size,
                                      int num_qkv_weights, bool in_out, int dtype, int device) {
  const DeviceGuard guard(device);
  const DecodeLayersArgs args =
      decode_layers_args(layers, capacity, max_kv_len, rows, num_layers, num_heads, head_dim,
                         intermediate_size, num_qkv_weights, in_out, dtype);
  return EET_ON_DEVICE(decode_layers_workspace_bytes(args));
}

void step_attention(Address out, Address query, int64_t query_stride, int64_t key_offset,
                    int64_t value_offset, Address key_cache, Address value_cache,
                    const Triple& cache_strides, Address lengths, Address kv_start,
                    Address cache_rows, Address key_rows, int64_t capacity, int64_t max_kv_len,
                    int64_t rows, int64_t num_heads, int64_t head_dim, int64_t shared_rows,
                    bool appends, float softmax_scale, Address weights, Address weight_rows,
                    Address weight_positions, int64_t weight_row_stride,
                    int64_t weight_position_stride, int64_t num_weights, int dtype, int device,
                    Address stream, int num_threads) {
  StepAttentionArgs args = {};
  args.out = ptr(out);
  args.query = ptr(query);
  args.query_stride = query_stride;
  args.key_offset = key_offset;
  args.value_offset = value_offset;
  args.key_cache = ptr(key_cache);
  args.value_cache = ptr(value_cache);
  args.cache_strides = strides(cache_strides);
  args.lengths = static_cast<const int32_t*>(ptr(lengths));
  args.kv_start = static_cast<const int32_t*>(ptr(kv_start));
  args.cache_rows = static_cast<const int32_t*>(ptr(cache_rows));
  args.key_rows = static_cast<const int32_t*>(ptr(key_rows));
  args.capacity = capacity;
  args.max_kv_len = max_kv_len;
  args.rows = rows;
  args.num_heads = num_heads;
  args.head_dim = head_dim;
  args.shared_rows = shared_rows;
  args.appends = appends;
  args.softmax_scale = softmax_scale;
  args.weights = static_cast<float*>(ptr(weights));
  args.weight_rows = static_cast<const int32_t*>(ptr(weight_rows));
  args.weight_positions = static_cast<const int32_t*>(ptr(weight_positions));
  args.weight_row_stride = weight_row_stride;
  args.weight_position_stride = weight_position_stride;
  args.num_weights = num_weights;
  args.dtype = static_cast<DType>(dtype);
  EET_RUN(step_attention);
}

// CUDA graphs of launches that allocate nothing: the caller keeps the handle, and what the launches
// read and write, alive.
#ifdef EET_WITH_CUDA
void graph_begin(int device, Address stream) {
  const DeviceGuard guard(device);
  raise("graph_begin",
        {static_cast<int>(cudaStreamBeginCapture(static_cast<cudaStream_t>(ptr(stream)),
                                                 cudaStreamCaptureModeThreadLocal))});
}

Address graph_end(int device, Address stream) {
  const DeviceGuard guard(device);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  cudaError_t error = cudaStreamEndCapture(static_cast<cudaStream_t>(ptr(stream)), &graph);
  if (error == cudaSuccess) error = cudaGraphInstantiate(&executable, graph, 0);
  if (graph != nullptr) cudaGraphDestroy(graph);
  if (error != cudaSuccess) (void)cudaGetLastError();
  raise("graph_end", {static_cast<int>(error)});
  return reinterpret_cast<Address>(executable);
}

void graph_launch(Address graph, int device, Address stream) {
  cudaError_t error;
  {
    py::gil_scoped_release release;
    const DeviceGuard guard(device);
    error = cudaGraphLaunch(static_cast<cudaGraphExec_t>(ptr(graph)),
                            static_cast<cudaStream_t>(ptr(stream)));
    if (error != cudaSuccess) (void)cudaGetLastError();  // the caller goes on without the graph
  }
  raise("graph_launch", {static_cast<int>(error)});
}

void graph_destroy(Address graph, int device) {
  const DeviceGuard guard(device);
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(ptr(graph)));
}
#endif

}  // namespace

void bind_decode(py::module_& m) {
#define A(name) py::arg(#name)
  m.def("decode_layers", &decode_layers, A(out), A(hidden_states), A(layers), A(device_layers),
        A(lengths), A(kv_start), A(cache_rows), A(key_rows), A(capacity), A(max_kv_len), A(rows),
        A(num_layers), A(num_heads), A(head_dim), A(intermediate_size), A(num_qkv_weights),
        A(in_out), A(post_norm), A(cross_start), A(cross_lengths), A(cross_rows), A(cross_strides),
        A(max_cross_len), A(cross_weights), A(cross_weights_row_stride),
        A(cross_weights_position_stride), A(norm_eps), A(activation), A(head_weight),
        A(head_norm_weight), A(head_norm_bias), A(logits), A(vocab_size), A(chained), A(workspace),
        A(workspace_bytes), A(dtype), A(device), A(stream), A(num_threads));
  m.def("step_attention", &step_attention, A(out), A(query), A(query_stride), A(key_offset),
        A(value_offset), A(key_cache), A(value_cache), A(cache_strides), A(lengths), A(kv_start),
        A(cache_rows), A(key_rows), A(capacity), A(max_kv_len), A(rows), A(num_heads), A(head_dim),
        A(shared_rows), A(appends), A(softmax_scale), A(weights), A(weight_rows),
        A(weight_positions), A(weight_row_stride), A(weight_position_stride), A(num_weights),
        A(dtype), A(device), A(stream), A(num_threads));
  m.def("decode_layers_workspace_bytes", &decode_layers_workspace_bytes, A(layers), A(capacity),
        A(max_kv_len), A(rows), A(num_layers), A(num_heads), A(head_dim), A(intermediate_size),
        A(num_qkv_weights), A(in_out), A(dtype), A(device));
#ifdef EET_WITH_CUDA
  m.def("graph_begin", &graph_begin, A(device), A(stream));
  m.def("graph_end", &graph_end, A(device), A(stream));
  m.def("graph_launch", &graph_launch, A(graph), A(device), A(stream));
  m.def("graph_destroy", &graph_destroy, A(graph), A(device));
#endif
#undef A
}

}  // namespace eet_patch
