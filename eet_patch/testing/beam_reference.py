"""Beam search as transformers' `_beam_search` does it, in plain PyTorch: whole sequences, which are
gathered in every step. Equal scores keep their order, as in `ops.beam_step`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEVER = -1.0e9


class BeamSequences(NamedTuple):
    """After some step. Tokens and beam indices are those of the `limit` new places."""

    running: Tensor  # (batch, num_beams, limit) int64
    running_scores: Tensor  # (batch, num_beams)
    running_indices: Tensor  # (batch, num_beams, limit)
    ended: Tensor
    ended_scores: Tensor
    ended_indices: Tensor
    has_ended: Tensor  # (batch, num_beams) bool
    improvable: Tensor  # (batch, 1) bool


def beam_sequences(
    batch: int, num_beams: int, limit: int, fill: int, device: torch.device
) -> BeamSequences:
    """The state before the first step."""
    tokens = torch.full((batch, num_beams, limit), fill, device=device)
    indices = torch.full((batch, num_beams, limit), -1, device=device)
    scores = torch.zeros(batch, num_beams, device=device)
    flags = torch.zeros(batch, num_beams, dtype=torch.bool, device=device)
    return BeamSequences(
        tokens, scores, indices, tokens, scores + NEVER, indices, flags, ~flags[:, :1]
    )


def beam_step(
    state: BeamSequences,
    step: int,
    scores: Tensor,
    candidate_tokens: Tensor,
    kept: int,
    eos_token_ids: Tensor,
    length_penalty: float,
    early_stopping: bool | str,
) -> tuple[BeamSequences, bool]:
    """Step number `step`, from 0. `scores` and `candidate_tokens` as of `ops.beam_step`.

    Returns:
        the state after it, and whether the search goes on.
    """
    batch, beams, limit = state.running.shape
    top_scores, at = _largest(scores.view(batch, -1), kept)
    parents = at // scores.shape[1]
    tokens = candidate_tokens.view(batch, -1).gather(1, at).long()
    sequences, indices = _take(state.running, parents), _take(state.running_indices, parents)
    sequences[:, :, step] = tokens
    first_rows = torch.arange(batch, device=scores.device)[:, None] * beams
    indices[:, :, step] = parents + first_rows

    hits = torch.isin(tokens, eos_token_ids) | (step + 1 >= limit)
    running_scores, best = _largest(top_scores + hits * NEVER, beams)

    ends = hits.clone()
    ends[:, beams:] = False
    final = top_scores / (step + 1) ** length_penalty
    if early_stopping is True:
        final = final + state.has_ended.all(1, keepdim=True) * NEVER
    final = final + ~state.improvable * NEVER
    final = final + ~ends * NEVER
    ended_scores, best_ended = _largest(torch.cat([state.ended_scores, final], 1), beams)
    ended = _take(torch.cat([state.ended, sequences], 1), best_ended)
    ended_indices = _take(torch.cat([state.ended_indices, indices], 1), best_ended)
    has_ended = _take(torch.cat([state.has_ended, ends], 1), best_ended)

    reach = limit if early_stopping == "never" and length_penalty > 0 else step + 1
    worst = torch.where(has_ended, ended_scores.amin(1, keepdim=True), NEVER)
    may_win = (running_scores[:, :1] / reach**length_penalty > worst).any(1, keepdim=True)
    improvable = state.improvable & may_win
    goes_on = improvable.any() & ~hits.all()
    if early_stopping is True:
        goes_on = goes_on & ~has_ended.all()
    new_state = BeamSequences(
        _take(sequences, best),
        running_scores,
        _take(indices, best),
        ended,
        ended_scores,
        ended_indices,
        has_ended,
        improvable,
    )
    return new_state, bool(goes_on)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, at = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], at[:, :count]


def _take(source: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (batch, n) of source (batch, m, ...)."""
    return torch.stack([row[at] for row, at in zip(source, index, strict=True)])
