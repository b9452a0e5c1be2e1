"""Beam search on top of a `DecodeStep`: beams share their past through an index of cache rows, so
that no key or value is ever moved, and nothing waits for the device.

What is searched is what transformers searches: every step keeps the `kept` best continuations of
each batch row, the best `num_beams` of those that go on, and the best `num_beams` that have ended,
by their scores over length ** length_penalty.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from eet_patch.generation.loop import CHUNK, recorded, to_host
from eet_patch.generation.step import DecoderModel, DecodeStep, Selection
from eet_patch.ops import beam_selection

NEVER = -1.0e9  # the score of what can't be chosen, as transformers has it


class BeamOptions(NamedTuple):
    """What generate() was asked for."""

    num_beams: int
    kept: int  # continuations of a batch row in each step
    length_penalty: float
    early_stopping: bool | str
    fill: int  # token behind a sequence's end
    first: int  # length of the prompt's sequence, which ours begin with
    max_length: int


class BeamState(NamedTuple):
    """After some step; batch is that of the prompts. Sequences are whole, indices of new tokens."""

    running: Tensor  # (batch, num_beams, max_length)
    running_scores: Tensor  # (batch, num_beams)
    running_indices: Tensor  # (batch, num_beams, new tokens), -1 behind the end
    ended: Tensor  # as running, of the best sequences that have ended
    ended_scores: Tensor
    ended_indices: Tensor
    has_ended: Tensor  # (batch, num_beams) bool
    improvable: Tensor  # (batch, 1) bool: a running beam may still beat an ended one


def initial_state(prompts: Tensor, options: BeamOptions) -> BeamState:
    """`prompts` (batch, length) are the same for all beams of a batch row."""
    batch, length = prompts.shape
    beams, device = options.num_beams, prompts.device
    new = options.max_length - options.first

    def full(value: float | bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.full((batch, *shape), value, dtype=dtype, device=device)

    running = full(options.fill, torch.int64, beams, options.max_length)
    running[:, :, :length] = prompts[:, None]
    return BeamState(
        running,
        full(0.0, torch.float32, beams),
        full(-1, torch.int32, beams, new),
        running.clone(),
        full(NEVER, torch.float32, beams),
        full(-1, torch.int32, beams, new),
        full(False, torch.bool, beams),
        full(True, torch.bool, 1),
    )


def _take(source: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (batch, n) of source (batch, m, ...)."""
    wide = index.reshape(*index.shape, *(1,) * (source.dim() - 2))
    return source.gather(1, wide.expand(*index.shape, *source.shape[2:]))


class Advance(NamedTuple):
    state: BeamState
    parents: Tensor  # (batch, num_beams): the beam that each running one continues
    tokens: Tensor  # (batch, num_beams): its new token
    stop: Tensor  # () bool: the search ends with this step


def advance(
    state: BeamState,
    candidates: tuple[Tensor, Tensor],
    per_beam: int,
    eos_token_ids: Tensor | None,
    length: int,
    options: BeamOptions,
) -> Advance:
    """One step of the search.

    Args:
        candidates: scores and tokens (batch, beams * per_beam), the `per_beam` best of each beam,
            their beam's score included.
        length: of the sequences, the new token not yet counted.
    """
    scores, tokens = candidates
    beams, generated = options.num_beams, length + 1 - options.first
    top_scores, at = scores.topk(options.kept, dim=1)
    parents = at // per_beam
    top_tokens = tokens.gather(1, at).long()
    sequences = _take(state.running, parents)
    sequences[:, :, length] = top_tokens
    indices = _take(state.running_indices, parents)
    batch = torch.arange(scores.shape[0], device=scores.device)[:, None]
    indices[:, :, generated - 1] = (parents + batch * beams).int()

    if length + 1 >= options.max_length:
        hits = torch.ones_like(top_tokens, dtype=torch.bool)
    elif eos_token_ids is not None:
        hits = torch.isin(top_tokens, eos_token_ids)
    else:
        hits = torch.zeros_like(top_tokens, dtype=torch.bool)

    going_on = top_scores + hits * NEVER
    _, best = going_on.topk(beams, dim=1)
    running = _take(sequences, best)
    running_scores = going_on.gather(1, best)
    running_indices = _take(indices, best)

    # Only the num_beams best continuations may end; the others are there to go on.
    ends = hits.clone()
    ends[:, beams:] = False
    final = top_scores / (generated**options.length_penalty)
    if options.early_stopping is True:
        final = final + state.has_ended.all(1, keepdim=True) * NEVER
    final = final + ~state.improvable * NEVER
    final = final + ~ends * NEVER
    all_scores = torch.cat([state.ended_scores, final], 1)
    _, best_ended = all_scores.topk(beams, dim=1)
    ended = _take(torch.cat([state.ended, sequences], 1), best_ended)
    ended_scores = all_scores.gather(1, best_ended)
    ended_indices = _take(torch.cat([state.ended_indices, indices], 1), best_ended)
    has_ended = torch.cat([state.has_ended, ends], 1).gather(1, best_ended)

    reach = generated
    if options.early_stopping == "never" and options.length_penalty > 0.0:
        reach = options.max_length - options.first
    possible = running_scores[:, :1] / (reach**options.length_penalty)
    worst = torch.where(has_ended, ended_scores.amin(1, keepdim=True), NEVER)
    improvable = state.improvable & (possible > worst).any(1, keepdim=True)
    go_on = improvable.any() & ~hits.all()
    if options.early_stopping is True:
        go_on = go_on & ~has_ended.all()
    new_state = BeamState(
        running,
        running_scores,
        running_indices,
        ended,
        ended_scores,
        ended_indices,
        has_ended,
        improvable,
    )
    return Advance(new_state, parents.gather(1, best), top_tokens.gather(1, best), ~go_on)


