// The bound functions of select_token and top_candidates. On the CPU eet_patch/ops/selection.py
// does their work, so they take CUDA devices only.
#include "bindings_common.h"

namespace eet_patch {
namespace {

template <typename T>
T* at(Address address) {
  return static_cast<T*>(ptr(address));
}

template <typename Args>
Status not_on_cpu(const Args&, const Context&) {
  return Status{Status::kUnsupported};
}

#ifdef EET_WITH_CUDA
#define EET_CUDA_ONLY(op) &cuda::op
#define EET_CUDA_BYTES(call) cuda::call
#else
#define EET_CUDA_ONLY(op) nullptr
#define EET_CUDA_BYTES(call) (static_cast<void>(args), int64_t{0})
#endif

void select_token(Address logits, int64_t logits_stride, Address slots, Address tokens,
                  int64_t tokens_stride, Address input_ids, Address position_ids, Address lengths,
                  Address finished, Address unfinished_count, Address seen, Address eos_token_ids,
                  Address suppressed_tokens, Address noise, int64_t rows, int64_t vocab_size,
                  int64_t num_eos, int64_t num_suppressed, int64_t pad_token_id, int64_t min_len,
                  int64_t top_k, float repetition_penalty, float temperature, float top_p,
                  float min_p, Address workspace, int64_t workspace_bytes, int dtype, int device,
                  Address stream, int num_threads) {
  SelectTokenArgs args{};
  args.logits = ptr(logits);
  args.logits_stride = logits_stride;
  args.slots = at<const int32_t>(slots);
  args.tokens = at<int64_t>(tokens);
  args.tokens_stride = tokens_stride;
  args.input_ids = at<int64_t>(input_ids);
  args.position_ids = at<int64_t>(position_ids);
  args.lengths = at<int32_t>(lengths);
  args.finished = at<uint8_t>(finished);
  args.unfinished_count = at<int32_t>(unfinished_count);
  args.seen = at<uint32_t>(seen);
  args.eos_token_ids = index_ptr(eos_token_ids);
  args.suppressed_tokens = index_ptr(suppressed_tokens);
  args.noise = at<const float>(noise);
  args.rows = rows;
  args.vocab_size = vocab_size;
  args.num_eos = num_eos;
  args.num_suppressed = num_suppressed;
  args.pad_token_id = pad_token_id;
  args.min_len = min_len;
  args.top_k = top_k;
  args.repetition_penalty = repetition_penalty;
  args.temperature = temperature;
  args.top_p = top_p;
  args.min_p = min_p;
  args.dtype = static_cast<DType>(dtype);
  args.workspace = ptr(workspace);
  args.workspace_bytes = workspace_bytes;
  run<SelectTokenArgs>("select_token", &not_on_cpu<SelectTokenArgs>, EET_CUDA_ONLY(select_token),
                       args, device, stream, num_threads);
}

int64_t select_token_workspace_bytes(int64_t rows, bool samples) {
  SelectTokenArgs args{};
  args.rows = rows;
  const float any = 0.0f;
  args.noise = samples ? &any : nullptr;  // only whether there is noise matters for the size
  return EET_CUDA_BYTES(select_token_workspace_bytes(args));
}

void top_candidates(Address scores, Address tokens, Address logits, int64_t logits_stride,
                    Address row_scores, Address slots, Address lengths, Address seen,
                    Address eos_token_ids, Address suppressed_tokens, int64_t rows,
                    int64_t vocab_size, int64_t num_eos, int64_t num_suppressed, int64_t min_len,
                    int64_t count, float repetition_penalty, Address workspace,
                    int64_t workspace_bytes, int dtype, int device, Address stream,
                    int num_threads) {
  TopCandidatesArgs args{};
  args.scores = at<float>(scores);
  args.tokens = at<int32_t>(tokens);
  args.logits = ptr(logits);
  args.logits_stride = logits_stride;
  args.row_scores = at<const float>(row_scores);
  args.slots = at<const int32_t>(slots);
  args.lengths = at<const int32_t>(lengths);
  args.seen = at<const uint32_t>(seen);
  args.eos_token_ids = index_ptr(eos_token_ids);
  args.suppressed_tokens = index_ptr(suppressed_tokens);
  args.rows = rows;
  args.vocab_size = vocab_size;
  args.num_eos = num_eos;
  args.num_suppressed = num_suppressed;
  args.min_len = min_len;
  args.count = count;
  args.repetition_penalty = repetition_penalty;
  args.dtype = static_cast<DType>(dtype);
  args.workspace = ptr(workspace);
  args.workspace_bytes = workspace_bytes;
  run<TopCandidatesArgs>("top_candidates", &not_on_cpu<TopCandidatesArgs>,
                         EET_CUDA_ONLY(top_candidates), args, device, stream, num_threads);
}

int64_t top_candidates_workspace_bytes(int64_t rows) {
  TopCandidatesArgs args{};
  args.rows = rows;
  return EET_CUDA_BYTES(top_candidates_workspace_bytes(args));
}

}  // namespace

void bind_select(py::module_& m) {
  m.attr("MAX_CANDIDATES") = kMaxCandidates;
#define A(name) py::arg(#name)
#define EET_TAIL A(dtype), A(device), A(stream), A(num_threads)
  m.def("select_token", &select_token, A(logits), A(logits_stride), A(slots), A(tokens),
        A(tokens_stride), A(input_ids), A(position_ids), A(lengths), A(finished),
        A(unfinished_count), A(seen), A(eos_token_ids), A(suppressed_tokens), A(noise), A(rows),
        A(vocab_size), A(num_eos), A(num_suppressed), A(pad_token_id), A(min_len), A(top_k),
        A(repetition_penalty), A(temperature), A(top_p), A(min_p), A(workspace), A(workspace_bytes),
        EET_TAIL);
  m.def("select_token_workspace_bytes", &select_token_workspace_bytes, A(rows), A(samples));
  m.def("top_candidates", &top_candidates, A(scores), A(tokens), A(logits), A(logits_stride),
        A(row_scores), A(slots), A(lengths), A(seen), A(eos_token_ids), A(suppressed_tokens),
        A(rows), A(vocab_size), A(num_eos), A(num_suppressed), A(min_len), A(count),
        A(repetition_penalty), A(workspace), A(workspace_bytes), EET_TAIL);
  m.def("top_candidates_workspace_bytes", &top_candidates_workspace_bytes, A(rows));
#undef EET_TAIL
#undef A
}

}  // namespace eet_patch
