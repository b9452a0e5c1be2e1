"""Beam search on the device: the best continuations of every beam.

As in eet_patch/ops/selection.py `launch_...` don't check, and the CPU runs torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eet_patch.ops._extension import extension, place
from eet_patch.ops.beam_state import MAX_CANDIDATES
from eet_patch.ops.checks import (
    check_buffer,
    check_contiguous,
    check_shape,
    check_tensor,
)
from eet_patch.ops.launch import address
from eet_patch.ops.registration import registered, returns_nothing
from eet_patch.ops.selection import check_logits, check_processors, count_of, runs_in_torch
from eet_patch.ops.torch_selection import torch_top_candidates


def top_candidates_workspace(logits: Tensor) -> Tensor:
    """What `top_candidates` needs for the rows of `logits`, or fewer, zeroed; it is kept so."""
    if runs_in_torch(logits):
        return torch.zeros(0, dtype=torch.uint8)
    size = extension().top_candidates_workspace_bytes(logits.shape[0])
    return torch.zeros(size, dtype=torch.uint8, device=logits.device)


def top_candidates(
    logits: Tensor,
    count: int,
    row_scores: Tensor | None = None,
    *,
    slots: Tensor | None = None,
    seen: Tensor | None = None,
    lengths: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    suppressed_tokens: Tensor | None = None,
    min_len: int = 0,
    repetition_penalty: float = 1.0,
    out: tuple[Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the best continuations of every beam: the largest `log_softmax(logits) + row_scores`.

    The repetition penalty, the suppressed tokens and min_len act on the log probabilities, before
    the row's score is added, as in transformers' beam search; they are those of `select_token`.

    Args:
        logits: (rows, vocab_size); float32, float16 or bfloat16; each row contiguous.
        count: how many of each row, in [1, min(64, vocab_size)].
        row_scores: (rows,), float32, contiguous. None: 0.
        slots: (rows,), int32, contiguous. Row r has slot `slots[r]` of `seen`, or r.
        seen, eos_token_ids, suppressed_tokens, min_len, repetition_penalty: as of `select_token`.
        lengths: (rows,), int32, contiguous: the position of the row's last token; required with
            min_len.
        out: scores and tokens to write to, as returned, contiguous. Default: new tensors.
        workspace: of `top_candidates_workspace`; one call at a time. None: a new one.
    Returns:
        scores (rows, count), float32, and tokens (rows, count), int32: largest score first, of
        equal ones the lowest token first, NaN above all.
    Raises:
        ValueError, TypeError: on a shape, dtype, device, layout or number other than these.
    Source: the step of beam search (Graves 2012, arXiv:1211.3711).
    """
    rows, vocab_size = check_logits(logits)
    _check_count(count, vocab_size)
    if out is None:
        out = (
            logits.new_empty(rows, count, dtype=torch.float32),
            logits.new_empty(rows, count, dtype=torch.int32),
        )
    else:
        check_tensor(out[0], "out[0]")
        check_shape(out[0], (rows, count), "out[0]")
    _top_candidates(
        logits,
        *out,
        row_scores=row_scores,
        slots=slots,
        seen=seen,
        lengths=lengths,
        eos_token_ids=eos_token_ids,
        suppressed_tokens=suppressed_tokens,
        min_len=min_len,
        repetition_penalty=repetition_penalty,
        workspace=workspace,
    )
    return out


@registered(
    returns_nothing, mutates=("scores_out", "tokens_out", "workspace"), name="top_candidates"
)
def _top_candidates(
    logits: Tensor,
    scores_out: Tensor,
    tokens_out: Tensor,
    *,
    row_scores: Tensor | None = None,
    slots: Tensor | None = None,
    seen: Tensor | None = None,
    lengths: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    suppressed_tokens: Tensor | None = None,
    min_len: int = 0,
    repetition_penalty: float = 1.0,
    workspace: Tensor | None = None,
) -> None:
    rows, vocab_size = check_logits(logits)
    check_tensor(scores_out, "out[0]")
    count = scores_out.shape[1] if scores_out.dim() == 2 else 0
    _check_count(count, vocab_size)
    check_buffer(scores_out, (torch.float32,), logits, "out[0]", (rows, count))
    check_buffer(tokens_out, (torch.int32,), logits, "out[1]", (rows, count))
    if row_scores is not None:
        check_buffer(row_scores, (torch.float32,), logits, "row_scores", (rows,))
    if lengths is not None:
        check_buffer(lengths, (torch.int32,), logits, "lengths", (rows,))
    elif min_len > 0:
        raise ValueError("lengths must be given with min_len, got None")
    if min_len < 0:
        raise ValueError(f"min_len must be at least 0, got {min_len}")
    num_slots = rows if seen is None or seen.dim() == 0 else seen.shape[0]
    if slots is None and num_slots < rows:
        raise ValueError(f"seen must have at least {rows} rows, got {num_slots}")
    check_processors(
        logits, num_slots, slots, seen, eos_token_ids, suppressed_tokens, repetition_penalty
    )
    if workspace is None:
        workspace = top_candidates_workspace(logits)
    else:
        check_buffer(workspace, (torch.uint8,), logits, "workspace")
        check_contiguous(workspace, "workspace")
    launch_top_candidates(
        logits,
        scores_out,
        tokens_out,
        workspace,
        row_scores=row_scores,
        slots=slots,
        seen=seen,
        lengths=lengths,
        eos_token_ids=eos_token_ids,
        suppressed_tokens=suppressed_tokens,
        min_len=min_len,
        repetition_penalty=repetition_penalty,
    )


def _check_count(count: int, vocab_size: int) -> None:
    if not 1 <= count <= min(MAX_CANDIDATES, vocab_size):
        raise ValueError(f"count must be in [1, {min(MAX_CANDIDATES, vocab_size)}], got {count}")


def launch_top_candidates(
    logits: Tensor,
    scores_out: Tensor,
    tokens_out: Tensor,
    workspace: Tensor,
    *,
    row_scores: Tensor | None = None,
    slots: Tensor | None = None,
    seen: Tensor | None = None,
    lengths: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    suppressed_tokens: Tensor | None = None,
    min_len: int = 0,
    repetition_penalty: float = 1.0,
    chained: bool = False,
) -> None:
    """`top_candidates` without its checks, into (rows, count) buffers. On CUDA it allocates nothing
    and may be captured. `chained`: the launch before on the stream is `decode_layers` with a head.
    """
    rows, count = scores_out.shape
    if runs_in_torch(logits):
        scores, tokens = torch_top_candidates(
            logits,
            count,
            row_scores,
            slots=slots,
            seen=seen,
            lengths=lengths,
            eos_token_ids=eos_token_ids,
            suppressed_tokens=suppressed_tokens,
            min_len=min_len,
            repetition_penalty=repetition_penalty,
        )
        scores_out.copy_(scores)
        tokens_out.copy_(tokens)
        return
    extension().top_candidates(
        scores_out.data_ptr(),
        tokens_out.data_ptr(),
        logits.data_ptr(),
        logits.stride(0),
        address(row_scores),
        address(slots),
        address(lengths),
        address(seen),
        address(eos_token_ids),
        address(suppressed_tokens),
        rows,
        logits.shape[1],
        count_of(eos_token_ids),
        count_of(suppressed_tokens),
        min_len,
        count,
        repetition_penalty,
        chained,
        workspace.data_ptr(),
        workspace.numel(),
        *place(logits),
    )
