"""The layers of a decode step by torch's products, for models so wide that the rate at which a
product reads its weights is all that counts: cuBLAS comes nearer to the memory's there than the
kernels that `decode_layers` chains, whose gain is in what lies between products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eet_patch.ops import decode
from eet_patch.ops._extension import ACTIVATION_CODES, extension, place
from eet_patch.ops.decode import DecodeLayer
from eet_patch.ops.launch import Norm, address, layernorm, torch_linear


def launch_layers(
    hidden_states: Tensor,
    layers: list[DecodeLayer],
    num_heads: int,
    in_out: bool,
    activation: str | None,
    norm_eps: float,
    final_norm: Norm,
    head_weight: Tensor,
    logits: Tensor,
    lengths: Tensor,
    kv_start: Tensor,
    cache_rows: Tensor | None,
    key_rows: Tensor | None,
) -> None:
    """As `decode_layers` of pre-norm layers with its head: `hidden_states` (rows, hidden_size) is
    written over, `logits` (rows, vocab_size) gets the result. Allocates: to be captured by torch.
    """
    norms = [Norm("pre", layer.norm1_weight, layer.norm1_bias, norm_eps) for layer in layers]
    norms.append(final_norm)
    normed = layernorm(hidden_states, norms[0])
    context = torch.empty_like(hidden_states)
    for layer, following in zip(layers, norms[1:], strict=True):
        query, key, value = _project_qkv(layer, normed, in_out)
        decode.launch_step_attention(
            context,
            query,
            layer.key_cache,
            layer.value_cache,
            num_heads,
            layer.softmax_scale,
            lengths,
            new=(key, value),
            kv_start=kv_start,
            cache_rows=cache_rows,
            key_rows=key_rows,
        )
        product = torch_linear(context, layer.out_weight, None, in_out)
        norm = Norm("pre", layer.norm2_weight, layer.norm2_bias, norm_eps)
        _add_and_norm(hidden_states, product, layer.out_bias, norm, normed)
        inner = torch_linear(normed, layer.fc1_weight, None, in_out)
        extension().bias_activation(
            inner.data_ptr(),
            inner.data_ptr(),
            address(layer.fc1_bias),
            inner.shape[0],
            inner.shape[1],
            ACTIVATION_CODES[activation],
            *place(inner),
        )
        product = torch_linear(inner, layer.fc2_weight, None, in_out)
        _add_and_norm(hidden_states, product, layer.fc2_bias, following, normed)
    torch.mm(normed, head_weight.t(), out=logits)


def _project_qkv(layer: DecodeLayer, normed: Tensor, in_out: bool) -> tuple[Tensor, ...]:
    made = [
        torch_linear(normed, weight, bias, in_out)
        for weight, bias in zip(layer.qkv_weights, layer.qkv_biases, strict=True)
    ]
    if len(made) == 1:
        return made[0].chunk(3, dim=1)
    return tuple(made)


def _add_and_norm(
    hidden_states: Tensor, product: Tensor, bias: Tensor | None, norm: Norm, normed: Tensor
) -> None:
    """`hidden_states += product + bias`, and the norm of it."""
    rows, hidden_size = hidden_states.shape
    extension().bias_residual_layernorm(
        normed.data_ptr(),
        hidden_states.data_ptr(),
        product.data_ptr(),
        address(bias),
        hidden_states.data_ptr(),
        address(norm.weight),
        address(norm.bias),
        rows,
        hidden_size,
        norm.eps,
        *place(hidden_states),
        False,
    )
