"""The state of a beam search on the device: its buffers, its beginning, and what is read of it."""

from __future__ import annotations

import operator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CANDIDATES = 64  # kMaxCandidates of csrc/ops.h
MAX_BEAMS = 32  # kMaxBeams
BEAMS_GO_ON = 7  # kBeamsGoOn

NEVER = -1.0e9  # the score of what can't be chosen, as transformers has it


class BeamState(NamedTuple):
    """A beam search after some step; rows = batch * num_beams. Made by `beam_state`.

    Sequences are told by the steps that they went through: step g of a sequence went on from row
    `indices[g]`, whose step g - 1 chose its token g - 1.
    """

    running_scores: Tensor  # (batch, num_beams) float32, the best first
    generated: Tensor  # (rows,) int32: steps so far, the same in all rows
    ended_scores: Tensor  # (batch, num_beams) float32, of what has ended, the best first
    ended_tokens: Tensor  # (batch, num_beams) int32, the last token
    ended_lengths: Tensor  # (batch, num_beams) int32, in tokens
    ended_indices: Tensor  # (batch, num_beams, max_steps) int32
    has_ended: Tensor  # (batch, num_beams) uint8; what has not only fills the place
    improvable: Tensor  # (batch,) uint8: a running beam may still beat one that has ended
    outlook: Tensor  # (max_steps, batch) uint8, after each step; see `goes_on`
    top_scores: Tensor  # (batch, kept) float32, the last step's best continuations
    top_parents: Tensor  # (batch, kept) int32, the beams that they go on from
    limit: Tensor  # (1,) int32, steps at most
    length_penalties: Tensor  # (2, max_steps) float32, by step; see csrc/ops.h


def beam_state(batch: int, num_beams: int, kept: int, max_steps: int, like: Tensor) -> BeamState:
    """Buffers for searches of up to `max_steps` tokens on the device of `like`; begun by
    `begin_beams`.

    Args:
        kept: continuations of a batch row in each step, in [num_beams, 64].
    Raises:
        ValueError: on a number other than these.
    """
    if not 1 <= num_beams <= MAX_BEAMS:
        raise ValueError(f"num_beams must be in [1, {MAX_BEAMS}], got {num_beams}")
    if not num_beams <= kept <= MAX_CANDIDATES:
        raise ValueError(f"kept must be in [{num_beams}, {MAX_CANDIDATES}], got {kept}")
    f32, i32, u8 = torch.float32, torch.int32, torch.uint8

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=like.device)

    return BeamState(
        running_scores=zeros(f32, batch, num_beams),
        generated=zeros(i32, batch * num_beams),
        ended_scores=zeros(f32, batch, num_beams),
        ended_tokens=zeros(i32, batch, num_beams),
        ended_lengths=zeros(i32, batch, num_beams),
        ended_indices=zeros(i32, batch, num_beams, max_steps),
        has_ended=zeros(u8, batch, num_beams),
        improvable=zeros(u8, batch),
        outlook=zeros(u8, max_steps, batch),
        top_scores=zeros(f32, batch, kept),
        top_parents=zeros(i32, batch, kept),
        limit=zeros(i32, 1),
        length_penalties=zeros(f32, 2, max_steps),
    )


def begin_beams(
    state: BeamState, limit: int, length_penalty: float, early_stopping: bool | str
) -> None:
    """Set the state before the first step.

    Args:
        limit: tokens of a sequence at most, in [1, max_steps].
        length_penalty: a sequence's score is the sum of its log probabilities over its number of
            new tokens to this power.
        early_stopping: as of transformers. "never" with a length_penalty above 0: what running
            beams may still reach is judged by the longest length.
    Raises:
        ValueError: on a limit other than these.
        OverflowError: where the power is beyond what a float holds.
    """
    max_steps = state.outlook.shape[0]
    if not 1 <= limit <= max_steps:
        raise ValueError(f"limit must be in [1, {max_steps}], got {limit}")
    penalties = [length**length_penalty for length in range(1, limit + 1)]
    ahead = early_stopping == "never" and length_penalty > 0.0
    reach = penalties[-1:] * limit if ahead else penalties
    state.length_penalties[:, :limit].copy_(torch.tensor([penalties, reach], dtype=torch.float32))
    state.limit.fill_(limit)
    state.ended_scores.fill_(NEVER)
    state.improvable.fill_(1)
    for tensor in (state.running_scores, state.generated, state.has_ended, state.outlook):
        tensor.zero_()
    state.ended_tokens.zero_()
    state.ended_lengths.zero_()


def goes_on(outlook: Tensor) -> bool:
    """Whether a search goes on after the step that left this row (batch,) of `state.outlook`. A
    step that changed nothing, as the search was over, leaves zeros.
    """
    return reduce(operator.or_, outlook.tolist(), 0) == BEAMS_GO_ON


def ended_sequences(
    state: BeamState, tokens: Tensor, steps: int, fill: int
) -> tuple[Tensor, Tensor]:
    """Read the sequences that have ended, the best first.

    Args:
        tokens: as of `beam_step`.
        steps: how many columns to return, at least as many as the longest has.
        fill: the token behind a sequence's end.
    Returns:
        new tokens (batch, num_beams, steps), int64; and the row that each step went on from, as
        shape, int32, -1 behind the end.
    """
    at = torch.arange(steps, device=tokens.device)
    lengths = state.ended_lengths[:, :, None]
    indices = state.ended_indices[:, :, :steps]
    # Token g was chosen for the row that step g + 1 went on from; who chose the last, ended.
    rows = torch.cat([indices[:, :, 1:], indices[:, :, :1]], 2).long()
    found = tokens[rows.clamp(0, tokens.shape[0] - 1), at]
    found = torch.where(at == lengths - 1, state.ended_tokens[:, :, None].long(), found)
    is_there = at < lengths
    return found.masked_fill(~is_there, fill), indices.masked_fill(~is_there, -1)
