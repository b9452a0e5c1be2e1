"""`select_token`, `top_candidates` and `beam_step` in plain torch, unchecked, on any device: what
the CPU runs.

Arguments are those of eet_patch/ops/selection.py, beam_selection.py and beam_step.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eet_patch.ops.beam_state import NEVER, BeamState, goes_on

WORD_BITS = 32  # of a word of `seen`


def torch_select_token(
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
) -> None:
    """`select_token` in plain torch, unchecked, on any device; all state is written in place."""
    slot = _slot_index(logits, slots)
    scores = _processed(
        logits.float(),
        slot,
        lengths,
        seen,
        eos_token_ids,
        suppressed_tokens,
        min_len,
        repetition_penalty,
    )
    if temperature != 1:
        scores = scores / temperature
    token = scores.argmax(-1)
    if noise is not None:
        has_distribution = scores.amax(-1).isfinite()
        probs = _kept(scores, top_k, top_p, min_p).softmax(-1)
        token = torch.where(has_distribution, (probs / noise[slot]).argmax(-1), token)

    was_finished = finished[slot] != 0
    token = token.masked_fill(was_finished, pad_token_id)
    tokens[slot, lengths.long() + 1] = token
    input_ids.copy_(token)
    position_ids += 1
    lengths += 1
    if seen is not None:
        place_of_token = token.masked_fill(was_finished, 0)
        word = place_of_token // WORD_BITS
        bit = (1 << place_of_token % WORD_BITS).masked_fill(was_finished, 0).to(torch.int32)
        seen[slot, word] |= bit
    if eos_token_ids is not None:
        ends = torch.isin(token, eos_token_ids) & ~was_finished
        finished[slot] = (was_finished | ends).to(finished.dtype)
        unfinished_count -= ends.sum()


def torch_top_candidates(
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
) -> tuple[Tensor, Tensor]:
    """`top_candidates` in plain torch, unchecked, on any device."""
    scores = _processed(
        logits.float().log_softmax(-1),
        _slot_index(logits, slots),
        lengths,
        seen,
        eos_token_ids,
        suppressed_tokens,
        min_len,
        repetition_penalty,
        in_place=True,
    )
    if row_scores is not None:
        scores += row_scores[:, None]
    values, tokens = scores.topk(min(count + 1, scores.shape[1]))
    # topk leaves the order of equal scores open, and a sort takes ten times as long: it is for the
    # rows that need it. Beams that don't count yet have no score at all.
    unclear = (values[:, 1:] == values[:, :-1]).any(-1) | values[:, 0].isnan()
    values, tokens = values[:, :count].contiguous(), tokens[:, :count].contiguous()
    nothing = values[:, 0] == -torch.inf
    tokens[nothing] = torch.arange(count, device=logits.device)
    again = (unclear & ~nothing).nonzero()[:, 0]
    if len(again):
        sorted_values, order = scores[again].sort(descending=True, stable=True)
        values[again], tokens[again] = sorted_values[:, :count], order[:, :count]
    return values, tokens.to(torch.int32)


def torch_beam_step(
    state: BeamState,
    scores: Tensor,
    candidate_tokens: Tensor,
    tokens: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    lengths: Tensor,
    key_rows: Tensor,
    seen: Tensor | None,
    eos_token_ids: Tensor | None,
    stop_when_full: bool,
) -> None:
    """`beam_step` in plain torch, unchecked, on any device; all state is written in place."""
    batch, beams = state.running_scores.shape
    if batch == 0:
        return
    kept = state.top_scores.shape[1]
    step, limit = int(state.generated[0]), int(state.limit)
    if step >= limit or (step > 0 and not goes_on(state.outlook[step - 1])):
        return
    is_last = step + 1 == limit
    columns = slice(int(lengths[0]) - step, int(lengths[0]) + 1)
    ended_penalty, running_penalty = state.length_penalties[:, step]

    top_scores, at = _largest(scores.view(batch, -1), kept)
    parents = at // scores.shape[1]
    top_tokens = candidate_tokens.view(batch, -1).gather(1, at)
    first_rows = torch.arange(0, batch * beams, beams, device=scores.device)[:, None]
    paths = _take(key_rows.view(batch, beams, -1)[:, :, columns], parents)
    paths[:, :, step] = (first_rows + parents).int()
    hits = torch.full_like(top_tokens, is_last, dtype=torch.bool)
    if eos_token_ids is not None:
        hits |= torch.isin(top_tokens, eos_token_ids)
    state.top_scores.copy_(top_scores)
    state.top_parents.copy_(parents)

    ends = hits.clone()
    ends[:, beams:] = False  # the others are there to go on
    final = top_scores / ended_penalty
    if stop_when_full:
        final = final + (state.has_ended != 0).all(1, keepdim=True) * NEVER
    final = final + (state.improvable == 0)[:, None] * NEVER
    final = final + ~ends * NEVER
    ended_scores, best = _largest(torch.cat([state.ended_scores, final], 1), beams)
    for held, new in (
        (state.ended_indices[:, :, : step + 1], paths),
        (state.ended_tokens, top_tokens),
        (state.ended_lengths, torch.full_like(top_tokens, step + 1)),
        (state.has_ended, ends.to(torch.uint8)),
    ):
        held.copy_(_take(torch.cat([held, new], 1), best))
    state.ended_scores.copy_(ended_scores)

    running_scores, best = _largest(top_scores + hits * NEVER, beams)
    has_ended = state.has_ended != 0
    worst = torch.where(has_ended, ended_scores.amin(1, keepdim=True), NEVER)
    may_win = (running_scores[:, :1] / running_penalty > worst).any(1)
    state.improvable.copy_((state.improvable != 0) & may_win)
    is_full = has_ended.all(1) & stop_when_full
    state.outlook[step] = state.improvable + 2 * ~hits.all(1) + 4 * ~is_full

    state.generated.add_(1)
    if is_last:
        return
    chosen = top_tokens.gather(1, best).view(-1).long()
    key_rows.view(batch, beams, -1)[:, :, columns] = _take(paths, best)
    state.running_scores.copy_(running_scores)
    tokens[:, step] = chosen
    input_ids.copy_(chosen)
    position_ids += 1
    lengths += 1
    if seen is not None:
        rows = torch.arange(batch * beams, device=scores.device)
        seen.copy_(seen[(first_rows + parents.gather(1, best)).view(-1)])
        seen[rows, chosen // WORD_BITS] |= (1 << chosen % WORD_BITS).to(torch.int32)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As topk, equal scores in the order given."""
    values, at = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :count], at[:, :count]


