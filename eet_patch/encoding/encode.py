"""Runs an encoder's layers over the real tokens of a padded batch: packed once before the first
layer, laid out again once after the last.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eet_patch.encoding.on_cuda import Ahead, encode_on_cuda
from eet_patch.encoding.packed import (
    MORE_THAN_PADDING,
    PADDING_KEPT,
    Batch,
    EncoderLayer,
    Shape,
    Visit,
    laid_out,
    run_layers,
    visited,
)
from eet_patch.ops import packing

CAPTURED = "the call is being captured into somebody's CUDA graph"


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
        return encode_on_cuda(owner, layers, batch, keep_padding, visit, ready, ahead)
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

    def padded(packed: Tensor) -> Tensor:
        if full:
            return packed.view(*sizes, batch.hidden_size)
        return laid_out(packed, found.rows, batch)

    if visit is not None:
        return visited(hidden_states, layers, starts, shape, visit, padded)
    return padded(run_layers(hidden_states, layers, starts, shape) if rows else hidden_states)
