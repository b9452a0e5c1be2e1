"""The loop over new tokens on top of a `DecodeStep`: greedy search and sampling.

Tokens stay on the device. The host queues steps ahead and looks at what came of them one chunk
later, so that it never waits for the step that runs; steps queued after the last row had ended are
taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eet_patch.generation.step import DecoderModel, DecodeStep, Selection

CHUNK = 8  # steps between two looks at the tokens
# Batches that graphs are captured for as rows end; a few ended rows more cost less than a graph
# for every number.
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ROW_COUNTS = sorted({*BATCH_SIZES, 5, 7, 10, 14, 20, 28, 40, 56})  # where a row is a sequence


class _Look(NamedTuple):
    """What the tokens were after `steps` steps, on its way to the host."""

    steps: int
    finished: Tensor
    tokens: Tensor | None
    arrived: Any

    def wait(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()


def to_host(source: Tensor) -> Tensor:
    """A copy on the host, which an event after it makes safe to read."""
    if source.device.type == "cpu":
        return source.clone()
    target = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return target.copy_(source, non_blocking=True)


def recorded(device: torch.device) -> Any:
    """An event behind all that is queued, or None where nothing is."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _look(step: DecodeStep, steps: int, columns: tuple[int, int] | None) -> _Look:
    """Copies of `finished`, and of the columns of `tokens` that a streamer has not had yet."""
    finished = to_host(step.finished)
    tokens = None if columns is None else to_host(step.tokens[:, columns[0] : columns[1]])
    return _Look(steps, finished, tokens, recorded(step.device))


def decode_on_device(
    step: DecodeStep,
    model: DecoderModel,
    choice: Selection,
    kv_len: int,
    steps: int,
    already_finished: Tensor | None,
    may_shrink: bool,
    put: Callable[[Tensor], None] | None,
    make_room: Callable[[int], None],
) -> Tensor:
    """Up to `steps` new tokens of every row, begun by `step.begin`; fewer if all rows end before.

    Args:
        kv_len: keys that were there when the loop began.
        already_finished: (batch_size,) bool, rows that had ended by then, or None: none had.
        may_shrink: rows that ended may be dropped; their keys and values are then not continued.
        put: gets the tokens (batch_size,) of every step, on the host and in order.
        make_room: (tokens) lets the step grow if it is too small for so many.
    Returns:
        (batch_size, new tokens) int64, a view of the step's buffer.
    """
    can_end = bool(choice.eos_token_ids)
    on_gpu = step.device.type == "cuda"
    drops = can_end and may_shrink and step.batch_size > 1
    chunk = CHUNK if on_gpu else 1
    generator_before = _generator_state(step.device) if choice.sample and on_gpu else None
    generator_step = 0
    if already_finished is not None:
        step.finished.copy_(already_finished)
        step.unfinished_count.sub_(already_finished.sum())
    slots = list(range(step.batch_size))  # of the rows that are under way
    queued, streamed = 0, 0
    hidden: set[int] = set()  # slots whose past nothing reads any more
    looks: list[_Look] = []
    ended = False

    def take(look: _Look) -> None:
        nonlocal slots, streamed, ended
        look.wait()
        finished = look.finished.tolist()
        ended = can_end and all(finished)
        if put is not None and look.tokens is not None:
            last = _steps_used(look.tokens, choice, streamed, look.steps, finished_at_put)
            for column in range(last):
                put(look.tokens[:, column].clone())
            streamed = look.steps
        if ended or not drops:
            return
        alive = [row for row, slot in enumerate(slots) if not finished[slot]]
        size = next((s for s in ROW_COUNTS if s >= len(alive)), len(alive))
        if alive and size < len(slots):
            kept = set(alive)
            filler = [row for row in range(len(slots)) if row not in kept][: size - len(alive)]
            rows = sorted(alive + filler)
            step.keep_rows(rows)
            slots = [slots[row] for row in rows]
        over = [row for row, slot in enumerate(slots) if finished[slot] and slot not in hidden]
        if over:  # they stay for the size of the batch alone
            step.hide_past(over)
            hidden.update(slots[row] for row in over)

    finished_at_put = [False] * step.batch_size
    if already_finished is not None:
        finished_at_put = already_finished.tolist()
    while queued < steps and not ended:
        more = min(chunk, steps - queued)
        make_room(kv_len + queued + more)
        if generator_before is not None and queued == 0:
            step.run(model, len(slots), choice)
            generator_step = _offset(_generator_state(step.device)) - _offset(generator_before)
            queued, more = 1, more - 1
        step.run(model, len(slots), choice, steps=more)
        queued += more
        if can_end or put is not None:
            first = looks[-1].steps if looks else streamed
            columns = (kv_len + 1 + first, kv_len + 1 + queued) if put is not None else None
            looks.append(_look(step, queued, columns))
            if len(looks) > (1 if on_gpu else 0):
                take(looks.pop(0))
    while looks and not ended:
        take(looks.pop(0))
    tokens = step.tokens[:, kv_len + 1 : kv_len + 1 + queued]
    if not can_end:
        return tokens
    started = already_finished if already_finished is not None else torch.zeros(0)
    used = _last_used(tokens, choice, started)
    if generator_before is not None and used < queued:
        _set_offset(step.device, generator_before, used * generator_step)
    return tokens[:, :used]


def _last_used(tokens: Tensor, choice: Selection, already_finished: Tensor) -> int:
    """How many steps passed before every row had ended."""
    ends = torch.isin(tokens, torch.tensor(choice.eos_token_ids, device=tokens.device))
    steps = tokens.shape[1]
    first = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, steps)
    if already_finished.numel():
        first = first.masked_fill(already_finished, 0)
    return int(first.max())


def _steps_used(
    tokens: Tensor, choice: Selection, begun: int, end: int, finished: list[bool]
) -> int:
    """How many of the columns came before the last row's end; `finished` is brought up to date."""
    for column in range(end - begun):
        if choice.eos_token_ids and all(finished):
            return column
        for row, token in enumerate(tokens[:, column].tolist()):
            finished[row] = finished[row] or token in choice.eos_token_ids
    return end - begun


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.default_generators[device.index].get_state()


def _offset(state: Tensor) -> int:
    """Philox offset of a CUDA generator's state: its second 8 bytes."""
    return int(state[8:16].view(torch.int64))


def _set_offset(device: torch.device, state: Tensor, further: int) -> None:
    state = state.clone()
    state[8:16].view(torch.int64).add_(further)
    torch.cuda.default_generators[device.index].set_state(state)


def decode_with_host(
    step: DecodeStep,
    model: DecoderModel,
    kv_len: int,
    choose: Callable[[Tensor], Tensor | None],
    make_room: Callable[[int], None],
) -> None:
    """Steps whose tokens the host chooses: `choose(logits)`, (batch_size, vocab_size), returns the
    tokens (batch_size,) to feed next, or None at the end. `kv_len` and `make_room` as above.
    """
    while True:
        kv_len += 1
        make_room(kv_len)
        step.run(model, step.batch_size, None)
        tokens = choose(step.logits)
        if tokens is None:
            return
        step.input_ids.copy_(tokens)
        step.position_ids.add_(1)
        step.lengths.add_(1)
