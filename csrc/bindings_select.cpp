// The bound functions of select_token, top_candidates and beam_step. On the CPU
// eet_patch/ops/torch_selection.py does their work, so they take CUDA devices only.
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
                  float min_p, bool chained, Address workspace, int64_t workspace_bytes, int dtype,
                  int device, Address stream, int num_threads) {
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
  args.chained = chained;
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
                    int64_t count, float repetition_penalty, bool chained, Address workspace,
                    int64_t workspace_bytes, int dtype, int device, Address stream,
                    int num_threads) {
  TopCandidatesArgs args{};
  args.chained = chained;
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

void beam_step(Address scores, Address candidate_tokens, Address running_scores, Address generated,
               Address tokens, int64_t tokens_stride, Address input_ids, Address position_ids,
               Address lengths, Address key_rows, Address seen, Address ended_scores,
               Address ended_tokens, Address ended_lengths, Address ended_indices,
               Address has_ended, Address improvable, Address outlook, Address top_scores,
               Address top_parents, Address limit, Address length_penalties, Address eos_token_ids,
               int64_t batch, int64_t num_beams, int64_t num_sources, int64_t per_beam,
               int64_t kept, int64_t capacity, int64_t max_steps, int64_t seen_words,
               int64_t num_eos, bool stop_when_full, int device, Address stream, int num_threads) {
  BeamStepArgs args{};
  args.scores = at<const float>(scores);
  args.candidate_tokens = at<const int32_t>(candidate_tokens);
  args.running_scores = at<float>(running_scores);
  args.generated = at<int32_t>(generated);
  args.tokens = at<int64_t>(tokens);
  args.tokens_stride = tokens_stride;
  args.input_ids = at<int64_t>(input_ids);
  args.position_ids = at<int64_t>(position_ids);
  args.lengths = at<int32_t>(lengths);
  args.key_rows = at<int32_t>(key_rows);
  args.seen = at<uint32_t>(seen);
  args.ended_scores = at<float>(ended_scores);
  args.ended_tokens = at<int32_t>(ended_tokens);
  args.ended_lengths = at<int32_t>(ended_lengths);
  args.ended_indices = at<int32_t>(ended_indices);
  args.has_ended = at<uint8_t>(has_ended);
  args.improvable = at<uint8_t>(improvable);
  args.outlook = at<uint8_t>(outlook);
  args.top_scores = at<float>(top_scores);
  args.top_parents = at<int32_t>(top_parents);
  args.limit = at<const int32_t>(limit);
  args.length_penalties = at<const float>(length_penalties);
  args.eos_token_ids = index_ptr(eos_token_ids);
  args.batch = batch;
  args.num_beams = num_beams;
  args.num_sources = num_sources;
  args.per_beam = per_beam;
  args.kept = kept;
  args.capacity = capacity;
  args.max_steps = max_steps;
  args.seen_words = seen_words;
  args.num_eos = num_eos;
  args.stop_when_full = stop_when_full;
  run<BeamStepArgs>("beam_step", &not_on_cpu<BeamStepArgs>, EET_CUDA_ONLY(beam_step), args, device,
                    stream, num_threads);
}

void hypothesis_step(Address scores, Address candidate_tokens, Address running_scores,
                     Address ignored, Address places, Address slots, Address lengths,
                     Address input_ids, Address position_ids, Address key_rows, Address tokens,
                     Address history_scores, Address ended, Address is_done, Address ended_scores,
                     Address ended_lengths, Address ended_rows, int64_t sentences,
                     int64_t num_beams, int64_t kept, int64_t capacity, int64_t eos, bool chained,
                     int device, Address stream, int num_threads) {
  HypothesisStepArgs args{};
  args.scores = at<const float>(scores);
  args.candidate_tokens = at<const int32_t>(candidate_tokens);
  args.running_scores = at<float>(running_scores);
  args.ignored = at<uint8_t>(ignored);
  args.places = at<const int32_t>(places);
  args.slots = at<const int32_t>(slots);
  args.lengths = at<int32_t>(lengths);
  args.input_ids = at<int64_t>(input_ids);
  args.position_ids = at<int64_t>(position_ids);
  args.key_rows = at<int32_t>(key_rows);
  args.tokens = at<int64_t>(tokens);
  args.history_scores = at<float>(history_scores);
  args.ended = at<int32_t>(ended);
  args.is_done = at<uint8_t>(is_done);
  args.ended_scores = at<float>(ended_scores);
  args.ended_lengths = at<int32_t>(ended_lengths);
  args.ended_rows = at<int32_t>(ended_rows);
  args.sentences = sentences;
  args.num_beams = num_beams;
  args.kept = kept;
  args.capacity = capacity;
  args.eos = eos;
  args.chained = chained;
  run<HypothesisStepArgs>("hypothesis_step", &not_on_cpu<HypothesisStepArgs>,
                          EET_CUDA_ONLY(hypothesis_step), args, device, stream, num_threads);
}

}  // namespace

