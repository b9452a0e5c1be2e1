"""The layers of an encoder over the real tokens of a padded batch: their parameters, the batch, the
launches over packed tokens, and the way back to a padded batch, with zeros where the padding was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from eet_patch.encoding import pool
from eet_patch.ops import blocks, packing
from eet_patch.ops.launch import Biases, Mask, Norm, Weights

PADDING_KEPT = "padded positions are computed too (enable(keep_padding=True))"
MORE_THAN_PADDING = "the attention mask says more than which tokens are padding"


class EncoderLayer(NamedTuple):
    """The parameters of one encoder layer, where the host keeps them: (out, in)."""

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
    activation: str | None


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


def power_of_two(value: int, least: int) -> int:
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
    made = run_layer(hidden_states, layers[-1], starts, shape, out, chained=len(layers) > 1)
    # A pre-norm layer ends in a product with the residual, which has a result of its own.
    if out is not None and made.data_ptr() != out.data_ptr():
        return out.copy_(made)
    return made


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


def laid_out(packed: Tensor, rows: Tensor, batch: Batch) -> Tensor:
    out = packed.new_empty(batch.batch_size, batch.seq_len, batch.hidden_size)
    if packed.shape[0] == 0:
        return out.zero_()
    return packing.launch_gather_rows(packed, rows, out)


def visited(
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
