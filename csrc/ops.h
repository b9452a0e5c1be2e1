// The ops of the extension: one argument struct each, one function a backend, the same contract on
// both.
//
// Addresses are borrowed for the call; nothing is allocated, kept or synchronised. The caller has
// checked shapes, types and devices. A function returns kOk, or a status that the binding turns
// into an exception; on CUDA the work is queued on `stream` of the current device. All products and
// reductions accumulate in fp32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace eet_patch {

struct Status {
  int code = 0;                            // 0 = ok, > 0 a cudaError_t, < 0 one of the codes below
  static constexpr int kUnsupported = -1;  // sizes that this backend has no kernel for
  static constexpr int kBadIndex =
      -2;  // an index outside its table (CPU only; CUDA traps, as torch does)
  bool ok() const { return code == 0; }
};

struct Context {
  void* stream = nullptr;  // cudaStream_t; unused on CPU
  int num_threads = 1;     // CPU only
};

// out[r] = LN(word_scale * word_weight[input_ids[r]] + position_weight[position_ids[r %
// position_count]]
//             + token_type_weight[token_type_ids[r % token_type_count]])
// position_weight, token_type_weight, norm_weight may be null (term or LN left out). token_type_ids
// null with a token_type_weight means type 0. A bias of LN may be null. With `tokens` row r stands
// for tokens[r] of the ids, and is zeros where that is negative.
struct EmbeddingArgs {
  void* out;                      // (rows, hidden_size)
  const void* word_weight;        // (vocab_size, hidden_size)
  const void* position_weight;    // (num_positions, hidden_size) or null
  const void* token_type_weight;  // (num_token_types, hidden_size) or null
  const int64_t* input_ids;       // (rows,)
  const int64_t* position_ids;    // (position_count,)
  const int64_t* token_type_ids;  // (token_type_count,) or null
  const void* norm_weight;        // (hidden_size,) or null
  const void* norm_bias;          // (hidden_size,) or null
  int64_t rows, hidden_size, vocab_size, num_positions, num_token_types, position_count,
      token_type_count;
  float word_scale, eps;
  DType dtype;
  const int32_t* tokens;  // (rows,) or null
  bool chained = false;   // CUDA: the launch before on the stream is ours and made the tokens
};

// out[r] = (input[r] - mean) / sqrt(var + eps) * weight + bias; weight and bias may be null (1 and
// 0).
struct LayerNormArgs {
  void* out;
  const void *input, *weight, *bias;
  int64_t rows, hidden_size;
  float eps;
  DType dtype;
  bool chained = false;  // CUDA: the kernel ahead on the stream wrote no weight and no bias
};

// sum[r] = input[r] + bias + residual[r];  out[r] = LN(sum[r]). bias, residual, sum_out may be
// null; `sum_out` receives the sum rounded to T (pre-norm blocks need both). out may alias input,
// residual or sum_out's address may equal residual.
struct BiasResidualLayerNormArgs {
  void* out;
  void* sum_out;
  const void *input, *bias, *residual, *weight, *norm_bias;
  int64_t rows, hidden_size;
  float eps;
  DType dtype;
  bool chained = false;  // as in LayerNormArgs
};

// out[r] = activation(input[r] + bias); bias may be null; out may alias input.
struct BiasActivationArgs {
  void* out;
  const void *input, *bias;
  int64_t rows, size;
  Activation activation;
  DType dtype;
};

// out = activation(LN?(input) @ W + bias) + residual, for few rows (CUDA: rows <= kMaxSkinnyRows;
// CPU: any number). `num_weights` matrices of equal shape stand side by side in the output: columns
// [i * out_features, (i+1) * out_features) of a row come from weight[i]. LN is left out when
// norm_weight is null.
struct LinearArgs {
  void* out;              // (rows, num_weights * out_features), rows out_stride apart
  const void* input;      // (rows, in_features), rows input_stride apart
  const void* weight[3];  // (out_features, in_features), or (in_features, out_features) when
                          // in_out; contiguous
  const void* bias[3];    // (out_features,) or null
  const void* residual;   // (rows, num_weights * out_features), rows out_stride apart, or null; may
                          // alias out
  const void *norm_weight, *norm_bias;
  int64_t rows, in_features, out_features, input_stride, out_stride;
  int num_weights;
  bool in_out;
  Activation activation;
  float norm_eps;
  DType dtype;
};
constexpr int64_t kMaxSkinnyRows = 64;

