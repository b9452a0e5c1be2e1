"""What a `SentenceStep` decodes: where a decoder's parameters lie, and what it attends to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eet_patch.ops import decode
from eet_patch.ops.launch import Norm, layernorm, torch_linear


class SentenceDecoder(NamedTuple):
    """Where a decoder's parameters lie; the caches of `layers` are filled in by a step."""

    layers: tuple[decode.DecodeLayer, ...]
    # Of each layer: weight and bias of the keys' and the values' projection of an encoder's output.
    cross_projections: tuple[tuple[Tensor, Tensor | None, Tensor, Tensor | None], ...]
    word_weight: Tensor
    word_scale: float
    position_weight: Tensor | None
    first_position: int
    embed_norm: Norm
    final_norm: Norm
    # Weight and bias of what stands between the word embedding and the layers, and between them
    # and the head, where those have another size.
    project_in: tuple[Tensor, Tensor | None] | None
    project_out: tuple[Tensor, Tensor | None] | None
    head_weight: Tensor  # (vocab_size, its size)
    head_bias: Tensor | None
    num_heads: int
    activation: str | None
    norm_eps: float
    post_norm: bool
    layer_addresses: tuple[object, ...]  # `addresses_of` the first two

    @property
    def hidden_size(self) -> int:
        return self.layers[0].out_weight.shape[0]

    def addresses(self) -> tuple[object, ...]:
        """What a captured step rests on: every address and number that it bakes in."""
        return (self.layer_addresses, addresses_of(tuple(self)[2:-1]))


def addresses_of(parts: tuple[object, ...]) -> tuple[object, ...]:
    """Of all tensors in there, and all other values as they are."""
    found: list[object] = []

    def note(value: object) -> None:
        if isinstance(value, Tensor):
            found.append((value.data_ptr(), value.shape, value.dtype, value.device))
        elif isinstance(value, tuple):
            for part in value:
                note(part)
        else:
            found.append(value)

    note(parts)
    return tuple(found)


class Sentences(NamedTuple):
    """An encoder's output, (batch, length, size), and what of it is no padding: (batch,) int32."""

    states: Tensor
    start: Tensor
    end: Tensor


def product_into(out: Tensor, states: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(states, weight.t(), out=out)
    else:
        torch.addmm(bias, states, weight.t(), out=out)


def before_head(model: SentenceDecoder, states: Tensor) -> Tensor:
    """What the head reads of the last layer's output (rows, hidden_size)."""
    if model.final_norm.placement is not None:
        states = layernorm(states, model.final_norm)
    if model.project_out is not None:
        states = torch_linear(states, *model.project_out, False)
    return states
