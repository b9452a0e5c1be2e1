"""What beam search does with the best continuations of every beam, in one launch.

As in eet_patch/ops/selection.py `launch_...` doesn't check, and the CPU runs torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eet_patch.ops._extension import extension, place
from eet_patch.ops.beam_state import MAX_CANDIDATES, BeamState
from eet_patch.ops.checks import (
    check_buffer,
    check_contiguous,
    check_dim,
    check_rows_contiguous,
    check_tensor,
)
from eet_patch.ops.launch import address
from eet_patch.ops.registration import registered, returns_nothing
from eet_patch.ops.selection import count_of, runs_in_torch
from eet_patch.ops.torch_selection import torch_beam_step


def beam_step(
    state: BeamState,
    scores: Tensor,
    candidate_tokens: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Tensor,
    key_rows: Tensor,
    *,
    seen: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    stop_when_full: bool = False,
) -> None:
    """Choose, from the best continuations of every beam, the beams to go on with and the best
    sequences that have ended, and write what the next step reads.

    The `kept` best of a batch row are looked at, equal ones in the order given and NaN above all.
    Those whose token is in eos_token_ids end, in the step that reaches the limit all do. The
    num_beams best of the others run on (those that end, at 1e9 less, where there are too few).
    The num_beams best, where they end, compete with the ended sequences by their score over the
    length penalty.

    The keys and values of a running beam are where key_rows says. With g = generated[r] before the
    step, columns lengths[r] - g to lengths[r] - 1 of key_rows are put in the order of the running
    beams, and column lengths[r] says which row each goes on from. Its token goes to `tokens[r, g]`
    and `input_ids[r]`; lengths and position_ids go up by one. In the step that reaches the limit
    running beams stay as they are. After a step that ended the search, further ones do nothing.

    Args:
        state: of `beam_state`, for `rows` rows; begun by `begin_beams`.
        scores: (batch, per_beam) in the first step, where all beams of a batch row are still the
            same, else (rows, per_beam); float32, contiguous, each row largest first.
        candidate_tokens: as scores, int32.
        tokens: (rows, >= limit), int64, each row contiguous.
        input_ids, position_ids: (rows,), int64, contiguous.
        lengths: (rows,), int32, contiguous: where the step's keys were written; the same in all
            rows, in [generated, capacity), which is not checked.
        key_rows: (rows, capacity), int32, contiguous, as of `decode_layers`.
        seen: (rows, words), int32, contiguous, as of `seen_tokens`: goes with the beams, and gets
            the new token's bit. None: is not kept.
        eos_token_ids: (any,), int64, contiguous. None: none.
        stop_when_full: transformers' early_stopping=True: a batch row with num_beams ended
            sequences takes no more.
    Raises:
        ValueError, TypeError: on a shape, dtype, device, layout or number other than these.
    Source: Graves 2012, arXiv:1211.3711; the order of things is that of transformers'
        `_beam_search`, 4.56 to 5.23.
    """
    _beam_step(
        scores,
        candidate_tokens,
        tokens,
        input_ids,
        position_ids,
        lengths,
        key_rows,
        *state,
        seen=seen,
        eos_token_ids=eos_token_ids,
        stop_when_full=stop_when_full,
    )


@registered(
    returns_nothing,
    mutates=(
        *("tokens", "input_ids", "position_ids", "lengths", "key_rows", "seen"),
        *(name for name in BeamState._fields if name not in ("limit", "length_penalties")),
    ),
    name="beam_step",
)
def _beam_step(
    scores: Tensor,
    candidate_tokens: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Tensor,
    key_rows: Tensor,
    running_scores: Tensor,
    generated: Tensor,
    ended_scores: Tensor,
    ended_tokens: Tensor,
    ended_lengths: Tensor,
    ended_indices: Tensor,
    has_ended: Tensor,
    improvable: Tensor,
    outlook: Tensor,
    top_scores: Tensor,
    top_parents: Tensor,
    limit: Tensor,
    length_penalties: Tensor,
    *,
    seen: Tensor | None,
    eos_token_ids: Tensor | None,
    stop_when_full: bool,
) -> None:
    state = BeamState(
        running_scores,
        generated,
        ended_scores,
        ended_tokens,
        ended_lengths,
        ended_indices,
        has_ended,
        improvable,
        outlook,
        top_scores,
        top_parents,
        limit,
        length_penalties,
    )
    check_tensor(scores, "scores")
    check_dim(scores, 2, "scores")
    batch, num_beams = state.running_scores.shape
    rows, (sources, per_beam) = batch * num_beams, scores.shape
    kept = state.top_scores.shape[1]
    if sources not in (batch, rows):
        raise ValueError(
            f"scores must have {batch} or {rows} rows, got shape {tuple(scores.shape)}"
        )
    if per_beam > MAX_CANDIDATES or (batch and sources // batch * per_beam < kept):
        raise ValueError(
            f"scores must hold {kept} candidates of a batch row and at most {MAX_CANDIDATES} of a "
            f"beam, got shape {tuple(scores.shape)}"
        )
    capacity = key_rows.shape[1] if key_rows.dim() == 2 else 0
    like = state.running_scores
    for tensor, dtype, shape, name in (
        (scores, torch.float32, scores.shape, "scores"),
        (candidate_tokens, torch.int32, scores.shape, "candidate_tokens"),
        (input_ids, torch.int64, (rows,), "input_ids"),
        (position_ids, torch.int64, (rows,), "position_ids"),
        (lengths, torch.int32, (rows,), "lengths"),
        (key_rows, torch.int32, (rows, capacity), "key_rows"),
    ):
        check_buffer(tensor, (dtype,), like, name, shape)
    check_buffer(tokens, (torch.int64,), like, "tokens")
    check_dim(tokens, 2, "tokens")
    check_rows_contiguous(tokens, "tokens")
    if tokens.shape[0] != rows:
        raise ValueError(f"tokens must have {rows} rows, got shape {tuple(tokens.shape)}")
    if seen is not None:
        words = seen.shape[1] if seen.dim() == 2 else 0
        check_buffer(seen, (torch.int32,), like, "seen", (rows, words))
    if eos_token_ids is not None:
        check_buffer(eos_token_ids, (torch.int64,), like, "eos_token_ids")
        check_dim(eos_token_ids, 1, "eos_token_ids")
        check_contiguous(eos_token_ids, "eos_token_ids")
    launch_beam_step(
        state,
        scores,
        candidate_tokens,
        tokens,
        input_ids,
        position_ids,
        lengths,
        key_rows,
        seen=seen,
        eos_token_ids=eos_token_ids,
        stop_when_full=stop_when_full,
    )


def launch_beam_step(
    state: BeamState,
    scores: Tensor,
    candidate_tokens: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Tensor,
    key_rows: Tensor,
    *,
    seen: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    stop_when_full: bool = False,
) -> None:
    """`beam_step` without its checks. On CUDA it allocates nothing and may be captured."""
    batch, num_beams = state.running_scores.shape
    if runs_in_torch(scores):
        torch_beam_step(
            state,
            scores,
            candidate_tokens,
            tokens,
            input_ids,
            position_ids,
            lengths,
            key_rows,
            seen,
            eos_token_ids,
            stop_when_full,
        )
        return
    sources, per_beam = scores.shape
    extension().beam_step(
        scores.data_ptr(),
        candidate_tokens.data_ptr(),
        state.running_scores.data_ptr(),
        state.generated.data_ptr(),
        tokens.data_ptr(),
        tokens.stride(0),
        input_ids.data_ptr(),
        position_ids.data_ptr(),
        lengths.data_ptr(),
        key_rows.data_ptr(),
        address(seen),
        state.ended_scores.data_ptr(),
        state.ended_tokens.data_ptr(),
        state.ended_lengths.data_ptr(),
        state.ended_indices.data_ptr(),
        state.has_ended.data_ptr(),
        state.improvable.data_ptr(),
        state.outlook.data_ptr(),
        state.top_scores.data_ptr(),
        state.top_parents.data_ptr(),
        state.limit.data_ptr(),
        state.length_penalties.data_ptr(),
        address(eos_token_ids),
        batch,
        num_beams,
        sources // batch if batch else 1,
        per_beam,
        state.top_scores.shape[1],
        key_rows.shape[1],
        state.outlook.shape[0],
        0 if seen is None else seen.shape[1],
        count_of(eos_token_ids),
        stop_when_full,
        *place(scores)[1:],
    )