// The same for any number of rows: on CUDA by the tensor cores of sm_90a, for fp16 and bf16, no LN,
// not in_out, activation or residual but not both; in_features, input_stride (= in_features),
// out_features and out_stride multiples of 8, and 16-byte aligned addresses. All else is
// kUnsupported there.
struct LinearTilesArgs {
  LinearArgs product;
  int tile;      // CUDA: a size of tile and who shares what (linear_tiles.h)
  bool chained;  // CUDA: the kernel ahead on the stream wrote no weights: they may be read early
};

// out = softmax(scale * query @ key^T + mask) @ value, per (batch, head).
// Padded form: cu_seqlens null, every batch row has q_len queries and kv_len keys. Packed form:
// cu_seqlens holds batch + 1 token offsets into one (total, heads, head_dim) array; strides.batch
// is unused, q_len and kv_len are the longest length, queries and keys are the same tokens, mask is
// none. causal: query i sees key j when j <= i + (kv_len - q_len). kv_start (left padding): keys
// below kv_start[b] are excluded. A query with no visible key yields zeros. num_kv_heads divides
// num_heads.
struct AttentionArgs {
  void* out;
  const void *query, *key, *value;
  HeadStrides out_strides, query_strides, key_strides, value_strides;
  AttentionMask mask;
  const int64_t* cu_seqlens;  // (batch + 1,) or null
  const int64_t* kv_start;    // (batch,) or null
  int64_t batch, num_heads, num_kv_heads, head_dim, q_len, kv_len;
  bool causal;
  float softmax_scale;
  DType dtype;
  void* workspace;  // CUDA: attention_workspace_bytes(args) bytes of scratch for split-KV decoding;
                    // CPU: unused
  int64_t workspace_bytes;
  int64_t total_tokens;  // packed: tokens of query, key and value; 0: not known
  int tile = -1;         // CUDA, packed: a size of tile (packed_attention.cu), < 0: chosen
};

// One attention block: norm placement, q/k/v projections, K and V written to the cache at
// [past_len, past_len + q_len), attention over [0, past_len + q_len), output projection, residual.
// Without a cache (key_cache null) past_len is 0. hidden_states and out are (batch * q_len,
// hidden_size) contiguous and may not alias; hidden_size = num_heads * head_dim.
struct AttentionBlockArgs {
  void* out;
  const void* hidden_states;
  const void* qkv_weight[3];  // three (hidden, hidden), or one (hidden, 3 * hidden) in_out / (3 *
                              // hidden, hidden)
  const void* qkv_bias[3];
  int num_qkv_weights;  // 1 or 3
  const void *out_weight, *out_bias;
  bool in_out;
  const void *norm_weight, *norm_bias;
  float norm_eps;
  NormPlacement norm;
  bool add_residual;
  void *key_cache, *value_cache;
  HeadStrides cache_strides;  // the same for keys and values
  int64_t past_len;
  AttentionMask mask;  // over past_len + q_len keys
  const int64_t* kv_start;
  const int64_t*
      cu_seqlens;  // packed tokens, no cache: batch + 1 offsets, then q_len is the longest length
  int64_t batch, num_heads, head_dim, q_len,
      total_tokens;  // total_tokens = batch * q_len unless packed
  bool causal;
  float softmax_scale;
  DType dtype;
  void* workspace;  // attention_block_workspace_bytes(args) bytes
  int64_t workspace_bytes;
};

// One feed-forward block: out = residual + act(LN?(x) @ W1 + b1) @ W2 + b2, LN placed as in the
// attention block. hidden_states and out are (rows, hidden_size) contiguous and may not alias.
struct FfnArgs {
  void* out;
  const void* hidden_states;
  const void *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  bool in_out;
  const void *norm_weight, *norm_bias;
  float norm_eps;
  NormPlacement norm;
  bool add_residual;
  int64_t rows, hidden_size, intermediate_size;
  Activation activation;
  DType dtype;
  void* workspace;  // ffn_workspace_bytes(args) bytes
  int64_t workspace_bytes;
};