def search(
    step: DecodeStep,
    model: DecoderModel,
    choice: Selection,
    options: BeamOptions,
    prompts: Tensor,
    context_logits: Tensor,
    kv_len: int,
    starts: Tensor,
    next_positions: Tensor,
    unpenalised: Tensor | None,
) -> tuple[BeamState, int, Tensor]:
    """The search from the logits after the context (batch, vocab_size) on; the context's keys and
    values stand in the first cache row of each `num_beams`.

    Returns:
        the state after the last step, how many tokens were generated, and key_rows: where the
        past of each running beam stands.
    """
    batch, beams, device = prompts.shape[0], options.num_beams, step.device
    rows = batch * beams
    # A beam's best `kept` hold all that can be among the best of its batch row.
    per_beam = min(options.kept, context_logits.shape[1])
    workspace = beam_selection.top_candidates_workspace(step.logits)
    penalised = choice.repetition_penalty != 1.0
    state = initial_state(prompts, options)
    step.begin(
        choice,
        kv_len,
        prompts[:, -1].repeat_interleave(beams),
        starts.repeat_interleave(beams),
        next_positions.repeat_interleave(beams),
    )
    if penalised:
        step.note_seen(prompts.repeat_interleave(beams, 0), unpenalised)
    eos = step.eos_token_ids
    processors = {
        "eos_token_ids": eos,
        "suppressed_tokens": step.suppressed_tokens,
        "min_len": choice.min_new_tokens,
        "repetition_penalty": choice.repetition_penalty,
    }
    key_rows = step.share_past(kv_len, beams)
    first_rows = torch.arange(rows, device=device).view(batch, beams)
    own_rows = first_rows.view(rows).int()
    # select_token's convention: the length counts without the token that was fed.
    lengths = torch.full((rows,), -1, dtype=torch.int32, device=device)

    def candidates_of(logits: Tensor, scores: Tensor | None, every: int) -> tuple[Tensor, Tensor]:
        count = logits.shape[0]
        found = torch.empty(count, per_beam, device=device)
        tokens = torch.empty(count, per_beam, dtype=torch.int32, device=device)
        seen = step.seen[::every].contiguous() if penalised and step.seen is not None else None
        beam_selection.launch_top_candidates(
            logits,
            found,
            tokens,
            workspace,
            row_scores=scores,
            seen=seen,
            lengths=lengths[:count],
            **processors,  # type: ignore[arg-type]
        )
        return found.view(batch, -1), tokens.view(batch, -1)

    history: deque[tuple[BeamState, Tensor]] = deque(maxlen=3 * CHUNK)
    pending: deque[tuple[int, Tensor, object]] = deque()
    stops: list[Tensor] = []
    chunk = CHUNK if device.type == "cuda" else 1
    found = candidates_of(context_logits, None, beams)
    generated, stopped_at = 0, None
    while True:
        result = advance(state, found, per_beam, eos, options.first + generated, options)
        state = result.state
        generated += 1
        parents = (result.parents + first_rows[:, :1]).view(rows)
        if generated > 1:
            key_rows[:] = key_rows[parents]
            if penalised and step.seen is not None:
                step.seen.copy_(step.seen[parents])
        tokens = result.tokens.view(rows)
        if penalised and step.seen is not None:
            word = (tokens // 32)[:, None]
            bit = torch.ones_like(tokens, dtype=torch.int32) << (tokens % 32).int()
            step.seen.scatter_(1, word, step.seen.gather(1, word) | bit[:, None])
        history.append((state, key_rows.clone()))
        stops.append(result.stop)
        last = options.first + generated >= options.max_length
        if len(stops) == chunk or last:
            pending.append((generated, to_host(torch.stack(stops)), recorded(device)))
            stops = []
        while pending and stopped_at is None and (last or device.type == "cpu" or len(pending) > 1):
            end, flags, arrived = pending.popleft()
            if arrived is not None:
                arrived.synchronize()  # type: ignore[attr-defined]
            if bool(flags.any()):
                stopped_at = end - len(flags) + int(flags.int().argmax()) + 1
        if stopped_at is not None:
            state, rows_then = history[len(history) - 1 - (generated - stopped_at)]
            return state, stopped_at, rows_then
        step.input_ids.copy_(tokens)
        step.run(model, rows, None, shared=True)
        key_rows[:, kv_len + generated - 1] = own_rows  # where the step has written
        step.position_ids.add_(1)
        step.lengths.add_(1)
        lengths.add_(1)
        found = candidates_of(step.logits, state.running_scores.view(rows), 1)
