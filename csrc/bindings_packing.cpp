// Padded batches without their padding: names and arguments, as in bindings.cpp.
#include "bindings_common.h"

namespace eet_patch {
namespace {

void pack_tokens(Address tokens, Address rows, Address cu_seqlens, Address short_cu_seqlens,
                 Address summary, int64_t ticket, Address scratch, const MaskTuple& mask,
                 int64_t num_heads, int64_t q_len, int64_t batch, int64_t seq_len, int64_t capacity,
                 int64_t max_batch, int dtype, int device, Address stream, int num_threads) {
  PackTokensArgs args{};
  args.mask = attention_mask(mask);
  args.tokens = static_cast<int32_t*>(ptr(tokens));
  args.rows = static_cast<int32_t*>(ptr(rows));
  args.cu_seqlens = static_cast<int64_t*>(ptr(cu_seqlens));
  args.short_cu_seqlens = static_cast<int32_t*>(ptr(short_cu_seqlens));
  args.summary = static_cast<int64_t*>(ptr(summary));
  args.ticket = ticket;
  args.scratch = static_cast<int32_t*>(ptr(scratch));
  args.batch = batch;
  args.seq_len = seq_len;
  args.num_heads = num_heads;
  args.q_len = q_len;
  args.capacity = capacity;
  args.max_batch = max_batch;
  args.dtype = static_cast<DType>(dtype);
  EET_RUN(pack_tokens);
}

struct PackAndEmbedArgs {
  PackTokensArgs pack;
  EmbeddingArgs embed;
};

Status pack_and_embed_on_cpu(const PackAndEmbedArgs& args, const Context& context) {
  const Status status = cpu::pack_tokens(args.pack, context);
  return status.ok() ? cpu::embedding(args.embed, context) : status;
}

#ifdef EET_WITH_CUDA
Status pack_and_embed_on_cuda(const PackAndEmbedArgs& args, const Context& context) {
  const Status status = cuda::pack_tokens(args.pack, context);
  return status.ok() ? cuda::embedding(args.embed, context) : status;
}
#endif

// word, position and token type table and their numbers of rows, norm's weight and bias, hidden
// size, eps
using TablesTuple = std::tuple<Address, Address, Address, int64_t, int64_t, int64_t, Address,
                               Address, int64_t, float>;

// Both in one call: it stands before every launch over the layers, while the device has nothing
// else to do.
void pack_and_embed(Address tokens, Address rows, Address scratch, Address cu_seqlens,
                    Address short_cu_seqlens, Address summary, int64_t ticket,
                    const MaskTuple& mask, int64_t batch, int64_t seq_len, int64_t capacity,
                    int64_t max_batch, Address out, Address input_ids, Address position_ids,
                    int64_t position_count, Address token_type_ids, int64_t token_type_count,
                    const TablesTuple& tables, int dtype, int device, Address stream,
                    int num_threads) {
  PackAndEmbedArgs args{};
  PackTokensArgs& pack = args.pack;
  pack.mask = attention_mask(mask);
  pack.tokens = static_cast<int32_t*>(ptr(tokens));
  pack.rows = static_cast<int32_t*>(ptr(rows));
  pack.cu_seqlens = static_cast<int64_t*>(ptr(cu_seqlens));
  pack.short_cu_seqlens = static_cast<int32_t*>(ptr(short_cu_seqlens));
  pack.summary = static_cast<int64_t*>(ptr(summary));
  pack.ticket = ticket;
  pack.scratch = static_cast<int32_t*>(ptr(scratch));
  pack.batch = batch;
  pack.seq_len = seq_len;
  pack.num_heads = pack.q_len = 1;
  pack.capacity = capacity;
  pack.max_batch = max_batch;
  EmbeddingArgs& embed = args.embed;
  Address word = 0, position = 0, token_type = 0, norm_weight = 0, norm_bias = 0;
  std::tie(word, position, token_type, embed.vocab_size, embed.num_positions, embed.num_token_types,
           norm_weight, norm_bias, embed.hidden_size, embed.eps) = tables;
  embed.out = ptr(out);
  embed.word_weight = ptr(word);
  embed.position_weight = ptr(position);
  embed.token_type_weight = ptr(token_type);
  embed.norm_weight = ptr(norm_weight);
  embed.norm_bias = ptr(norm_bias);
  embed.input_ids = index_ptr(input_ids);
  embed.position_ids = index_ptr(position_ids);
  embed.position_count = position_count;
  embed.token_type_ids = index_ptr(token_type_ids);
  embed.token_type_count = token_type_count;
  embed.word_scale = 1.0f;
  embed.rows = capacity;
  embed.tokens = pack.tokens;
  embed.chained = true;
  pack.dtype = embed.dtype = static_cast<DType>(dtype);
#ifdef EET_WITH_CUDA
  const Op<PackAndEmbedArgs> on_cuda = &pack_and_embed_on_cuda;
#else
  const Op<PackAndEmbedArgs> on_cuda = nullptr;
#endif
  run("pack_and_embed", &pack_and_embed_on_cpu, on_cuda, args, device, stream, num_threads);
}

void gather_rows(Address out, Address input, Address index, int64_t rows, int64_t row_bytes,
                 int dtype, int device, Address stream, int num_threads) {
  const GatherRowsArgs args{ptr(out), ptr(input), short_index_ptr(index), rows, row_bytes};
  (void)dtype;
  EET_RUN(gather_rows);
}

// The summary that pack_tokens writes to pinned memory, once its ticket is there. Looking at it
// takes a few microseconds less than an event and a copy of torch's, and holds up nothing else.
py::tuple await_summary(Address summary, int64_t ticket, int device, Address stream) {
  const volatile int64_t* values = static_cast<const volatile int64_t*>(ptr(summary));
  bool arrived = false;
  {
    py::gil_scoped_release release;
    const DeviceGuard guard(device);
    for (int64_t spins = 1; !(arrived = values[3] == ticket); ++spins) {
#ifdef EET_WITH_CUDA
      constexpr int64_t kSpinsPerQuery = 1 << 16;
      if (spins % kSpinsPerQuery != 0) continue;
      const cudaError_t state = cudaStreamQuery(static_cast<cudaStream_t>(ptr(stream)));
      if (state != cudaErrorNotReady) {  // done, or broken
        (void)cudaGetLastError();
        arrived = values[3] == ticket;
        break;
      }
#else
      (void)stream;
      break;
#endif
    }
  }
  if (!arrived) throw std::runtime_error("eet_patch.pack_tokens: the device did not answer");
  return py::make_tuple(values[0], values[1], values[2]);
}

}  // namespace

void bind_packing(py::module_& m) {
#define A(name) py::arg(#name)
#define EET_TAIL A(dtype), A(device), A(stream), A(num_threads)
  m.def("pack_tokens", &pack_tokens, A(tokens), A(rows), A(cu_seqlens), A(short_cu_seqlens),
        A(summary), A(ticket), A(scratch), A(mask), A(num_heads), A(q_len), A(batch), A(seq_len),
        A(capacity), A(max_batch), EET_TAIL);
  m.def("pack_and_embed", &pack_and_embed, A(tokens), A(rows), A(scratch), A(cu_seqlens),
        A(short_cu_seqlens), A(summary), A(ticket), A(mask), A(batch), A(seq_len), A(capacity),
        A(max_batch), A(out), A(input_ids), A(position_ids), A(position_count), A(token_type_ids),
        A(token_type_count), A(tables), EET_TAIL);
  m.def("gather_rows", &gather_rows, A(out), A(input), A(index), A(rows), A(row_bytes), EET_TAIL);
  m.def("await_summary", &await_summary, A(summary), A(ticket), A(device), A(stream));
#undef EET_TAIL
#undef A
}

}  // namespace eet_patch