// Attention of one new token of every row over what a cache holds of it. Row r's keys are positions
// kv_start[r] (0 where null) up to lengths[r] of its cache row (cache_rows[r], or r where null);
// with `key_rows` position p stands in cache row key_rows[r * capacity + p] instead. `appends`: key
// and value of the new token stand key_offset and value_offset behind its query; they go to
// position lengths[r] of the row's cache row and are seen. A row without keys yields zeros.
// `weights`, where not null, gets the mean over the heads of the attention weights: num_weights of
// them, zeros where there is no key, at row weight_rows[r] (r where null) and position
// weight_positions[r] (0 where null). It is for rows that do not append and have no key_rows.
struct StepAttentionArgs {
  void* out;          // (rows, num_heads * head_dim)
  const void* query;  // (rows, num_heads * head_dim), rows query_stride apart
  int64_t query_stride, key_offset, value_offset;
  void *key_cache, *value_cache;  // (cache rows, num_heads, capacity, head_dim), by cache_strides
  HeadStrides cache_strides;
  const int32_t* lengths;     // (rows,)
  const int32_t* kv_start;    // (rows,) or null
  const int32_t* cache_rows;  // (rows,) or null
  const int32_t* key_rows;    // (rows, capacity) or null
  int64_t capacity;
  int64_t max_kv_len;  // no length is above this
  int64_t rows, num_heads, head_dim;
  // So many rows behind each other (0 and 1: none; they divide `rows`) have one length and one
  // start, and mostly the same keys: CUDA may read those once.
  int64_t shared_rows;
  bool appends;
  float softmax_scale;
  float* weights;
  const int32_t *weight_rows, *weight_positions;
  int64_t weight_row_stride, weight_position_stride, num_weights;
  DType dtype;
};

// The parameters and the cache of one layer whose attention has as many key as query heads; what
// the layer lacks is null. The keys and values of its cross-attention are of sentences, which
// several rows may share.
struct DecodeLayer {
  const void *norm1_weight, *norm1_bias;
  const void* qkv_weight[3];  // one (hidden, 3 * hidden) in_out / (3 * hidden, hidden), or three
  const void* qkv_bias[3];
  const void *out_weight, *out_bias;
  const void *norm2_weight, *norm2_bias;
  const void *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
  void *key_cache, *value_cache;  // (cache rows, num_heads, capacity, head_dim), strides of the op
  const void *cross_norm_weight, *cross_norm_bias, *cross_query_weight, *cross_query_bias;
  const void *cross_out_weight, *cross_out_bias;
  void *cross_keys,
      *cross_values;  // (sentences, num_heads, any, head_dim), cross_strides of the op
  double softmax_scale;
};

// All layers of one decode step: one new token a row goes through `num_layers` pre-norm layers
//   x += out(attention(LN1(x)));  x += fc2(activation(fc1(LN2(x))))
// or, with post_norm, x = LN1(x + out(attention(x))); x = LN2(x + fc2(activation(fc1(x)))). Between
// the two stands, where the layers have cross_keys, cross-attention with a norm of its own over
// positions cross_start[r] (0 where null) up to cross_lengths[r] of sentence cross_rows[r].
// What changes from step to step lies on the device, so that a captured call serves every step.
// Row r's key and value go to position lengths[r] of its cache row (cache_rows[r], or r where that
// is null); its query sees the positions kv_start[r] (0 where null) .. lengths[r]. With `key_rows`
// position p of row r is read from cache row key_rows[r * capacity + p] instead (beams that share
// their past); entry lengths[r] need not be set. out may alias hidden_states.
struct DecodeLayersArgs {
  void* out;
  const void* hidden_states;         // (rows, hidden_size)
  const DecodeLayer* layers;         // num_layers of them, on the host; read during the call
  const DecodeLayer* device_layers;  // CUDA: the same on the device, read when the work runs
  const int32_t* lengths;            // (rows,) keys already there, < capacity
  const int32_t* kv_start;           // (rows,) or null
  const int32_t* cache_rows;         // (rows,) or null
  const int32_t* key_rows;           // (rows, capacity) or null
  HeadStrides cache_strides;         // of every layer's keys and values
  int64_t capacity;
  int64_t max_kv_len;  // no length reaches this; <= capacity
  int64_t rows, num_layers, num_heads, head_dim, intermediate_size;
  int num_qkv_weights;  // 1 or 3
  bool in_out, post_norm;
  const int32_t *cross_start, *cross_lengths, *cross_rows;  // (rows,); the first may be null
  HeadStrides cross_strides;  // of every layer's cross_keys and values
  int64_t max_cross_len;      // no cross length is above this
  // The mean weights of the last layer's cross-attention, or null: max_cross_len of them for cache
  // row and position of the new token.
  float* cross_weights;
  int64_t cross_weights_row_stride, cross_weights_position_stride;
  float norm_eps;
  Activation activation;
  DType dtype;
  // The product behind the last layer, over its layer norm; null: there is none, nor logits.
  const void* head_weight;  // (vocab_size, hidden_size)
  const void *head_norm_weight, *head_norm_bias;
  void* logits;  // (rows, vocab_size)
  int64_t vocab_size;
  bool chained;     // CUDA: the launch before on the stream is `embedding` of the same step
  void* workspace;  // decode_layers_workspace_bytes(args) bytes, zero before its first use; one
                    // call at a time
  int64_t workspace_bytes;
};

