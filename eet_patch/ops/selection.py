"""The choice of tokens: the next token of every row, and the best continuations of every beam.

The public functions check their arguments; `launch_...` do not, and are what a generation loop
calls on buffers that it has made once. On the CPU, where a step's time is elsewhere, both run the
`torch_...` of eet_patch/ops/torch_selection.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eet_patch.ops._extension import extension, place
from eet_patch.ops.checks import (
    check_contiguous,
    check_dim,
    check_operand,
    check_shape,
    check_tensor,
)
from eet_patch.ops.launch import address
from eet_patch.ops.torch_selection import WORD_BITS, torch_select_token, torch_top_candidates

MAX_CANDIDATES = 64  # kMaxCandidates of csrc/ops.h


def runs_in_torch(logits: Tensor) -> bool:
    """Whether these logits take no kernel of ours."""
    return logits.device.type == "cpu"


def seen_tokens(token_ids: Tensor, vocab_size: int) -> Tensor:
    """The set of tokens of every row as bits, for `seen` of the ops below.

    Args:
        token_ids: (num_slots, seq_len), int64, each in [0, vocab_size).
        vocab_size: how many tokens there are.
    Returns:
        (num_slots, ceil(vocab_size / 32)), int32: token t is bit t % 32 of word t // 32.
    """
    num_slots = token_ids.shape[0]
    num_words = -(-vocab_size // WORD_BITS)
    seen = torch.zeros(num_slots, num_words * WORD_BITS, dtype=torch.int64, device=token_ids.device)
    seen.scatter_(1, token_ids, 1)
    bits = torch.arange(WORD_BITS, device=token_ids.device)
    words = (seen.view(num_slots, num_words, WORD_BITS) << bits).sum(-1)
    return words.to(torch.int32)


def select_token_workspace(logits: Tensor, samples: bool = True) -> Tensor:
    """What `select_token` needs for the rows of `logits`, or fewer, zeroed; the op keeps it so.

    Args:
        logits: as of `select_token`; only its rows and its device count.
        samples: whether it is for calls with noise too. Without, it is smaller.
    Returns:
        uint8; empty on the CPU.
    """
    if runs_in_torch(logits):
        return torch.zeros(0, dtype=torch.uint8)
    size = extension().select_token_workspace_bytes(logits.shape[0], samples)
    return torch.zeros(size, dtype=torch.uint8, device=logits.device)


def top_candidates_workspace(logits: Tensor) -> Tensor:
    """What `top_candidates` needs for the rows of `logits`, or fewer, zeroed; it is kept so."""
    if runs_in_torch(logits):
        return torch.zeros(0, dtype=torch.uint8)
    size = extension().top_candidates_workspace_bytes(logits.shape[0])
    return torch.zeros(size, dtype=torch.uint8, device=logits.device)


def select_token(
    logits: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Tensor,
    finished: Tensor,
    unfinished_count: Tensor,
    *,
    slots: Tensor | None = None,
    seen: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    suppressed_tokens: Tensor | None = None,
    noise: Tensor | None = None,
    pad_token_id: int = 0,
    min_len: int = 0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    workspace: Tensor | None = None,
) -> None:
    """Choose the next token of every row from its logits, and write it where the next step reads.

    Scores are the logits in float32, then in this order, each where it is on: repetition penalty
    (`score * p` below 0, `score / p` else, for the tokens in `seen`); -inf for suppressed tokens,
    and for eos tokens while `lengths[r] + 1 < min_len`; division by the temperature. Without noise
    the token is the largest score's, the lowest of equal ones, with NaN above all. With noise it
    is the largest `softmax(scores) / noise` over what these leave: `top_k`, where ties of the k-th
    stay; `top_p`, which adds probabilities from the least on and removes while the sum is at most
    `1 - top_p`, of equal ones the lower token first; `min_p`, which removes what is below min_p
    times the largest probability. A row whose largest score is not finite has no distribution and
    gets the token that it would get without noise.

    Row r stands for slot `slots[r]` of tokens, finished, seen and noise. Its token goes to
    `tokens[slot, lengths[r] + 1]` and `input_ids[r]`; `position_ids[r]` and `lengths[r]` go up by
    one; its bit of `seen` is set; with one of `eos_token_ids` it is finished and
    `unfinished_count` goes down. A row that was finished gets `pad_token_id`; its bits and the
    count stay.

    Args:
        logits: (rows, vocab_size); float32, float16 or bfloat16; each row contiguous.
        tokens: (num_slots, capacity), int64, each row contiguous; every length is below
            capacity - 1, which is not checked.
        input_ids, position_ids: (rows,), int64, contiguous.
        lengths: (rows,), int32, contiguous: the position of the row's last token.
        finished: (num_slots,), bool or uint8, contiguous.
        unfinished_count: (1,), int32.
        slots: (rows,), int32, contiguous: no slot twice. None: row r has slot r.
        seen: (num_slots, ceil(vocab_size / 32)), int32, contiguous, as of `seen_tokens`. None with
            repetition_penalty 1 only.
        eos_token_ids, suppressed_tokens: (any,), int64, contiguous. None: none. Ids outside the
            vocabulary are ignored.
        noise: (num_slots, vocab_size), float32, contiguous, > 0. Drawn by `exponential_` it makes
            the choice that of `torch.multinomial(probs, 1)`. None: greedy.
        pad_token_id: what finished rows get, >= 0.
        min_len: length of the sequence, tokens of the prompt counted, before which eos is
            suppressed.
        top_k: how many tokens stay; 0: all.
        repetition_penalty, temperature: > 0; 1: off.
        top_p: in [0, 1]; 1: off.
        min_p: in [0, 1]; 0: off.
        workspace: of `select_token_workspace`; one call at a time. None: a new one.
    Raises:
        ValueError, TypeError: on a shape, dtype, device, layout or number other than these.
    Source: the processors of transformers' `generate`: Keskar et al. 2019, arXiv:1909.05858
        (repetition penalty); Fan et al. 2018, arXiv:1805.04833 (top_k); Holtzman et al. 2019,
        arXiv:1904.09751 (top_p); Nguyen et al. 2024, arXiv:2407.01082 (min_p).
    """
    rows, vocab_size = _check_logits(logits)
    _check_buffer(tokens, (torch.int64,), logits, "tokens")
    check_dim(tokens, 2, "tokens")
    _check_rows_contiguous(tokens, "tokens")
    num_slots = tokens.shape[0]
    if slots is None and num_slots < rows:
        raise ValueError(f"tokens must have at least {rows} rows, got shape {tuple(tokens.shape)}")
    for state, dtypes, shape, name in (
        (input_ids, (torch.int64,), (rows,), "input_ids"),
        (position_ids, (torch.int64,), (rows,), "position_ids"),
        (lengths, (torch.int32,), (rows,), "lengths"),
        (finished, (torch.bool, torch.uint8), (num_slots,), "finished"),
        (unfinished_count, (torch.int32,), (1,), "unfinished_count"),
    ):
        _check_buffer(state, dtypes, logits, name, shape)
    if noise is not None:
        _check_buffer(noise, (torch.float32,), logits, "noise", (num_slots, vocab_size))
    _check_processors(
        logits, num_slots, slots, seen, eos_token_ids, suppressed_tokens, repetition_penalty
    )
    for value, least, name in (
        (pad_token_id, 0, "pad_token_id"),
        (min_len, 0, "min_len"),
        (top_k, 0, "top_k"),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    _check_positive(temperature, "temperature")
    for number, name in ((top_p, "top_p"), (min_p, "min_p")):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
    if workspace is None:
        workspace = select_token_workspace(logits, noise is not None)
    else:
        _check_buffer(workspace, (torch.uint8,), logits, "workspace")
        check_contiguous(workspace, "workspace")
    launch_select_token(
        logits,
        tokens,
        input_ids,
        position_ids,
        lengths,
        finished,
        unfinished_count,
        workspace,
        slots=slots,
        seen=seen,
        eos_token_ids=eos_token_ids,
        suppressed_tokens=suppressed_tokens,
        noise=noise,
        pad_token_id=pad_token_id,
        min_len=min_len,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
    )


def launch_select_token(
    logits: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Tensor,
    finished: Tensor,
    unfinished_count: Tensor,
    workspace: Tensor,
    *,
    slots: Tensor | None = None,
    seen: Tensor | None = None,
    eos_token_ids: Tensor | None = None,
    suppressed_tokens: Tensor | None = None,
    noise: Tensor | None = None,
    pad_token_id: int = 0,
    min_len: int = 0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> None:
    """`select_token` without its checks. On CUDA it allocates nothing and may be captured."""
    if runs_in_torch(logits):
        torch_select_token(
            logits,
            tokens,
            input_ids,
            position_ids,
            lengths,
            finished,
            unfinished_count,
            slots=slots,
            seen=seen,
            eos_token_ids=eos_token_ids,
            suppressed_tokens=suppressed_tokens,
            noise=noise,
            pad_token_id=pad_token_id,
            min_len=min_len,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
        )
        return
    rows, vocab_size = logits.shape
    extension().select_token(
        logits.data_ptr(),
        logits.stride(0),
        address(slots),
        tokens.data_ptr(),
        tokens.stride(0),
        input_ids.data_ptr(),
        position_ids.data_ptr(),
        lengths.data_ptr(),
        finished.data_ptr(),
        unfinished_count.data_ptr(),
        address(seen),
        address(eos_token_ids),
        address(suppressed_tokens),
        address(noise),
        rows,
        vocab_size,
        _count(eos_token_ids),
        _count(suppressed_tokens),
        pad_token_id,
        min_len,
        top_k,
        repetition_penalty,
        temperature,
        top_p,
        min_p,
        workspace.data_ptr(),
        workspace.numel(),
        *place(logits),
    )


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
    rows, vocab_size = _check_logits(logits)
    if not 1 <= count <= min(MAX_CANDIDATES, vocab_size):
        raise ValueError(f"count must be in [1, {min(MAX_CANDIDATES, vocab_size)}], got {count}")
    if row_scores is not None:
        _check_buffer(row_scores, (torch.float32,), logits, "row_scores", (rows,))
    if lengths is not None:
        _check_buffer(lengths, (torch.int32,), logits, "lengths", (rows,))
    elif min_len > 0:
        raise ValueError("lengths must be given with min_len, got None")
    if min_len < 0:
        raise ValueError(f"min_len must be at least 0, got {min_len}")
    num_slots = rows if seen is None or seen.dim() == 0 else seen.shape[0]
    if slots is None and num_slots < rows:
        raise ValueError(f"seen must have at least {rows} rows, got {num_slots}")
    _check_processors(
        logits, num_slots, slots, seen, eos_token_ids, suppressed_tokens, repetition_penalty
    )
    if out is None:
        out = (
            logits.new_empty(rows, count, dtype=torch.float32),
            logits.new_empty(rows, count, dtype=torch.int32),
        )
    else:
        _check_buffer(out[0], (torch.float32,), logits, "out[0]", (rows, count))
        _check_buffer(out[1], (torch.int32,), logits, "out[1]", (rows, count))
    if workspace is None:
        workspace = top_candidates_workspace(logits)
    else:
        _check_buffer(workspace, (torch.uint8,), logits, "workspace")
        check_contiguous(workspace, "workspace")
    launch_top_candidates(
        logits,
        *out,
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
    return out


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
) -> None:
    """`top_candidates` without its checks, into (rows, count) buffers. On CUDA it allocates nothing
    and may be captured.
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
        _count(eos_token_ids),
        _count(suppressed_tokens),
        min_len,
        count,
        repetition_penalty,
        workspace.data_ptr(),
        workspace.numel(),
        *place(logits),
    )


