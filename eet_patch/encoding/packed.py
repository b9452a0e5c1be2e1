"""Runs an encoder's layers over the real tokens of a padded batch: packed once before the first
layer, laid out again once after the last, with zeros where the padding was.

On CUDA the number of packed rows, sequences and the longest length are rounded up to sizes of which
there are few, so that a captured graph serves batches of any shape; where a sequence ends, the
kernels read on the device. A graph and the launches that it was captured from do the same work: two
runs of a call give the same bits, whichever of the two serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from eet_patch.encoding import pool
from eet_patch.ops import blocks, packing
from eet_patch.ops._extension import NO_MASK
from eet_patch.ops.launch import Biases, Mask, Norm, Weights

PADDING_KEPT = "padded positions are computed too (enable(keep_padding=True))"
MORE_THAN_PADDING = "the attention mask says more than which tokens are padding"
CAPTURED = "the call is being captured into somebody's CUDA graph"
# Fewer tokens than this are not worth waiting for the device to say how many of them are real.
FEW_TOKENS = 256
# From this length on attention over sequences of one length has a kernel of its own.
MIN_ALIKE_LEN = 128


class EncoderLayer(NamedTuple):
    """The parameters of one post-norm encoder layer, where the host keeps them: (out, in)."""

    qkv_weights: Weights
    qkv_biases: Biases
    out_weight: Tensor
    out_bias: Tensor | None
    attention_norm: Norm
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    output_norm: Norm
    num_heads: int
    softmax_scale: float
    activation: str


class Batch(NamedTuple):
    """What goes into the first layer.

    Attributes:
        batch_size, seq_len, hidden_size: of the padded batch.
        like: a tensor of its dtype and device.
        mask: over (batch_size, num_heads, seq_len, seq_len), as `pack_tokens` takes it; its tensor
            is kept alive by the caller.
        embed: (tokens, out) writes row r of the first layer's input to out[r], for the token at
            place tokens[r] of the padded batch, zeros where that is negative.
        padded: the input itself, (batch_size * seq_len, hidden_size), where it is there already.
        lookup: what `embed` reads, where the mask is the same for all heads and queries and one
            launch may do both.
    """

    batch_size: int
    seq_len: int
    hidden_size: int
    like: Tensor
    mask: Mask
    embed: Callable[[Tensor, Tensor], None]
    padded: Tensor | None = None
    lookup: packing.Lookup | None = None


class Shape(NamedTuple):
    """What the launches over packed tokens depend on: all of it rounded up on CUDA. `num_alike`:
    how many sequences there are, if all are of one length and nothing was rounded, else 0.
    """

    rows: int
    batch_size: int
    longest: int
    num_alike: int = 0


# Told, after each layer, what goes into it and comes out of it, both as padded batches.
Visit = Callable[[int, Tensor, Tensor], None]


def rounded_rows(rows: int) -> int:
    """Up to 128: multiples of 16; up to 1024: of 64; beyond: sixteen or more steps an octave, in
    multiples of 128, which are whole tiles of a product.
    """
    if rows <= 1024:
        step = 16 if rows <= 128 else 64
    else:
        step = max(128, 1 << ((rows - 1).bit_length() - 5))
    return -(-rows // step) * step


def _power_of_two(value: int, least: int) -> int:
    return max(least, 1 << max(0, (value - 1).bit_length()))


def run_layers(
    hidden_states: Tensor,
    layers: Sequence[EncoderLayer],
    starts: packing.Starts,
    shape: Shape,
    out: Tensor | None = None,
) -> Tensor:
    """(rows, hidden_size) packed tokens through all layers, the last of which writes to `out` if
    that is given; it may be hidden_states.
    """
    for i, layer in enumerate(layers[:-1]):
        hidden_states = run_layer(hidden_states, layer, starts, shape, chained=i > 0)
    return run_layer(hidden_states, layers[-1], starts, shape, out, chained=len(layers) > 1)


def run_layer(
    hidden_states: Tensor,
    layer: EncoderLayer,
    starts: packing.Starts,
    shape: Shape,
    out: Tensor | None = None,
    chained: bool = False,
) -> Tensor:
    attended = blocks.attention_block(
        hidden_states,
        layer.qkv_weights,
        layer.qkv_biases,
        layer.out_weight,
        layer.out_bias,
        False,
        layer.num_heads,
        layer.softmax_scale,
        layer.attention_norm,
        cu_seqlens=starts.cu_seqlens[: shape.batch_size + 1],
        max_seqlen=shape.longest,
        short_cu_seqlens=starts.short_cu_seqlens[: shape.batch_size + 1],
        num_alike=shape.num_alike,
        chained=chained,
    )
    return blocks.ffn(
        attended,
        layer.fc1_weight,
        layer.fc1_bias,
        layer.fc2_weight,
        layer.fc2_bias,
        False,
        layer.activation,
        layer.output_norm,
        out=out,
        chained=True,
    )


def head_tensors(layers: Sequence[EncoderLayer]) -> list[Tensor]:
    """The parameters of the layers that are launched first, alone."""
    found: list[Tensor | None] = []
    for layer in layers[: pool.head_layers(len(layers))]:
        norms = (layer.attention_norm, layer.output_norm)
        found += [*layer.qkv_weights, *layer.qkv_biases, layer.out_weight, layer.out_bias]
        found += [layer.fc1_weight, layer.fc1_bias, layer.fc2_weight, layer.fc2_bias]
        found += [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    return [tensor for tensor in found if tensor is not None]


def encode(
    owner: object,
    layers: tuple[EncoderLayer, ...],
    batch: Batch,
    keep_padding: bool,
    visit: Visit | None = None,
    ready: Callable[[int], bool] | None = None,
    ahead: Ahead | None = None,
) -> Tensor | str | None:
    """The last layer's output, (batch_size, seq_len, hidden_size), or why the layers must be run
    over the padding too; None if `ready(0)` or `ready(1)` says no: asked before the device is sent
    on to the first layers, while it looks at the mask, and to the others, while it does those.

    Args:
        owner: whose graphs are kept for as long as it lives.
        layers: the very same object for as long as its parameters lie where they lay; graphs rest
            on it.
    """
    if batch.like.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return CAPTURED
        return _encode_on_cuda(owner, layers, batch, keep_padding, visit, ready, ahead)
    sizes = (batch.batch_size, batch.seq_len)
    padded_rows = batch.batch_size * batch.seq_len
    found = packing.launch_pack_tokens(
        batch.mask,
        batch.batch_size,
        layers[0].num_heads,
        batch.seq_len,
        padded_rows,
        batch.batch_size,
        batch.like,
    )
    rows, longest, more = found.summary.tolist()
    if more:
        return MORE_THAN_PADDING
    if keep_padding and rows < padded_rows:
        return PADDING_KEPT
    full = rows == padded_rows
    if full and batch.padded is not None:
        hidden_states = batch.padded
    else:
        hidden_states = batch.like.new_empty(rows, batch.hidden_size)
        if rows:
            batch.embed(found.tokens, hidden_states)
    starts = packing.Starts(found.cu_seqlens, found.short_cu_seqlens)
    shape = Shape(rows, batch.batch_size, longest)

    def laid_out(packed: Tensor) -> Tensor:
        if full:
            return packed.view(*sizes, batch.hidden_size)
        return _laid_out(packed, found.rows, batch)

    if visit is not None:
        return _visited(hidden_states, layers, starts, shape, visit, laid_out)
    return laid_out(run_layers(hidden_states, layers, starts, shape) if rows else hidden_states)


def _laid_out(packed: Tensor, rows: Tensor, batch: Batch) -> Tensor:
    out = packed.new_empty(batch.batch_size, batch.seq_len, batch.hidden_size)
    if packed.shape[0] == 0:
        return out.zero_()
    return packing.launch_gather_rows(packed, rows, out)


def _visited(
    hidden_states: Tensor,
    layers: Sequence[EncoderLayer],
    starts: packing.Starts,
    shape: Shape,
    visit: Visit,
    laid_out: Callable[[Tensor], Tensor],
) -> Tensor:
    before = laid_out(hidden_states)
    for index, layer in enumerate(layers):
        if shape.rows:
            hidden_states = run_layer(hidden_states, layer, starts, shape)
        after = laid_out(hidden_states)
        visit(index, before, after)
        before = after
    return before


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

    @property
    def tables(self) -> object:
        lookup = self.batch.lookup
        return None if lookup is None else lookup.tables

    def taken(self, layers: object, batch: Batch) -> Launched | None:
        launched = self._launched
        if launched is None or self.layers is not layers or self.batch is not batch:
            return None
        self._launched = None
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
    max_batch = _power_of_two(batch.batch_size, 1)
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
    shape = Shape(rounded_rows(rows), launched.max_batch, _power_of_two(longest, 64))
    if rows == padded_rows == shape.rows and known and batch.seq_len >= MIN_ALIKE_LEN:
        shape = shape._replace(num_alike=batch.batch_size)
    graphs = None
    if head and rows and not more and launched.step and launched.hidden_states is not None:
        graphs = launched.step.begin_graphs(shape, settings)
    return Begun(known, rows, more, shape, settings, graphs)


def _encode_on_cuda(
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
        max_batch = _power_of_two(batch.batch_size, 1)
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

    def laid_out(packed: Tensor) -> Tensor:
        return _laid_out(packed, places.rows, batch)

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
            return _visited(packed, layers, starts, shape, visit, laid_out)
        if rows:
            packed = run_layers(packed, layers, starts, shape)
    out = laid_out(packed)
    # The device has answered long before it is done with the layers.
    if not known and answer.wait(batch.like)[2]:
        return MORE_THAN_PADDING
    return out
