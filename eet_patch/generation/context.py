"""The context of a call of generate(): all its tokens through all layers in one parallel pass, keys
and values straight to the buffers of a step. Of a batch with padding only the real tokens are
worked on (pre-padding decoding).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eet_patch.generation.step import DecoderModel
from eet_patch.ops import blocks, elementwise
from eet_patch.ops.decode import DecodeLayer
from eet_patch.ops.launch import KVCache, Norm, layernorm, linear, torch_linear, uses_our_products

# Above it the padding costs less than gathering the real tokens.
MAX_PACKED_FILL = 0.95


def context_logits(
    model: DecoderModel,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    input_ids: Tensor,
    position_ids: Tensor,
    starts: Sequence[int] | None,
) -> Tensor:
    """Run the context, and return the logits (batch_size, vocab_size) behind its last tokens.

    Args:
        model: where the parameters lie.
        keys, values: (batch_size, num_heads, capacity, head_dim) of each layer, strided in the
            first dimension or not; positions 0 to length - 1 are written, those of padding with
            what nobody may look at.
        input_ids, position_ids: (batch_size, length) int64.
        starts: padding on the left of each row, less than `length`; None: there is none.
    """
    batch_size, length = input_ids.shape
    if starts is None or not any(starts):
        hidden_states = _layers(model, keys, values, input_ids, position_ids, None)
        last = hidden_states[:, -1].contiguous()
    elif sum(starts) < (1.0 - MAX_PACKED_FILL) * batch_size * length:
        kv_start = torch.tensor(starts, dtype=torch.int64, device=input_ids.device)
        hidden_states = _layers(model, keys, values, input_ids, position_ids, kv_start)
        last = hidden_states[:, -1].contiguous()
    else:
        last = _packed_layers(model, keys, values, input_ids, position_ids, starts)
    norm = Norm("pre", model.norm_weight, model.norm_bias, model.norm_eps)
    if uses_our_products(last, batch_size):
        return linear(last, (model.head_weight,), (None,), False, norm=norm)
    return torch_linear(layernorm(last, norm), model.head_weight, None, False)


def _norms(model: DecoderModel, layer: DecodeLayer) -> tuple[Norm, Norm]:
    eps = model.norm_eps
    return (
        Norm("pre", layer.norm1_weight, layer.norm1_bias, eps),
        Norm("pre", layer.norm2_weight, layer.norm2_bias, eps),
    )


def _layers(
    model: DecoderModel,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    input_ids: Tensor,
    position_ids: Tensor,
    kv_start: Tensor | None,
) -> Tensor:
    """(batch_size, length, hidden_size)"""
    hidden_states = elementwise.embedding(
        input_ids, model.word_weight, position_ids, model.position_weight
    )
    for layer, key, value in zip(model.layers, keys, values, strict=True):
        norm1, norm2 = _norms(model, layer)
        hidden_states = blocks.attention_block(
            hidden_states,
            layer.qkv_weights,
            layer.qkv_biases,
            layer.out_weight,
            layer.out_bias,
            model.in_out,
            model.num_heads,
            layer.softmax_scale,
            norm1,
            causal=True,
            kv_start=kv_start,
            cache=KVCache(key, value, 0),
        )
        hidden_states = _ffn(model, layer, hidden_states, norm2)
    return hidden_states


def _packed_layers(
    model: DecoderModel,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    input_ids: Tensor,
    position_ids: Tensor,
    starts: Sequence[int],
) -> Tensor:
    """(batch_size, hidden_size), of the last tokens."""
    device, length = input_ids.device, input_ids.shape[1]
    real = [torch.arange(start, length) for start in starts]
    lengths = torch.tensor([0, *(len(part) for part in real)])
    ends = lengths.cumsum(0)
    rows = torch.repeat_interleave(torch.arange(len(real)), lengths[1:]).to(device)
    columns = torch.cat(real).to(device)
    cu_seqlens = ends.to(device)
    longest = int(lengths.max())
    hidden_states = elementwise.embedding(
        input_ids[rows, columns][None],
        model.word_weight,
        position_ids.expand(input_ids.shape)[rows, columns][None],
        model.position_weight,
    )[0]
    for layer, key, value in zip(model.layers, keys, values, strict=True):
        norm1, norm2 = _norms(model, layer)
        for buffer in (key, value):  # the step that had them last may have left anything
            buffer[:, :, : max(starts)].zero_()

        def keep(
            new_key: Tensor, new_value: Tensor, key: Tensor = key, value: Tensor = value
        ) -> tuple[Tensor, Tensor]:
            key[rows, :, columns] = new_key
            value[rows, :, columns] = new_value
            return new_key, new_value

        hidden_states = blocks.attention_block(
            hidden_states,
            layer.qkv_weights,
            layer.qkv_biases,
            layer.out_weight,
            layer.out_bias,
            model.in_out,
            model.num_heads,
            layer.softmax_scale,
            norm1,
            causal=True,
            update_kv=keep,
            cu_seqlens=cu_seqlens,
            max_seqlen=longest,
        )
        hidden_states = _ffn(model, layer, hidden_states, norm2)
    return hidden_states[(ends[1:] - 1).to(device)]


def _ffn(model: DecoderModel, layer: DecodeLayer, hidden_states: Tensor, norm: Norm) -> Tensor:
    return blocks.ffn(
        hidden_states,
        layer.fc1_weight,
        layer.fc1_bias,
        layer.fc2_weight,
        layer.fc2_bias,
        model.in_out,
        model.activation,
        norm,
    )