def _count(ids: Tensor | None) -> int:
    return 0 if ids is None else ids.numel()


def _check_logits(logits: Tensor) -> tuple[int, int]:
    check_operand(logits, "logits")
    check_dim(logits, 2, "logits")
    if logits.shape[1] == 0:
        raise ValueError(
            f"logits must have a vocabulary of at least 1, got shape {tuple(logits.shape)}"
        )
    _check_rows_contiguous(logits, "logits")
    return logits.shape[0], logits.shape[1]


def _check_rows_contiguous(tensor: Tensor, name: str) -> None:
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {tuple(tensor.stride())}")


def _check_buffer(
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    like: Tensor,
    name: str,
    shape: tuple[int, ...] | None = None,
) -> None:
    check_tensor(tensor, name)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {wanted}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    if shape is not None:
        check_shape(tensor, shape, name)
        check_contiguous(tensor, name)


def _check_positive(number: float, name: str) -> None:
    if not number > 0:
        raise ValueError(f"{name} must be above 0, got {number}")


def _check_processors(
    logits: Tensor,
    num_slots: int,
    slots: Tensor | None,
    seen: Tensor | None,
    eos_token_ids: Tensor | None,
    suppressed_tokens: Tensor | None,
    repetition_penalty: float,
) -> None:
    rows, vocab_size = logits.shape
    if slots is not None:
        _check_buffer(slots, (torch.int32,), logits, "slots", (rows,))
    if seen is not None:
        num_words = -(-vocab_size // WORD_BITS)
        _check_buffer(seen, (torch.int32,), logits, "seen", (num_slots, num_words))
    elif repetition_penalty != 1:
        raise ValueError("seen must be given with repetition_penalty, got None")
    for ids, name in (
        (eos_token_ids, "eos_token_ids"),
        (suppressed_tokens, "suppressed_tokens"),
    ):
        if ids is not None:
            _check_buffer(ids, (torch.int64,), logits, name)
            check_dim(ids, 1, name)
            check_contiguous(ids, name)
    _check_positive(repetition_penalty, "repetition_penalty")
