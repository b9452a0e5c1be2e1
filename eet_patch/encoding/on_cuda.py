"""Encoders on CUDA: packing and embedding, and the layers by launches or by graphs.

The number of packed rows, sequences and the longest length are rounded up to sizes of which there
are few, so that a captured graph serves batches of any shape; where a sequence ends, the kernels
read on the device. A graph and the launches that it was captured from do the same work: two runs of
a call give the same bits, whichever of the two serves it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eet_patch.encoding import pool
from eet_patch.encoding.packed import (
    MORE_THAN_PADDING,
    PADDING_KEPT,
    Batch,
    EncoderLayer,
    Shape,
    Visit,
    laid_out,
    power_of_two,
    rounded_rows,
    run_layers,
    visited,
)
from eet_patch.ops import packing
from eet_patch.ops._extension import NO_MASK

# Fewer tokens than this are not worth waiting for the device to say how many of them are real.
FEW_TOKENS = 256
# From this length on attention over sequences of one length has a kernel of its own.
MIN_ALIKE_LEN = 128


class Launched(NamedTuple):
    """What of a call on CUDA stands before its layers: packing, and the first layer's input where a
    step has a buffer for all rows.
    """

    step: pool.Step | None
    max_batch: int
    answer: pool.Answer
    starts: packing.Starts
    places: packing.Places
    hidden_states: Tensor | None


class Begun(NamedTuple):
    """What is known of a batch, and the graphs of its shape if the device runs the first of them.
    Where the host did not wait for the device, its rows are all rows, and not known.
    """

    known: bool
    rows: int
    more: int
    shape: Shape
    settings: tuple[object, ...]
    graphs: list[pool.Graph] | None


class Ahead:
    """A batch that the device works on already, while the host still looks whether it may: `taken`
    by `encode`, or released.
    """

    __slots__ = ("_launched", "batch", "begun", "forget", "layers")

    def __init__(
        self,
        launched: Launched,
        begun: Begun | None,
        layers: object,
        batch: Batch,
        forget: Callable[[], object],
    ) -> None:
        self._launched: Launched | None = launched
        self.begun, self.layers, self.batch, self.forget = begun, layers, batch, forget

    def rests_on(self, tables: object, layers: object) -> bool:
        lookup = self.batch.lookup
        return lookup is not None and lookup.tables is tables and self.layers is layers

    def taken(self, layers: object, batch: Batch) -> Launched | None:
        if self.layers is not layers or self.batch is not batch:
            return None
        launched, self._launched = self._launched, None
        return launched

    def release(self) -> None:
        launched, self._launched = self._launched, None
        if launched is not None and launched.step is not None:
            pool.give_back(launched.step)


def launch_ahead(
    owner: object,
    layers: tuple[EncoderLayer, ...],
    batch: Batch,
    ready: Callable[[int], bool],
    forget: Callable[[], object],
) -> Ahead | None:
    """On CUDA, packs and embeds a batch in a step of `owner`, if one is free, and sends the device
    on to the first layers if there is a graph of them and `ready(0)`. `forget` is for whoever finds
    that it should not have been.
    """
    if torch.cuda.is_current_stream_capturing():
        return None
    max_batch = power_of_two(batch.batch_size, 1)
    step = pool.borrow(owner, layers, batch.like, batch.hidden_size, max_batch)
    if step is None:
        return None
    try:
        launched = _launched(step, max_batch, layers, batch, None)
        begun = _begin(launched, batch, False, True) if ready(0) else None
        return Ahead(launched, begun, layers, batch, forget)
    except BaseException:
        pool.give_back(step)
        raise


def _begin(launched: Launched, batch: Batch, wait: bool, head: bool) -> Begun:
    """Waits for the device to say how many rows are real, where that is worth it or `wait` says so;
    with `head`, replays the graph of the first layers if it is there.
    """
    padded_rows = batch.batch_size * batch.seq_len
    # The device may be waiting for the host: what can be known is known before it answers.
    settings = pool.settings()
    rows, longest, more = padded_rows, batch.seq_len, 0
    several = batch.batch_size > 1 and padded_rows > FEW_TOKENS
    known = batch.mask is NO_MASK
    if not known and (several or wait):
        rows, longest, more = launched.answer.wait(batch.like)
        known = True
    shape = Shape(rounded_rows(rows), launched.max_batch, power_of_two(longest, 64))
    if rows == padded_rows == shape.rows and known and batch.seq_len >= MIN_ALIKE_LEN:
        shape = shape._replace(num_alike=batch.batch_size)
    graphs = None
    if head and rows and not more and launched.step and launched.hidden_states is not None:
        graphs = launched.step.begin_graphs(shape, settings)
    return Begun(known, rows, more, shape, settings, graphs)


def encode_on_cuda(
    owner: object,
    layers: tuple[EncoderLayer, ...],
    batch: Batch,
    keep_padding: bool,
    visit: Visit | None,
    ready: Callable[[int], bool] | None,
    ahead: Ahead | None = None,
) -> Tensor | str | None:
    launched, begun = None if ahead is None else ahead.taken(layers, batch), None
    if launched is not None:
        assert ahead is not None
        step, begun = launched.step, ahead.begun
    else:
        if ahead is not None:
            ahead.release()
        max_batch = power_of_two(batch.batch_size, 1)
        step = pool.borrow(owner, layers, batch.like, batch.hidden_size, max_batch)
    try:
        if launched is None:
            launched = _launched(step, max_batch, layers, batch, visit)
        return _encode_by(launched, begun, layers, batch, keep_padding, visit, ready)
    finally:
        if step is not None:
            pool.give_back(step)


def _launched(
    step: pool.Step | None,
    max_batch: int,
    layers: tuple[EncoderLayer, ...],
    batch: Batch,
    visit: Visit | None,
) -> Launched:
    padded_rows = batch.batch_size * batch.seq_len
    capacity = rounded_rows(padded_rows)
    device = batch.like.device
    answer = (pool.Answer() if step is None else step.answer).next()
    starts = packing.Starts.empty(max_batch, device) if step is None else step.starts
    places = (packing.Places.empty if step is None else step.places)(
        capacity, padded_rows, batch.batch_size, device
    )
    # Written before the device has said how many of the rows are real: the others become zeros.
    hidden_states = None if step is None or visit is not None else step.buffer(capacity)
    if hidden_states is not None and batch.lookup is not None:
        packing.launch_pack_and_embed(
            hidden_states,
            batch.lookup,
            batch.mask,
            batch.batch_size,
            batch.seq_len,
            max_batch,
            starts,
            places,
            answer.summary,
            answer.ticket,
        )
    else:
        packing.launch_pack_tokens(
            batch.mask,
            batch.batch_size,
            layers[0].num_heads,
            batch.seq_len,
            capacity,
            max_batch,
            batch.like,
            starts,
            answer.summary,
            answer.ticket,
            places,
        )
        if hidden_states is not None:
            batch.embed(places.tokens, hidden_states)
    return Launched(step, max_batch, answer, starts, places, hidden_states)


def _encode_by(
    launched: Launched,
    begun: Begun | None,
    layers: tuple[EncoderLayer, ...],
    batch: Batch,
    keep_padding: bool,
    visit: Visit | None,
    ready: Callable[[int], bool] | None,
) -> Tensor | str | None:
    step, _, answer, starts, places, hidden_states = launched
    wait = keep_padding or visit is not None
    if begun is None or (wait and not begun.known):
        if ready is not None and not ready(0):
            return None
        begun = _begin(launched, batch, wait, False)
    known, rows, more, shape, settings, graphs = begun
    if more:
        return MORE_THAN_PADDING
    if keep_padding and rows < batch.batch_size * batch.seq_len:
        return PADDING_KEPT

    def padded(packed: Tensor) -> Tensor:
        return laid_out(packed, places.rows, batch)

    if hidden_states is None and step is not None and visit is None and rows:
        hidden_states = step.buffer(shape.rows)
        if hidden_states is not None:
            batch.embed(places.tokens, hidden_states)
    if hidden_states is not None and rows:
        assert step is not None
        buffer = hidden_states
        again = partial(batch.embed, places.tokens, buffer)
        ran = step.run(shape, settings, layers, again, ready, graphs)
        if ran is None:
            return None
        packed = ran
    else:
        if ready is not None and not ready(1):
            return None
        packed = batch.like.new_empty(shape.rows, batch.hidden_size)
        if rows:
            batch.embed(places.tokens, packed)
        if visit is not None:
            return visited(packed, layers, starts, shape, visit, padded)
        if rows:
            packed = run_layers(packed, layers, starts, shape)
    out = padded(packed)
    # The device has answered long before it is done with the layers.
    if not known and answer.wait(batch.like)[2]:
        return MORE_THAN_PADDING
    return out
