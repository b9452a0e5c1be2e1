"""Random arguments of the ops, of the sizes that layers have.

Values come from torch's default CPU generator, so that a seed gives the same ones on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Device = torch.device | str


def randn(*shape: int, dtype: torch.dtype, device: Device, std: float = 1.0) -> Tensor:
    return (torch.randn(shape) * std).to(device=device, dtype=dtype)


def misaligned(tensor: Tensor) -> Tensor:
    """A contiguous copy one element past an aligned address, as a slice of a buffer may lie."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    copy = buffer[1:].view(tensor.shape)
    return copy.copy_(tensor)


def all_misaligned(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: misaligned(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def norm_inputs(hidden_size: int, dtype: torch.dtype, device: Device) -> tuple[Tensor, Tensor]:
    weight = 1 + randn(hidden_size, dtype=torch.float32, device="cpu", std=0.2)
    bias = randn(hidden_size, dtype=dtype, device=device, std=0.2)
    return weight.to(device=device, dtype=dtype), bias


def projection(
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: Device,
    weight_layout: str = "out_in",
    bias: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """A weight that keeps the size of its input, and a bias."""
    shape = (
        (out_features, in_features) if weight_layout == "out_in" else (in_features, out_features)
    )
    weight = randn(*shape, dtype=dtype, device=device, std=in_features**-0.5)
    return weight, randn(out_features, dtype=dtype, device=device, std=0.2) if bias else None


def cu_seqlens_of(lengths: list[int], device: Device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device)


def embedding_inputs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: Device,
    vocab_size: int = 50,
    num_positions: int = 600,
    num_token_types: int = 2,
) -> dict[str, Any]:
    """All three tables with the norm, for (batch_size, seq_len, hidden_size)."""
    batch_size, seq_len, hidden_size = shape
    norm_weight, norm_bias = norm_inputs(hidden_size, dtype, device)
    return {
        "input_ids": torch.randint(vocab_size, (batch_size, seq_len)).to(device),
        "word_weight": randn(vocab_size, hidden_size, dtype=dtype, device=device),
        "position_ids": torch.arange(seq_len)[None].to(device),
        "position_weight": randn(num_positions, hidden_size, dtype=dtype, device=device),
        "token_type_ids": torch.randint(num_token_types, (batch_size, seq_len)).to(device),
        "token_type_weight": randn(num_token_types, hidden_size, dtype=dtype, device=device),
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
    }


def layernorm_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: Device
) -> tuple[Tensor, Tensor, Tensor]:
    return randn(*shape, dtype=dtype, device=device), *norm_inputs(shape[-1], dtype, device)


def bias_residual_layernorm_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: Device
) -> dict[str, Tensor]:
    weight, norm_bias = norm_inputs(shape[-1], dtype, device)
    return {
        "hidden_states": randn(*shape, dtype=dtype, device=device),
        "bias": randn(shape[-1], dtype=dtype, device=device),
        "residual": randn(*shape, dtype=dtype, device=device),
        "weight": weight,
        "norm_bias": norm_bias,
    }


def linear_inputs(
    shape: tuple[int, ...],
    out_features: int,
    dtype: torch.dtype,
    device: Device,
    *,
    weight_layout: str = "out_in",
    bias: bool = True,
    residual: bool = False,
    norm: bool = False,
) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "hidden_states": randn(*shape, dtype=dtype, device=device),
        "weight_layout": weight_layout,
    }
    inputs["weight"], inputs["bias"] = projection(
        shape[-1], out_features, dtype, device, weight_layout, bias
    )
    if residual:
        inputs["residual"] = randn(*shape[:-1], out_features, dtype=dtype, device=device)
    if norm:
        inputs["norm_weight"], inputs["norm_bias"] = norm_inputs(shape[-1], dtype, device)
    return inputs