def _take(source: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (batch, n) of source (batch, m, ...)."""
    wide = index.reshape(*index.shape, *(1,) * (source.dim() - 2))
    return source.gather(1, wide.expand(*index.shape, *source.shape[2:]))


def _slot_index(logits: Tensor, slots: Tensor | None) -> Tensor:
    if slots is None:
        return torch.arange(logits.shape[0], device=logits.device)
    return slots.long()


def _processed(
    scores: Tensor,
    slot: Tensor,
    lengths: Tensor | None,
    seen: Tensor | None,
    eos_token_ids: Tensor | None,
    suppressed_tokens: Tensor | None,
    min_len: int,
    repetition_penalty: float,
    in_place: bool = False,
) -> Tensor:
    """What greedy and beam search share: repetition penalty and -inf for suppressed tokens.
    `in_place`: the scores given may be written to.
    """
    vocab_size = scores.shape[1]
    if seen is not None and repetition_penalty != 1:
        bits = torch.arange(WORD_BITS, dtype=torch.int32, device=scores.device)
        has_token = ((seen[slot, :, None] >> bits & 1) != 0).flatten(1)[:, :vocab_size]
        penalised = torch.where(
            scores < 0, scores * repetition_penalty, scores / repetition_penalty
        )
        scores = torch.where(has_token, penalised, scores)
    # Columns, and the rows in which they count; few, so no mask of all is made.
    hidden: list[tuple[Tensor, Tensor | None]] = []
    if suppressed_tokens is not None:
        hidden.append((suppressed_tokens, None))
    if eos_token_ids is not None and min_len > 0:
        assert lengths is not None
        hidden.append((eos_token_ids, lengths + 1 < min_len))
    for tokens, where in hidden:
        known = tokens[(tokens >= 0) & (tokens < vocab_size)]
        held = scores[:, known]
        hide = torch.ones_like(held, dtype=torch.bool) if where is None else where[:, None]
        scores = scores if in_place else scores.clone()
        scores.index_copy_(1, known, held.masked_fill(hide, -torch.inf))
        in_place = True
    return scores


def _kept(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Scores with -inf for what top_k, top_p and min_p remove."""
    if 0 < top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ascending, order = scores.sort(stable=True)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[:, -1] = False
        scores = scores.masked_fill(removed.scatter(1, order, removed), float("-inf"))
    if min_p > 0:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"))
    return scores
