"""What fairseq's beam search does with the best continuations of every hypothesis: which end, and
which go on.

`launch_...` doesn't check; the CPU runs torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eet_patch.ops._extension import extension, place
from eet_patch.ops.beam_state import MAX_BEAMS, MAX_CANDIDATES
from eet_patch.ops.checks import check_buffer, check_contiguous, check_dim, check_tensor
from eet_patch.ops.selection import runs_in_torch


class Hypotheses(NamedTuple):
    """The running hypotheses of some sentences after some step, `beams` rows a sentence, and what
    has ended; all contiguous.

    Rows stand for slots, and sentences for places, which are those that they had when the search
    began. Where the past of a row stands is told by `key_rows`, in slots.
    """

    running_scores: Tensor  # (rows,) float32: sums of log probabilities
    ignored: Tensor  # (rows,) uint8: rows that ended and found no successor
    places: Tensor  # (rows // beams,) int32
    slots: Tensor  # (rows,) int32
    lengths: Tensor  # (rows,) int32: the position that the step fed, which is its number
    input_ids: Tensor  # (rows,) int64: the token to feed next
    position_ids: Tensor  # (rows,) int64
    key_rows: Tensor  # (rows, capacity) int32
    tokens: Tensor  # (slots, capacity) int64: by slot and position, what was fed there
    scores: Tensor  # (slots, capacity) float32: the hypothesis' score with it
    ended: Tensor  # (places,) int32: how many hypotheses have
    is_done: Tensor  # (places,) uint8: a sentence has as many as it takes
    ended_scores: Tensor  # (places, beams) float32, in the order in which they ended
    ended_lengths: Tensor  # (places, beams) int32, in tokens, with the last
    ended_rows: Tensor  # (places, beams, capacity) int32: the slot of each position


def hypothesis_step(state: Hypotheses, scores: Tensor, tokens: Tensor, eos: int) -> None:
    """Choose, from the best continuations of every row, what ends and what goes on.

    The `kept` best of a sentence's continuations are looked at, where `kept` is their number in a
    row; equal ones in the order given, NaN as -inf. Those of its `beams` best that are `eos`, of a
    row that isn't ignored, end, until `beams` have; the sentence then is done, and later steps
    leave it as it is. The others, and behind them those that ended, fill the rows in their order;
    rows that ended ones fill are ignored in the next step. A row's token, score and past are
    written for the next step; lengths and position_ids go up by one.

    Args:
        state: see `Hypotheses`; lengths + 1 < capacity, which is not checked.
        scores: (rows, kept), float32, contiguous, each row largest first: sums of log
            probabilities.
        tokens: as scores, int32.
        eos: the token that ends a hypothesis.
    Raises:
        ValueError, TypeError: on a shape, dtype, device, layout or number other than these.
    Source: Graves 2012, arXiv:1211.3711; the order of things is that of fairseq's
        `SequenceGenerator`, 0.12.
    """
    check_tensor(scores, "scores")
    check_dim(scores, 2, "scores")
    check_dim(state.key_rows, 2, "key_rows")
    rows, kept = scores.shape
    sentences, capacity = state.places.shape[0], state.key_rows.shape[1]
    beams = state.ended_scores.shape[1]
    if not 1 <= beams <= MAX_BEAMS or not beams <= kept <= MAX_CANDIDATES:
        raise ValueError(
            f"beams must be in [1, {MAX_BEAMS}] and kept in [beams, {MAX_CANDIDATES}], "
            f"got {beams} and {kept}"
        )
    if rows != sentences * beams:
        raise ValueError(f"scores must have {sentences * beams} rows, got {rows}")
    slots, places = state.tokens.shape[0], state.ended.shape[0]
    i32, i64, f32, u8 = torch.int32, torch.int64, torch.float32, torch.uint8
    for tensor, dtype, shape, name in (
        (scores, f32, (rows, kept), "scores"),
        (tokens, i32, (rows, kept), "tokens"),
        (state.running_scores, f32, (rows,), "running_scores"),
        (state.ignored, u8, (rows,), "ignored"),
        (state.places, i32, (sentences,), "places"),
        (state.slots, i32, (rows,), "slots"),
        (state.lengths, i32, (rows,), "lengths"),
        (state.input_ids, i64, (rows,), "input_ids"),
        (state.position_ids, i64, (rows,), "position_ids"),
        (state.key_rows, i32, (rows, capacity), "key_rows"),
        (state.tokens, i64, (slots, capacity), "state.tokens"),
        (state.scores, f32, (slots, capacity), "state.scores"),
        (state.ended, i32, (places,), "ended"),
        (state.is_done, u8, (places,), "is_done"),
        (state.ended_scores, f32, (places, beams), "ended_scores"),
        (state.ended_lengths, i32, (places, beams), "ended_lengths"),
        (state.ended_rows, i32, (places, beams, capacity), "ended_rows"),
    ):
        check_buffer(tensor, (dtype,), scores, name, shape)
        check_contiguous(tensor, name)
    launch_hypothesis_step(state, scores, tokens, eos)


def launch_hypothesis_step(
    state: Hypotheses, scores: Tensor, tokens: Tensor, eos: int, chained: bool = False
) -> None:
    """`hypothesis_step` without its checks. On CUDA it allocates nothing and may be captured.
    `chained`: the launch before on the stream is `top_candidates`.
    """
    beams = state.ended_scores.shape[1]
    rows, kept = scores.shape
    if runs_in_torch(scores):
        whole = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).view(-1, beams * kept)
        best, at = (t[:, :kept] for t in whole.sort(dim=1, descending=True, stable=True))
        chosen = tokens.view(-1, beams * kept).gather(1, at)
        torch_hypothesis_step(state, best, chosen.long(), at // kept, eos)
        return
    extension().hypothesis_step(
        scores.data_ptr(),
        tokens.data_ptr(),
        *(tensor.data_ptr() for tensor in state),
        rows // beams,
        beams,
        kept,
        state.key_rows.shape[1],
        eos,
        chained,
        *place(scores)[1:],
    )


def torch_hypothesis_step(
    state: Hypotheses, scores: Tensor, tokens: Tensor, parents: Tensor, eos: int
) -> None:
    """The same from the best continuations of every sentence: (sentences, kept) scores, tokens and
    the beams that they go on from. Any number of beams.
    """
    sentences, kept = scores.shape
    beams = state.ended_scores.shape[1]
    device = scores.device
    ignored = state.ignored.view(sentences, beams).bool()
    ends = (tokens == eos) & (scores != -torch.inf)
    ends[:, :beams] &= ~ignored
    done = state.is_done[state.places.long()].bool()
    first = torch.arange(0, sentences * beams, beams, device=device)[:, None]
    rows = first + parents

    # What ends now, behind what has ended.
    ending = ends[:, :beams] & ~done[:, None]
    if device.type != "cpu" or bool(ending.any()):
        _end(state, scores, rows, ending)

    # Those that go on, in their order, and behind them the others in theirs.
    blocked = ends.clone()
    blocked[:, :beams] |= ignored
    order = blocked.long() * (2 * kept) + torch.arange(kept, device=device)
    value, chosen = order.topk(beams, 1, largest=False)
    running = (~done).repeat_interleave(beams)
    from_rows = rows.gather(1, chosen).view(-1)
    token, score = (t.gather(1, chosen).view(-1) for t in (tokens, scores))

    def put(target: Tensor, new: Tensor) -> None:
        target.copy_(torch.where(running, new.to(target.dtype), target))

    put(state.running_scores, score)
    put(state.ignored, (value >= 2 * kept).view(-1))
    put(state.input_ids, token)
    put(state.position_ids, state.position_ids + 1)
    slots = state.slots.long()
    moved = state.key_rows[from_rows]
    parent_slots = state.slots[from_rows]
    # Sentences that are done stand still, so that rows may be at different steps.
    moved.scatter_(1, state.lengths[:, None].long(), parent_slots[:, None])
    state.key_rows.copy_(torch.where(running[:, None], moved, state.key_rows))
    put(state.lengths, state.lengths + 1)
    at = slots, state.lengths.long()
    state.tokens[at] = torch.where(running, token, state.tokens[at])
    state.scores[at] = torch.where(running, score, state.scores[at])


def _end(state: Hypotheses, scores: Tensor, rows: Tensor, ending: Tensor) -> None:
    """Files the continuations of `rows` (sentences, kept) that end among the best `beams`."""
    beams = ending.shape[1]
    places = state.places.long()
    before = state.ended[places]
    rank = before[:, None] + ending.cumsum(1) - 1
    filed = ending & (rank < beams)
    # Several may not go to one place: what isn't filed goes behind the last, and is cut off.
    target = torch.where(filed, rank, beams).long()

    def file(buffer: Tensor, values: Tensor) -> None:
        wide = torch.cat([buffer[places], buffer[places][:, :1]], 1)
        index = target if values.dim() == 2 else target[:, :, None].expand_as(values)
        buffer[places] = wide.scatter(1, index, values.to(buffer.dtype))[:, :beams]

    rows = rows[:, :beams]
    file(state.ended_scores, scores[:, :beams])
    file(state.ended_lengths, (state.lengths[rows] + 1))
    paths = state.key_rows[rows]
    own = state.lengths[rows].long()[:, :, None]
    file(state.ended_rows, paths.scatter(2, own, state.slots[rows][:, :, None]))
    after = (before + ending.sum(1)).clamp(max=beams).to(before.dtype)
    state.ended[places] = after
    state.is_done[places] |= (ending.any(1) & (after == beams)).to(torch.uint8)