// The next token of every row, from the logits of its last one; what the loop needs of it goes on
// to the step's own buffers. Scores are the logits in float, then, in this order and each only
// where set: repetition penalty over the tokens in `seen`; tokens suppressed; eos suppressed while
// the length (with the new token not yet counted) is below min_len; temperature; top_k (ties of the
// k-th stay); top_p (Holtzman et al. 2019, arXiv:1904.09751); min_p. Greedy takes the largest score
// (the lowest token of equal ones); sampling takes the largest softmax(scores) / noise, so that
// exponential noise draws from the distribution. A finished row gets pad_token_id; a row whose
// token is one of eos_token_ids is finished from then on. Row r stands for slot slots[r] (r where
// null) of tokens, seen, finished and noise.
struct SelectTokenArgs {
  const void* logits;  // (rows, vocab_size), rows logits_stride apart
  int64_t logits_stride;
  const int32_t* slots;       // (rows,) or null
  int64_t* tokens;            // (num_slots, >= length + 2), rows tokens_stride apart: the new token
  int64_t tokens_stride;      //   goes to position lengths[r] + 1
  int64_t* input_ids;         // (rows,): the new token
  int64_t* position_ids;      // (rows,): + 1
  int32_t* lengths;           // (rows,): + 1
  uint8_t* finished;          // (num_slots,) 0 or 1
  int32_t* unfinished_count;  // how many rows are not finished is counted down here
  uint32_t* seen;             // (num_slots, ceil(vocab_size / 32)) a bit a token, or null; the new
                              // token's bit is set
  const int64_t* eos_token_ids;      // (num_eos,)
  const int64_t* suppressed_tokens;  // (num_suppressed,)
  const float* noise;                // (num_slots, vocab_size) > 0: sample; null: greedy
  int64_t rows, vocab_size, num_eos, num_suppressed, pad_token_id, min_len, top_k;  // top_k 0: off
  float repetition_penalty, temperature, top_p, min_p;  // 1, 1, 1 and 0: off
  DType dtype;
  bool chained;     // the launch before on the stream is decode_layers, with a head
  void* workspace;  // select_token_workspace_bytes(args) bytes, zero before its first use; one call
                    // at a time
  int64_t workspace_bytes;
};

// The `count` best continuations of every row (a beam): log softmax of its logits, then repetition
// penalty, suppressed tokens and min_len on that as in select_token, plus row_scores[r]; largest
// first, of equal ones the lowest token first. Row r stands for slot slots[r] (r where null) of
// seen.
struct TopCandidatesArgs {
  float* scores;       // (rows, count)
  int32_t* tokens;     // (rows, count)
  const void* logits;  // (rows, vocab_size), rows logits_stride apart
  int64_t logits_stride;
  const float* row_scores;           // (rows,) or null
  const int32_t* slots;              // (rows,) or null
  const int32_t* lengths;            // (rows,), as of select_token; read with min_len
  const uint32_t* seen;              // (num_slots, ceil(vocab_size / 32)) a bit a token, or null
  const int64_t* eos_token_ids;      // (num_eos,)
  const int64_t* suppressed_tokens;  // (num_suppressed,)
  int64_t rows, vocab_size, num_eos, num_suppressed, min_len, count;
  float repetition_penalty;  // 1: off
  DType dtype;
  bool chained;     // the launch before on the stream is decode_layers, with a head
  void* workspace;  // top_candidates_workspace_bytes(args) bytes, as of select_token
  int64_t workspace_bytes;
};
constexpr int64_t kMaxCandidates = 64;  // of a row

