"""Beam search on top of a `DecodeStep`: beams share their past through an index of cache rows, so
that no key or value is ever moved. All that a step decides is decided on the device and captured
with it; the host queues steps and looks now and then whether the search is over.

What is searched is what transformers searches: every step keeps the `kept` best continuations of
each batch row, the best `num_beams` of those that go on, and the best `num_beams` that have ended,
by their scores over length ** length_penalty.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eet_patch.generation.loop import CHUNK, recorded, to_host
from eet_patch.generation.step import Appended, DecoderModel, DecodeStep, Selection
from eet_patch.ops import beam_selection
from eet_patch.ops.beam_state import (
    NEVER,
    BeamState,
    beam_state,
    begin_beams,
    ended_sequences,
    goes_on,
)
from eet_patch.ops.beam_step import launch_beam_step


class BeamOptions(NamedTuple):
    """What generate() was asked for."""

    num_beams: int
    kept: int  # continuations of a batch row in each step
    length_penalty: float
    early_stopping: bool | str
    fill: int  # token behind a sequence's end
    first: int  # length of the prompt's sequence, which ours begin with
    max_length: int


class Found(NamedTuple):
    """What a search ended with; batch is that of the prompts."""

    sequences: Tensor  # (batch, num_beams, first + generated), the best first
    indices: (
        Tensor  # (batch, num_beams, generated) int32 as transformers' beam_indices, unshortened
    )
    generated: int  # tokens
    key_rows: Tensor  # (rows, capacity) int32: where the past of each running beam stands


class Search:
    """One search over the step's buffers, which are those of its last one of the same kind."""

    def __init__(
        self, step: DecodeStep, choice: Selection, options: BeamOptions, batch: int
    ) -> None:
        self.step, self.choice, self.options, self.batch = step, choice, options, batch
        rows, kept = batch * options.num_beams, options.kept

        def buffers() -> tuple[Tensor, ...]:
            return (
                # A beam's best `kept` hold all that can be among the best of its batch row.
                torch.empty(rows, kept, device=step.device),
                torch.empty(rows, kept, dtype=torch.int32, device=step.device),
                beam_selection.top_candidates_workspace(step.logits),
                *beam_state(batch, options.num_beams, kept, step.capacity, step.logits),
            )

        held = step.hold(("beams", batch, options.num_beams, kept), buffers)
        self.scores, self.tokens, self.workspace = held[:3]
        self.state = BeamState(*held[3:])

    def choose(self, logits: Tensor, scores: Tensor | None, seen: Tensor | None) -> None:
        """The running beams and the ended sequences after these logits: of each batch row in the
        first step, then of each row.
        """
        step, choice, count = self.step, self.choice, logits.shape[0]
        assert step.key_rows is not None
        best, tokens = self.scores[:count], self.tokens[:count]
        beam_selection.launch_top_candidates(
            logits,
            best,
            tokens,
            self.workspace,
            row_scores=scores,
            seen=seen,
            # It counts a length without the newest token, so the least one is a token longer here.
            lengths=self.state.generated[:count],
            eos_token_ids=step.eos_token_ids,
            suppressed_tokens=step.suppressed_tokens,
            min_len=choice.min_new_tokens + 1 if choice.min_new_tokens else 0,
            repetition_penalty=choice.repetition_penalty,
        )
        launch_beam_step(
            self.state,
            best,
            tokens,
            step.tokens,
            step.input_ids,
            step.position_ids,
            step.lengths,
            step.key_rows,
            seen=step.seen if choice.repetition_penalty != 1.0 else None,
            eos_token_ids=step.eos_token_ids,
            stop_when_full=self.options.early_stopping is True,
        )

    def appended(self) -> Appended:
        """What follows the logits of every step but the first."""
        step, choice = self.step, self.choice
        seen = step.seen if choice.repetition_penalty != 1.0 else None
        running_scores = self.state.running_scores.view(-1)
        return Appended(
            ("beams", choice, self.options.early_stopping is True),
            lambda: self.choose(step.logits, running_scores, seen),
        )

    def last_key_rows(self, kv_len: int, generated: int) -> Tensor:
        """Where the past of each running beam stands. In a step in which all end by their length
        transformers still names some to go on with, in the order in which topk leaves scores that
        are all the same; their past is what it returns.
        """
        key_rows, beams = self.step.key_rows, self.options.num_beams
        assert key_rows is not None
        if self.options.first + generated < self.options.max_length:
            return key_rows
        best = (self.state.top_scores + NEVER).topk(beams, dim=1)[1]
        parents = self.state.top_parents.gather(1, best)
        first_rows = torch.arange(0, len(key_rows), beams, device=key_rows.device)[:, None]
        rows = (first_rows + parents).view(-1)
        key_rows = key_rows[rows]
        key_rows[:, kv_len + generated - 2] = rows
        return key_rows


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
) -> Found:
    """The search from the logits after the context (batch, vocab_size) on; the context's keys and
    values stand in the first cache row of each `num_beams`. `prompts` (batch, first) are the same
    for all beams of a batch row.
    """
    batch, beams, device = prompts.shape[0], options.num_beams, step.device
    rows, limit = batch * beams, options.max_length - options.first
    run = Search(step, choice, options, batch)
    begin_beams(run.state, limit, options.length_penalty, options.early_stopping)
    # The state before the last token of the context was fed: choosing counts it.
    step.begin(
        choice,
        kv_len - 1,
        prompts[:, -1].repeat_interleave(beams),
        starts.repeat_interleave(beams),
        (next_positions - 1).repeat_interleave(beams),
    )
    step.share_past(kv_len, beams)
    seen = None
    if choice.repetition_penalty != 1.0:
        step.note_seen(prompts.repeat_interleave(beams, 0), unpenalised)
        assert step.seen is not None
        seen = step.seen[::beams].contiguous()
    run.choose(context_logits, None, seen)

    appended = run.appended()
    on_gpu = device.type == "cuda"
    chunk = CHUNK if on_gpu else 1
    queued, over = 1, False
    looks: deque[tuple[Tensor, Any]] = deque()
    while queued < limit and not over:
        more = min(chunk, limit - queued)
        step.run(model, rows, None, shared=True, appended=appended, steps=more)
        queued += more
        if not choice.eos_token_ids:
            continue  # only the limit ends it
        # Steps queued behind the search's end change nothing, so a look may come late.
        looks.append((to_host(run.state.outlook[queued - 1]), recorded(device)))
        while len(looks) > (1 if on_gpu else 0) and not over:
            outlook, arrived = looks.popleft()
            if arrived is not None:
                arrived.synchronize()
            over = not goes_on(outlook)
    generated = int(run.state.generated[0])
    tokens, indices = ended_sequences(run.state, step.tokens, generated, options.fill)
    sequences = torch.cat([prompts[:, None].expand(-1, beams, -1), tokens], 2)
    return Found(sequences, indices, generated, run.last_key_rows(kv_len, generated))