void bind_select(py::module_& m) {
  m.attr("MAX_CANDIDATES") = kMaxCandidates;
  m.attr("MAX_BEAMS") = kMaxBeams;
#define A(name) py::arg(#name)
#define EET_TAIL A(dtype), A(device), A(stream), A(num_threads)
  m.def("select_token", &select_token, A(logits), A(logits_stride), A(slots), A(tokens),
        A(tokens_stride), A(input_ids), A(position_ids), A(lengths), A(finished),
        A(unfinished_count), A(seen), A(eos_token_ids), A(suppressed_tokens), A(noise), A(rows),
        A(vocab_size), A(num_eos), A(num_suppressed), A(pad_token_id), A(min_len), A(top_k),
        A(repetition_penalty), A(temperature), A(top_p), A(min_p), A(chained), A(workspace),
        A(workspace_bytes), EET_TAIL);
  m.def("select_token_workspace_bytes", &select_token_workspace_bytes, A(rows), A(samples));
  m.def("top_candidates", &top_candidates, A(scores), A(tokens), A(logits), A(logits_stride),
        A(row_scores), A(slots), A(lengths), A(seen), A(eos_token_ids), A(suppressed_tokens),
        A(rows), A(vocab_size), A(num_eos), A(num_suppressed), A(min_len), A(count),
        A(repetition_penalty), A(chained), A(workspace), A(workspace_bytes), EET_TAIL);
  m.def("top_candidates_workspace_bytes", &top_candidates_workspace_bytes, A(rows));
  m.def("beam_step", &beam_step, A(scores), A(candidate_tokens), A(running_scores), A(generated),
        A(tokens), A(tokens_stride), A(input_ids), A(position_ids), A(lengths), A(key_rows),
        A(seen), A(ended_scores), A(ended_tokens), A(ended_lengths), A(ended_indices), A(has_ended),
        A(improvable), A(outlook), A(top_scores), A(top_parents), A(limit), A(length_penalties),
        A(eos_token_ids), A(batch), A(num_beams), A(num_sources), A(per_beam), A(kept), A(capacity),
        A(max_steps), A(seen_words), A(num_eos), A(stop_when_full), A(device), A(stream),
        A(num_threads));
  m.def("hypothesis_step", &hypothesis_step, A(scores), A(candidate_tokens), A(running_scores),
        A(ignored), A(places), A(slots), A(lengths), A(input_ids), A(position_ids), A(key_rows),
        A(tokens), A(history_scores), A(ended), A(is_done), A(ended_scores), A(ended_lengths),
        A(ended_rows), A(sentences), A(num_beams), A(kept), A(capacity), A(eos), A(chained),
        A(device), A(stream), A(num_threads));
#undef EET_TAIL
#undef A
}

}  // namespace eet_patch