def attention_inputs(
    batch_size: int,
    num_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: Device,
    num_kv_heads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value, (batch_size, heads, length, head_dim), contiguous."""
    kv_shape = (batch_size, num_kv_heads or num_heads, kv_len, head_dim)
    return (
        randn(batch_size, num_heads, q_len, head_dim, dtype=dtype, device=device),
        randn(*kv_shape, dtype=dtype, device=device),
        randn(*kv_shape, dtype=dtype, device=device),
    )


MASK_KINDS = ("bool", "float32 -inf", "float32 lowest", "element -inf", "element lowest")


def attention_mask(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: Device,
    first_key_visible: bool = True,
) -> Tensor:
    """A random mask of `shape` that excludes two keys in five: bool (True = attend), or additive,
    float32 or of the operands' dtype, with -inf or the lowest finite value where a key is excluded.
    """
    keep = torch.rand(shape) < 0.6
    keep[..., :1] |= first_key_visible
    if kind == "bool":
        return keep.to(device)
    mask_dtype = torch.float32 if kind.startswith("float32") else dtype
    added = torch.randn(shape).to(mask_dtype)
    return added.masked_fill(~keep, excluding_value(kind, mask_dtype)).to(device)


def excluding_value(kind: str, dtype: torch.dtype) -> float | bool:
    """What excludes a key in a mask of `kind` whose dtype is `dtype`."""
    if kind == "bool":
        return False
    return float("-inf") if kind.endswith("-inf") else torch.finfo(dtype).min


def attention_block_inputs(
    shape: tuple[int, ...],
    num_heads: int,
    dtype: torch.dtype,
    device: Device,
    *,
    weight_layout: str = "out_in",
    bias: bool = True,
    norm: str | None = "post",
) -> dict[str, Any]:
    """Arguments of multi_head_attention and masked_multi_head_attention."""
    hidden_size = shape[-1]
    inputs: dict[str, Any] = {
        "hidden_states": randn(*shape, dtype=dtype, device=device),
        "num_heads": num_heads,
        "weight_layout": weight_layout,
        "norm": norm,
    }
    for name in ("query", "key", "value", "out"):
        inputs[f"{name}_weight"], inputs[f"{name}_bias"] = projection(
            hidden_size, hidden_size, dtype, device, weight_layout, bias
        )
    if norm is not None:
        inputs["norm_weight"], inputs["norm_bias"] = norm_inputs(hidden_size, dtype, device)
    return inputs


def cross_attention_block_inputs(
    shape: tuple[int, int, int],
    kv_len: int,
    num_heads: int,
    dtype: torch.dtype,
    device: Device,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of cross_multi_head_attention; `options` as of attention_block_inputs."""
    inputs = attention_block_inputs(shape, num_heads, dtype, device, **options)
    for name in ("key", "value"):
        del inputs[f"{name}_weight"], inputs[f"{name}_bias"]
        inputs[name] = randn(
            shape[0], num_heads, kv_len, shape[-1] // num_heads, dtype=dtype, device=device
        )
    return inputs


def ffn_inputs(
    shape: tuple[int, ...],
    intermediate_size: int,
    dtype: torch.dtype,
    device: Device,
    *,
    weight_layout: str = "out_in",
    bias: bool = True,
    norm: str | None = "post",
) -> dict[str, Any]:
    hidden_size = shape[-1]
    inputs: dict[str, Any] = {
        "hidden_states": randn(*shape, dtype=dtype, device=device),
        "weight_layout": weight_layout,
        "norm": norm,
    }
    inputs["fc1_weight"], inputs["fc1_bias"] = projection(
        hidden_size, intermediate_size, dtype, device, weight_layout, bias
    )
    inputs["fc2_weight"], inputs["fc2_bias"] = projection(
        intermediate_size, hidden_size, dtype, device, weight_layout, bias
    )
    if norm is not None:
        inputs["norm_weight"], inputs["norm_bias"] = norm_inputs(hidden_size, dtype, device)
    return inputs
