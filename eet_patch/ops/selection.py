"""The choice of the next token of every row.

The public functions check their arguments; `launch_...` do not, and are what a generation loop
calls on buffers that it has made once. On the CPU, where a step's time is elsewhere, both run the
`torch_...` of eet_patch/ops/torch_selection.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eet_patch.ops._extension import extension, place
from eet_patch.ops.checks import (
    check_buffer,
    check_contiguous,
    check_dim,
    check_operand,
    check_positive,
    check_rows_contiguous,
    check_tensor,
)
from eet_patch.ops.launch import address
from eet_patch.ops.registration import registered, returns_nothing
from eet_patch.ops.torch_selection import WORD_BITS, torch_select_token


def runs_in_torch(logits: Tensor) -> bool:
    """Whether these logits take no kernel of ours."""
    return logits.device.type == "cpu"


def _fake_seen_tokens(token_ids: Tensor, vocab_size: int) -> Tensor:
    return token_ids.new_empty(token_ids.shape[0], -(-vocab_size // WORD_BITS), dtype=torch.int32)


@registered(_fake_seen_tokens)
def seen_tokens(token_ids: Tensor, vocab_size: int) -> Tensor:
    """The set of tokens of every row as bits, for `seen` of the ops below.

    Args:
        token_ids: (num_slots, seq_len), int64, each in [0, vocab_size).
        vocab_size: how many tokens there are.
    Returns:
        (num_slots, ceil(vocab_size / 32)), int32: token t is bit t % 32 of word t // 32.
    Raises:
        ValueError, TypeError: on a shape or dtype other than these.
        RuntimeError: an id outside the vocabulary (torch's scatter; on CUDA a device assertion).
    """
    check_tensor(token_ids, "token_ids")
    check_dim(token_ids, 2, "token_ids")
    if token_ids.dtype != torch.int64:
        raise TypeError(f"token_ids must be int64, got {token_ids.dtype}")
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


@registered(
    returns_nothing,
    mutates=(
        *("tokens", "input_ids", "position_ids", "lengths", "finished", "unfinished_count"),
        *("seen", "workspace"),
    ),
)
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
    rows, vocab_size = check_logits(logits)
    check_buffer(tokens, (torch.int64,), logits, "tokens")
    check_dim(tokens, 2, "tokens")
    check_rows_contiguous(tokens, "tokens")
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
        check_buffer(state, dtypes, logits, name, shape)
    if noise is not None:
        check_buffer(noise, (torch.float32,), logits, "noise", (num_slots, vocab_size))
    check_processors(
        logits, num_slots, slots, seen, eos_token_ids, suppressed_tokens, repetition_penalty
    )
    for value, least, name in (
        (pad_token_id, 0, "pad_token_id"),
        (min_len, 0, "min_len"),
        (top_k, 0, "top_k"),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    check_positive(temperature, "temperature")
    for number, name in ((top_p, "top_p"), (min_p, "min_p")):
        if not 0 <= number <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {number}")
    if workspace is None:
        workspace = select_token_workspace(logits, noise is not None)
    else:
        check_buffer(workspace, (torch.uint8,), logits, "workspace")
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
    chained: bool = False,
) -> None:
    """`select_token` without its checks. On CUDA it allocates nothing and may be captured.
    `chained`: the launch before on the stream is `launch_decode_layers`, with a head.
    """
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
        count_of(eos_token_ids),
        count_of(suppressed_tokens),
        pad_token_id,
        min_len,
        top_k,
        repetition_penalty,
        temperature,
        top_p,
        min_p,
        chained,
        workspace.data_ptr(),
        workspace.numel(),
        *place(logits),
    )


def count_of(ids: Tensor | None) -> int:
    return 0 if ids is None else ids.numel()


def check_logits(logits: Tensor) -> tuple[int, int]:
    check_operand(logits, "logits")
    check_dim(logits, 2, "logits")
    if logits.shape[1] == 0:
        raise ValueError(
            f"logits must have a vocabulary of at least 1, got shape {tuple(logits.shape)}"
        )
    check_rows_contiguous(logits, "logits")
    return logits.shape[0], logits.shape[1]


def check_processors(
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
        check_buffer(slots, (torch.int32,), logits, "slots", (rows,))
    if seen is not None:
        num_words = -(-vocab_size // WORD_BITS)
        check_buffer(seen, (torch.int32,), logits, "seen", (num_slots, num_words))
    elif repetition_penalty != 1:
        raise ValueError("seen must be given with repetition_penalty, got None")
    for ids, name in (
        (eos_token_ids, "eos_token_ids"),
        (suppressed_tokens, "suppressed_tokens"),
    ):
        if ids is not None:
            check_buffer(ids, (torch.int64,), logits, name)
            check_dim(ids, 1, name)
            check_contiguous(ids, name)
    check_positive(repetition_penalty, "repetition_penalty")
