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
  m.def("gather_rows", &gather_rows, A(out), A(input), A(index), A(rows), A(row_bytes), EET_TAIL);
  m.def("await_summary", &await_summary, A(summary), A(ticket), A(device), A(stream));
#undef EET_TAIL
#undef A
}

}  // namespace eet_patch