// One step of beam search: of every batch row's candidates the `kept` best, of those the num_beams
// to go on with, and the num_beams best sequences that have ended. Row r is beam r % num_beams of
// batch row r / num_beams. Equal scores keep the order of the candidates; NaN is above all.
//
// No sequence is moved. tokens[r, g] is what row r got in step g, and key_rows, which says where
// the past of a row stands, tells whose tokens the row goes on from: before the step, column
// first + i, with first = lengths[r] - generated[r], holds the row that step i of r's sequence went
// on from, for i < generated[r]. The step puts those columns in the order of the running beams and
// writes column lengths[r].
//
// In a step that reaches `limit` all candidates end: the running beams stay as they are, and
// top_scores and top_parents say what could have gone on. Once a step has left the batch with
// nothing to do (an `outlook` whose bits, of all batch rows together, are not kBeamsGoOn), further
// calls change nothing.
struct BeamStepArgs {
  const float* scores;              // (batch, num_sources, per_beam), a beam's largest first
  const int32_t* candidate_tokens;  // as scores
  float* running_scores;            // (rows,)
  int32_t* generated;               // (rows,): how many steps there were, + 1; the same in all rows
  int64_t* tokens;                  // (rows, >= limit), rows tokens_stride apart
  int64_t tokens_stride;
  int64_t* input_ids;      // (rows,): the new token
  int64_t* position_ids;   // (rows,): + 1
  int32_t* lengths;        // (rows,): + 1
  int32_t* key_rows;       // (rows, capacity); lengths[r] < capacity
  uint32_t* seen;          // (rows, seen_words) a bit a token, moved with the beams and the new
                           // token's bit set; or null
  float* ended_scores;     // (rows,), as all `ended_...` and has_ended the best first
  int32_t* ended_tokens;   // (rows,) the last token
  int32_t* ended_lengths;  // (rows,) steps
  int32_t* ended_indices;  // (rows, max_steps): the row that each step went on from
  uint8_t* has_ended;      // (rows,) 0 or 1; what has not ended only fills the place
  uint8_t* improvable;     // (batch,) 0 or 1: a running beam may still beat an ended one
  uint8_t* outlook;        // (max_steps, batch): after each step
  float* top_scores;       // (batch, kept): the best candidates
  int32_t* top_parents;    // (batch, kept): the beams that they go on from
  const int32_t* limit;    // (1,) steps at most, <= max_steps
  // (2, max_steps): what the score of a sequence that ends in a step is divided by, and what a
  // running beam's is to tell whether it may still win.
  const float* length_penalties;
  const int64_t* eos_token_ids;  // (num_eos,)
  int64_t batch, num_beams, num_sources, per_beam, kept, capacity, max_steps, seen_words, num_eos;
  bool stop_when_full;  // a batch row with num_beams ended sequences takes no more
};
constexpr int64_t kMaxBeams = 32;

// One step of fairseq's beam search over hypotheses that stand in rows, num_beams a sentence: of a
// sentence's continuations the `kept` best, of those what ends, and what the rows go on with. Equal
// scores keep the order of the continuations; NaN counts as -inf. Row r stands for slot slots[r] of
// tokens and history_scores, sentence s for place places[s] of what ended; a sentence that is done
// stays as it is. lengths[r], the same in all rows of a sentence, is the number of the step: the
// position whose keys stand in the row's own slot. Of a row that goes on from another one, columns
// below that of key_rows come from there, and column lengths[r] gets the other's slot; the token
// and its score go to position lengths[r] + 1. Those of the num_beams best that are `eos` end,
// unless their place is that of an ignored row: they are filed, with the slot of each position,
// until there are num_beams of them, and then the sentence is done. Rows get the others in their
// order, behind them those that ended or were ignored, and are ignored in the next step.
struct HypothesisStepArgs {
  const float* scores;                // (rows, kept), each row largest first
  const int32_t* candidate_tokens;    // (rows, kept)
  float* running_scores;              // (rows,)
  uint8_t* ignored;                   // (rows,)
  const int32_t* places;              // (sentences,)
  const int32_t* slots;               // (rows,)
  int32_t* lengths;                   // (rows,)
  int64_t *input_ids, *position_ids;  // (rows,): the new token, and + 1
  int32_t* key_rows;                  // (rows, capacity)
  int64_t* tokens;                    // (slots, capacity)
  float* history_scores;              // (slots, capacity)
  int32_t* ended;                     // (places,) how many have
  uint8_t* is_done;                   // (places,)
  float* ended_scores;                // (places, num_beams)
  int32_t* ended_lengths;             // (places, num_beams) in tokens
  int32_t* ended_rows;                // (places, num_beams, capacity)
  int64_t sentences, num_beams, kept, capacity, eos;
  bool chained;  // the launch before on the stream is top_candidates
};
// Bits of `outlook`: a running beam may still win, one may go on, a place for one that ends is
// free. Only stop_when_full ever clears the last.
constexpr int kImprovable = 1, kContinuable = 2, kOpen = 4, kBeamsGoOn = 7;

