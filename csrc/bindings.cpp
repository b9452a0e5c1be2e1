// The module eet_patch._C: names and arguments, nothing else. Addresses, sizes and strides (in
// elements) arrive checked by eet_patch/ops; `device` is -1 for the CPU or a CUDA ordinal. The GIL
// is released around the work.
#include <pthread.h>

#include "bindings_common.h"

namespace eet_patch {
namespace {

void embedding(Address out, Address word_weight, Address position_weight, Address token_type_weight,
               Address input_ids, Address position_ids, Address token_type_ids, Address norm_weight,
               Address norm_bias, int64_t rows, int64_t hidden_size, int64_t vocab_size,
               int64_t num_positions, int64_t num_token_types, int64_t position_count,
               int64_t token_type_count, float word_scale, float eps, int dtype, int device,
               Address stream, int num_threads, Address tokens, bool chained) {
  const EmbeddingArgs args{ptr(out),
                           ptr(word_weight),
                           ptr(position_weight),
                           ptr(token_type_weight),
                           index_ptr(input_ids),
                           index_ptr(position_ids),
                           index_ptr(token_type_ids),
                           ptr(norm_weight),
                           ptr(norm_bias),
                           rows,
                           hidden_size,
                           vocab_size,
                           num_positions,
                           num_token_types,
                           position_count,
                           token_type_count,
                           word_scale,
                           eps,
                           static_cast<DType>(dtype),
                           short_index_ptr(tokens),
                           chained};
  EET_RUN(embedding);
}

void layernorm(Address out, Address input, Address weight, Address bias, int64_t rows,
               int64_t hidden_size, float eps, int dtype, int device, Address stream,
               int num_threads, bool chained) {
  const LayerNormArgs args{ptr(out), ptr(input),  ptr(weight), ptr(bias),
                           rows,     hidden_size, eps,         static_cast<DType>(dtype),
                           chained};
  EET_RUN(layernorm);
}

void bias_residual_layernorm(Address out, Address sum_out, Address input, Address bias,
                             Address residual, Address weight, Address norm_bias, int64_t rows,
                             int64_t hidden_size, float eps, int dtype, int device, Address stream,
                             int num_threads, bool chained) {
  const BiasResidualLayerNormArgs args{ptr(out),
                                       ptr(sum_out),
                                       ptr(input),
                                       ptr(bias),
                                       ptr(residual),
                                       ptr(weight),
                                       ptr(norm_bias),
                                       rows,
                                       hidden_size,
                                       eps,
                                       static_cast<DType>(dtype),
                                       chained};
  EET_RUN(bias_residual_layernorm);
}

void bias_activation(Address out, Address input, Address bias, int64_t rows, int64_t size,
                     int activation, int dtype, int device, Address stream, int num_threads) {
  const BiasActivationArgs args{ptr(out),
                                ptr(input),
                                ptr(bias),
                                rows,
                                size,
                                static_cast<Activation>(activation),
                                static_cast<DType>(dtype)};
  EET_RUN(bias_activation);
}

void linear(Address out, Address input, const AddressTriple& weights, const AddressTriple& biases,
            Address residual, Address norm_weight, Address norm_bias, int64_t rows,
            int64_t in_features, int64_t out_features, int64_t input_stride, int64_t out_stride,
            int num_weights, bool in_out, int activation, float norm_eps, int dtype, int device,
            Address stream, int num_threads) {
  LinearArgs args{};
  args.out = ptr(out);
  args.input = ptr(input);
  fill(args.weight, weights);
  fill(args.bias, biases);
  args.residual = ptr(residual);
  args.norm_weight = ptr(norm_weight);
  args.norm_bias = ptr(norm_bias);
  args.rows = rows;
  args.in_features = in_features;
  args.out_features = out_features;
  args.input_stride = input_stride;
  args.out_stride = out_stride;
  args.num_weights = num_weights;
  args.in_out = in_out;
  args.activation = static_cast<Activation>(activation);
  args.norm_eps = norm_eps;
  args.dtype = static_cast<DType>(dtype);
  EET_RUN(linear);
}

void linear_tiles(Address out, Address input, const AddressTriple& weights,
                  const AddressTriple& biases, Address residual, int64_t rows, int64_t in_features,
                  int64_t out_features, int num_weights, int activation, int tile, bool chained,
                  int dtype, int device, Address stream, int num_threads) {
  LinearTilesArgs args{};
  args.product.out = ptr(out);
  args.product.input = ptr(input);
  fill(args.product.weight, weights);
  fill(args.product.bias, biases);
  args.product.residual = ptr(residual);
  args.product.rows = rows;
  args.product.in_features = args.product.input_stride = in_features;
  args.product.out_features = out_features;
  args.product.out_stride = num_weights * out_features;
  args.product.num_weights = num_weights;
  args.product.activation = static_cast<Activation>(activation);
  args.product.dtype = static_cast<DType>(dtype);
  args.tile = tile;
  args.chained = chained;
  EET_RUN(linear_tiles);
}

AttentionArgs attention_args(Address out, Address query, Address key, Address value,
                             const Triple& out_strides, const Triple& query_strides,
                             const Triple& key_strides, const Triple& value_strides,
                             const MaskTuple& mask, Address cu_seqlens, Address kv_start,
                             int64_t batch, int64_t num_heads, int64_t num_kv_heads,
                             int64_t head_dim, int64_t q_len, int64_t kv_len, bool causal,
                             float softmax_scale, int dtype, Address workspace,
                             int64_t workspace_bytes, int64_t total_tokens, int tile) {
  AttentionArgs args{};
  args.out = ptr(out);
  args.query = ptr(query);
  args.key = ptr(key);
  args.value = ptr(value);
  args.out_strides = strides(out_strides);
  args.query_strides = strides(query_strides);
  args.key_strides = strides(key_strides);
  args.value_strides = strides(value_strides);
  args.mask = attention_mask(mask);
  args.cu_seqlens = index_ptr(cu_seqlens);
  args.kv_start = index_ptr(kv_start);
  args.batch = batch;
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.head_dim = head_dim;
  args.q_len = q_len;
  args.kv_len = kv_len;
  args.causal = causal;
  args.softmax_scale = softmax_scale;
  args.dtype = static_cast<DType>(dtype);
  args.workspace = ptr(workspace);
  args.workspace_bytes = workspace_bytes;
  args.total_tokens = total_tokens;
  args.tile = tile;
  return args;
}

void attention(Address out, Address query, Address key, Address value, const Triple& out_strides,
               const Triple& query_strides, const Triple& key_strides, const Triple& value_strides,
               const MaskTuple& mask, Address cu_seqlens, Address kv_start, int64_t batch,
               int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t q_len,
               int64_t kv_len, bool causal, float softmax_scale, Address workspace,
               int64_t workspace_bytes, int64_t total_tokens, int tile, int dtype, int device,
               Address stream, int num_threads) {
  const AttentionArgs args = attention_args(
      out, query, key, value, out_strides, query_strides, key_strides, value_strides, mask,
      cu_seqlens, kv_start, batch, num_heads, num_kv_heads, head_dim, q_len, kv_len, causal,
      softmax_scale, dtype, workspace, workspace_bytes, total_tokens, tile);
  EET_RUN(attention);
}

int64_t attention_workspace_bytes(int64_t batch, int64_t num_heads, int64_t head_dim, int64_t q_len,
                                  int64_t kv_len, int dtype, int device) {
  const AttentionArgs args =
      attention_args(0, 0, 0, 0, {}, {}, {}, {}, {}, 0, 0, batch, num_heads, num_heads, head_dim,
                     q_len, kv_len, false, 1.0f, dtype, 0, 0, 0, -1);
  (void)device;
  return EET_ON_DEVICE(attention_workspace_bytes(args));
}

void attention_block(Address out, Address hidden_states, const AddressTriple& qkv_weights,
                     const AddressTriple& qkv_biases, int num_qkv_weights, Address out_weight,
                     Address out_bias, bool in_out, Address norm_weight, Address norm_bias,
                     float norm_eps, int norm, bool add_residual, Address key_cache,
                     Address value_cache, const Triple& cache_strides, int64_t past_len,
                     const MaskTuple& mask, Address kv_start, Address cu_seqlens, int64_t batch,
                     int64_t num_heads, int64_t head_dim, int64_t q_len, int64_t total_tokens,
                     bool causal, float softmax_scale, Address workspace, int64_t workspace_bytes,
                     int dtype, int device, Address stream, int num_threads) {
  AttentionBlockArgs args{};
  args.out = ptr(out);
  args.hidden_states = ptr(hidden_states);
  fill(args.qkv_weight, qkv_weights);
  fill(args.qkv_bias, qkv_biases);
  args.num_qkv_weights = num_qkv_weights;
  args.out_weight = ptr(out_weight);
  args.out_bias = ptr(out_bias);
  args.in_out = in_out;
  args.norm_weight = ptr(norm_weight);
  args.norm_bias = ptr(norm_bias);
  args.norm_eps = norm_eps;
  args.norm = static_cast<NormPlacement>(norm);
  args.add_residual = add_residual;
  args.key_cache = ptr(key_cache);
  args.value_cache = ptr(value_cache);
  args.cache_strides = strides(cache_strides);
  args.past_len = past_len;
  args.mask = attention_mask(mask);
  args.kv_start = index_ptr(kv_start);
  args.cu_seqlens = index_ptr(cu_seqlens);
  args.batch = batch;
  args.num_heads = num_heads;
  args.head_dim = head_dim;
  args.q_len = q_len;
  args.total_tokens = total_tokens;
  args.causal = causal;
  args.softmax_scale = softmax_scale;
  args.dtype = static_cast<DType>(dtype);
  args.workspace = ptr(workspace);
  args.workspace_bytes = workspace_bytes;
  EET_RUN(attention_block);
}

int64_t attention_block_workspace_bytes(int64_t batch, int64_t num_heads, int64_t head_dim,
                                        int64_t q_len, int64_t past_len, int64_t total_tokens,
                                        bool has_cache, int dtype, int device) {
  AttentionBlockArgs args{};
  args.batch = batch;
  args.num_heads = num_heads;
  args.head_dim = head_dim;
  args.q_len = q_len;
  args.past_len = past_len;
  args.total_tokens = total_tokens;
  // Only whether there is a cache matters for the size.
  args.key_cache = args.value_cache = has_cache ? &args : nullptr;
  args.dtype = static_cast<DType>(dtype);
  (void)device;
  return EET_ON_DEVICE(attention_block_workspace_bytes(args));
}

void ffn(Address out, Address hidden_states, Address fc1_weight, Address fc1_bias,
         Address fc2_weight, Address fc2_bias, bool in_out, Address norm_weight, Address norm_bias,
         float norm_eps, int norm, bool add_residual, int64_t rows, int64_t hidden_size,
         int64_t intermediate_size, int activation, Address workspace, int64_t workspace_bytes,
         int dtype, int device, Address stream, int num_threads) {
  const FfnArgs args{ptr(out),
                     ptr(hidden_states),
                     ptr(fc1_weight),
                     ptr(fc1_bias),
                     ptr(fc2_weight),
                     ptr(fc2_bias),
                     in_out,
                     ptr(norm_weight),
                     ptr(norm_bias),
                     norm_eps,
                     static_cast<NormPlacement>(norm),
                     add_residual,
                     rows,
                     hidden_size,
                     intermediate_size,
                     static_cast<Activation>(activation),
                     static_cast<DType>(dtype),
                     ptr(workspace),
                     workspace_bytes};
  EET_RUN(ffn);
}

int64_t ffn_workspace_bytes(int64_t rows, int64_t hidden_size, int64_t intermediate_size, int dtype,
                            int device) {
  FfnArgs args{};
  args.rows = rows;
  args.hidden_size = hidden_size;
  args.intermediate_size = intermediate_size;
  args.dtype = static_cast<DType>(dtype);
  (void)device;
  return EET_ON_DEVICE(ffn_workspace_bytes(args));
}

// Whether `dict` holds just these keys and these very objects, in whatever order.
bool same_items(PyObject* dict, PyObject* keys, PyObject* values) {
  const Py_ssize_t count = PyTuple_GET_SIZE(keys);
  if (PyDict_Size(dict) != count) return false;
  // In their order first, which costs a fifth of looking each of them up.
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0, i = 0;
  while (i < count && PyDict_Next(dict, &position, &key, &value) != 0 &&
         key == PyTuple_GET_ITEM(keys, i) && value == PyTuple_GET_ITEM(values, i))
    ++i;
  for (; i < count; ++i) {
    PyObject* found = PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(keys, i));
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (found != PyTuple_GET_ITEM(values, i)) return false;
  }
  return true;
}

// Whether every dictionary of (dictionary, keys, values) still holds just these keys and these very
// objects. In C++ because a layer's modules hold some 300 of them, which are compared on every
// call.
bool same_contents(const py::tuple& noted) {
  for (const py::handle entry : noted) {
    if (!same_items(PyTuple_GET_ITEM(entry.ptr(), 0), PyTuple_GET_ITEM(entry.ptr(), 1),
                    PyTuple_GET_ITEM(entry.ptr(), 2)))
      return false;
  }
  return true;
}

py::object call_method(PyObject* object, PyObject* name) {
  PyObject* result = PyObject_CallMethodNoArgs(object, name);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// Part of DLPack's exchange of tensors between libraries (dlpack.h of version 1, Apache-2.0,
// https://github.com/dmlc/dlpack): a tensor's address and layout without a call of Python.
struct TensorView {
  void* data;
  int32_t device_type, device_id, num_dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
using ViewTensor = int (*)(void* tensor, TensorView* view);
struct TensorExchange {
  uint32_t major_version, minor_version;
  void* older;
  void* functions[3];  // for tensors whose memory is shared
  ViewTensor view;     // may be null
};
ViewTensor view_tensor = nullptr;

// Takes the capsule that torch.Tensor has from some version on; whether it is of use.
bool use_tensor_exchange(const py::capsule& capsule) {
  constexpr const char* kName = "dlpack_exchange_api";
  if (std::string(capsule.name() == nullptr ? "" : capsule.name()) != kName) return false;
  const auto* exchange = static_cast<const TensorExchange*>(capsule.get_pointer());
  if (exchange->major_version == 1) view_tensor = exchange->view;
  return view_tensor != nullptr;
}

bool is_dense(const TensorView& view) {
  if (view.strides == nullptr) return true;
  int64_t step = 1;
  for (int i = view.num_dims - 1; i >= 0; --i) {
    if (view.shape[i] == 0) return true;
    if (view.shape[i] == 1) continue;
    if (view.strides[i] != step) return false;
    step *= view.shape[i];
  }
  return true;
}

// Element type and layout of a tensor as a number; 0 where torch has no exchange.
int64_t layout_key(const TensorView& view) {
  return int64_t(view.type_code) << 32 | int64_t(view.type_bits) << 16 |
         int64_t(view.type_lanes) << 1 | int64_t(is_dense(view));
}
int64_t layout_of(const py::object& tensor) {
  TensorView view;
  if (view_tensor == nullptr) return 0;
  if (view_tensor(tensor.ptr(), &view) != 0) {
    PyErr_Clear();
    return 0;
  }
  return layout_key(view);
}

// Whether every tensor of (tensor, address, dtype, is_contiguous(), layout_of()) still lies at its
// address and, where `all` is to be compared, has its dtype and layout. In C++ for the same reason.
bool same_places(const py::tuple& noted, bool all) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const dtype = PyUnicode_InternFromString("dtype");
  static PyObject* const contiguous = PyUnicode_InternFromString("is_contiguous");
  for (const py::handle entry : noted) {
    PyObject* tensor = PyTuple_GET_ITEM(entry.ptr(), 0);
    const int64_t layout = PyLong_AsLongLong(PyTuple_GET_ITEM(entry.ptr(), 4));
    if (layout != 0) {
      TensorView view;
      if (view_tensor(tensor, &view) != 0) {
        PyErr_Clear();
        return false;
      }
      const auto place = reinterpret_cast<uint64_t>(view.data) + view.byte_offset;
      if (place != PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(entry.ptr(), 1))) return false;
      if (all && layout_key(view) != layout) return false;
      continue;
    }
    if (!call_method(tensor, data_ptr).equal(py::handle(PyTuple_GET_ITEM(entry.ptr(), 1))))
      return false;
    if (!all) continue;
    PyObject* found = PyObject_GetAttr(tensor, dtype);
    if (found == nullptr) throw py::error_already_set();
    Py_DECREF(found);  // compared by identity: dtypes live for ever
    if (found != PyTuple_GET_ITEM(entry.ptr(), 2)) return false;
    if (!call_method(tensor, contiguous).is(py::handle(PyTuple_GET_ITEM(entry.ptr(), 3))))
      return false;
  }
  return true;
}

// What this build holds, for `python -m eet_patch info`.
py::dict build_info() {
  py::dict info;
  info["cpu_capability"] = cpu::capability();
#ifdef EET_WITH_CUDA
  info["cuda"] = true;
  info["cuda_archs"] = EET_CUDA_ARCHS;
  info["cuda_version"] = CUDART_VERSION;
#else
  info["cuda"] = false;
  info["cuda_archs"] = "";
  info["cuda_version"] = 0;
#endif
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace
}  // namespace eet_patch

PYBIND11_MODULE(_C, m) {
  namespace ep = eet_patch;
  m.doc() =
      "Kernels of eet_patch over raw addresses; call them through eet_patch.ops, which checks its "
      "arguments.";
  pthread_atfork(nullptr, nullptr, [] { ep::in_forked_child = true; });
  m.attr("MAX_SKINNY_ROWS") = ep::kMaxSkinnyRows;
#define A(name) py::arg(#name)
#define EET_TAIL A(dtype), A(device), A(stream), A(num_threads)
  m.def("embedding", &ep::embedding, A(out), A(word_weight), A(position_weight),
        A(token_type_weight), A(input_ids), A(position_ids), A(token_type_ids), A(norm_weight),
        A(norm_bias), A(rows), A(hidden_size), A(vocab_size), A(num_positions), A(num_token_types),
        A(position_count), A(token_type_count), A(word_scale), A(eps), EET_TAIL,
        py::arg("tokens") = 0, py::arg("chained") = false);
  m.def("layernorm", &ep::layernorm, A(out), A(input), A(weight), A(bias), A(rows), A(hidden_size),
        A(eps), EET_TAIL, py::arg("chained") = false);
  m.def("bias_residual_layernorm", &ep::bias_residual_layernorm, A(out), A(sum_out), A(input),
        A(bias), A(residual), A(weight), A(norm_bias), A(rows), A(hidden_size), A(eps), EET_TAIL,
        py::arg("chained") = false);
  m.def("bias_activation", &ep::bias_activation, A(out), A(input), A(bias), A(rows), A(size),
        A(activation), EET_TAIL);
  m.def("linear", &ep::linear, A(out), A(input), A(weights), A(biases), A(residual), A(norm_weight),
        A(norm_bias), A(rows), A(in_features), A(out_features), A(input_stride), A(out_stride),
        A(num_weights), A(in_out), A(activation), A(norm_eps), EET_TAIL);
  m.def("linear_tiles", &ep::linear_tiles, A(out), A(input), A(weights), A(biases), A(residual),
        A(rows), A(in_features), A(out_features), A(num_weights), A(activation), A(tile),
        A(chained), EET_TAIL);
  m.def("attention", &ep::attention, A(out), A(query), A(key), A(value), A(out_strides),
        A(query_strides), A(key_strides), A(value_strides), A(mask), A(cu_seqlens), A(kv_start),
        A(batch), A(num_heads), A(num_kv_heads), A(head_dim), A(q_len), A(kv_len), A(causal),
        A(softmax_scale), A(workspace), A(workspace_bytes), A(total_tokens), A(tile), EET_TAIL);
  m.def("attention_workspace_bytes", &ep::attention_workspace_bytes, A(batch), A(num_heads),
        A(head_dim), A(q_len), A(kv_len), A(dtype), A(device));
  m.def("attention_block", &ep::attention_block, A(out), A(hidden_states), A(qkv_weights),
        A(qkv_biases), A(num_qkv_weights), A(out_weight), A(out_bias), A(in_out), A(norm_weight),
        A(norm_bias), A(norm_eps), A(norm), A(add_residual), A(key_cache), A(value_cache),
        A(cache_strides), A(past_len), A(mask), A(kv_start), A(cu_seqlens), A(batch), A(num_heads),
        A(head_dim), A(q_len), A(total_tokens), A(causal), A(softmax_scale), A(workspace),
        A(workspace_bytes), EET_TAIL);
  m.def("attention_block_workspace_bytes", &ep::attention_block_workspace_bytes, A(batch),
        A(num_heads), A(head_dim), A(q_len), A(past_len), A(total_tokens), A(has_cache), A(dtype),
        A(device));
  m.def("ffn", &ep::ffn, A(out), A(hidden_states), A(fc1_weight), A(fc1_bias), A(fc2_weight),
        A(fc2_bias), A(in_out), A(norm_weight), A(norm_bias), A(norm_eps), A(norm), A(add_residual),
        A(rows), A(hidden_size), A(intermediate_size), A(activation), A(workspace),
        A(workspace_bytes), EET_TAIL);
  m.def("ffn_workspace_bytes", &ep::ffn_workspace_bytes, A(rows), A(hidden_size),
        A(intermediate_size), A(dtype), A(device));
  ep::bind_decode(m);
  ep::bind_select(m);
  ep::bind_packing(m);
  m.def("same_contents", &ep::same_contents, A(noted));
  m.def("same_places", &ep::same_places, A(noted), A(all));
  m.def("layout_of", &ep::layout_of, A(tensor));
  m.def("use_tensor_exchange", &ep::use_tensor_exchange, A(capsule));
  m.def("build_info", &ep::build_info);
#undef EET_TAIL
#undef A
}