// Where the real tokens of a padded batch stand without the padding between them. A token is real
// if its key is visible to any query. `summary` gets the number of real tokens, the length of the
// longest row, and 1 if the mask says more than which tokens are padding, else 0: an entry that
// neither shows nor hides its key, or a real query that sees other keys than its row's real ones.
// What the rest says is of use only where that is 0. Behind them `ticket` is written last, seen by
// the host only after them: `summary` may be pinned memory that the host looks at.
struct PackTokensArgs {
  AttentionMask mask;         // over (batch, num_heads, q_len, seq_len) keys; kNone: all are real
  int32_t* tokens;            // (capacity,) place in the padded batch of each real token, then -1
  int32_t* rows;              // (batch * seq_len,) the inverse: -1 at padding
  int64_t* cu_seqlens;        // (max_batch + 1,) where each row's tokens start; the end behind them
  int32_t* short_cu_seqlens;  // the same, as torch's attention takes it
  int64_t* summary;           // (4,)
  int64_t ticket;
  int32_t* scratch;  // (2 * batch,)
  int64_t batch, seq_len;
  int64_t num_heads, q_len;     // 1 where the mask is broadcast, else q_len = seq_len
  int64_t capacity, max_batch;  // capacity >= batch * seq_len
  DType dtype;                  // of a kAddElement mask
};

// out[r] = input[index[r]], zeros where the index is negative; rows of row_bytes bytes.
struct GatherRowsArgs {
  void* out;
  const void* input;
  const int32_t* index;  // (rows,)
  int64_t rows, row_bytes;
};

#define EET_DECLARE_OPS                                                                          \
  Status embedding(const EmbeddingArgs& args, const Context& context);                           \
  Status layernorm(const LayerNormArgs& args, const Context& context);                           \
  Status bias_residual_layernorm(const BiasResidualLayerNormArgs& args, const Context& context); \
  Status bias_activation(const BiasActivationArgs& args, const Context& context);                \
  Status linear(const LinearArgs& args, const Context& context);                                 \
  Status linear_tiles(const LinearTilesArgs& args, const Context& context);                      \
  Status attention(const AttentionArgs& args, const Context& context);                           \
  Status attention_block(const AttentionBlockArgs& args, const Context& context);                \
  Status ffn(const FfnArgs& args, const Context& context);                                       \
  Status step_attention(const StepAttentionArgs& args, const Context& context);                  \
  Status decode_layers(const DecodeLayersArgs& args, const Context& context);                    \
  Status pack_tokens(const PackTokensArgs& args, const Context& context);                        \
  Status gather_rows(const GatherRowsArgs& args, const Context& context);                        \
  int64_t attention_workspace_bytes(const AttentionArgs& args);                                  \
  int64_t attention_block_workspace_bytes(const AttentionBlockArgs& args);                       \
  int64_t ffn_workspace_bytes(const FfnArgs& args);                                              \
  int64_t decode_layers_workspace_bytes(const DecodeLayersArgs& args);

namespace cpu {
EET_DECLARE_OPS
const char* capability();  // "avx512", "avx2" or "portable": what the dispatch chose
                           // (EET_CPU_CAPABILITY lowers it)
}  // namespace cpu

namespace cuda {
EET_DECLARE_OPS
// On the CPU these are torch's (eet_patch/ops/selection.py, beam_selection.py, hypotheses.py).
Status select_token(const SelectTokenArgs& args, const Context& context);
Status top_candidates(const TopCandidatesArgs& args, const Context& context);
Status beam_step(const BeamStepArgs& args, const Context& context);
Status hypothesis_step(const HypothesisStepArgs& args, const Context& context);
int64_t select_token_workspace_bytes(const SelectTokenArgs& args);
int64_t top_candidates_workspace_bytes(const TopCandidatesArgs& args);
}  // namespace cuda

#undef EET_DECLARE_OPS

}  // namespace eet_patch
