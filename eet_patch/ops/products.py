"""Matrix product with what stands around it in a Transformer layer."""

from __future__ import annotations

from torch import Tensor

from eet_patch.ops import launch
from eet_patch.ops._extension import ACTIVATION_CODES
from eet_patch.ops.checks import (
    check_choice,
    check_contiguous,
    check_dim,
    check_operand,
    check_same_dtype_and_device,
    check_shape,
    check_vector,
)
from eet_patch.ops.elementwise import run_bias_activation
from eet_patch.ops.launch import NO_NORM, Norm
from eet_patch.ops.registration import registered
from eet_patch.ops.tiles import linear_tiles, tile_for

WEIGHT_LAYOUTS = ("out_in", "in_out")


def check_weight(
    weight: Tensor, in_features: int, like: Tensor, layout: str, name: str, out_features: int = -1
) -> int:
    """Checks one matrix and returns its out_features."""
    check_same_dtype_and_device(weight, like, name)
    check_dim(weight, 2, name)
    check_contiguous(weight, name)
    width = weight.shape[1 if layout == "in_out" else 0] if out_features < 0 else out_features
    shape = (in_features, width) if layout == "in_out" else (width, in_features)
    check_shape(weight, shape, name)
    return width


def _fake_linear(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_layout: str = "out_in",
    **_: object,
) -> Tensor:
    width = weight.shape[1 if weight_layout == "in_out" else 0]
    return hidden_states.new_empty(*hidden_states.shape[:-1], width)


@registered(_fake_linear)
def linear(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weight_layout: str = "out_in",
    activation: str | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
) -> Tensor:
    """Multiply rows by a weight matrix: `activation(LN(hidden_states) @ W + bias) + residual`, fp32
    accumulation.

    Few rows run in one kernel that reads the weight once; many rows go to tiles of our own where
    those were measured faster (Hopper, half precision), else to torch's BLAS with our kernels
    around it.

    Args:
        hidden_states: (..., in_features), contiguous; float32, float16 or bfloat16.
        weight: (out_features, in_features) as `torch.nn.Linear` keeps it, or (in_features,
            out_features) with `weight_layout="in_out"`, as transformers' `Conv1D` does; contiguous,
            same dtype and device.
        bias: (out_features,) or None.
        weight_layout: "out_in" or "in_out".
        activation: "gelu", "gelu_tanh", "relu", "silu" or None.
        residual: (..., out_features), contiguous, or None.
        norm_weight, norm_bias: (in_features,); a layer norm of hidden_states first, or None.
        norm_eps: added to its variance.
    Returns:
        (..., out_features).
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: replaces `torch.nn.Linear` and `transformers.pytorch_utils.Conv1D` in patched layers.
    """
    check_operand(hidden_states, "hidden_states")
    check_contiguous(hidden_states, "hidden_states")
    check_choice(weight_layout, WEIGHT_LAYOUTS, "weight_layout")
    check_choice(activation, ACTIVATION_CODES, "activation")
    if hidden_states.dim() == 0 or hidden_states.shape[-1] == 0:
        raise ValueError(
            "hidden_states must have a last dimension of at least 1, "
            f"got shape {tuple(hidden_states.shape)}"
        )
    in_features = hidden_states.shape[-1]
    out_features = check_weight(weight, in_features, hidden_states, weight_layout, "weight")
    check_vector(bias, out_features, hidden_states, "bias")
    check_vector(norm_weight, in_features, hidden_states, "norm_weight")
    check_vector(norm_bias, in_features, hidden_states, "norm_bias")
    out_shape = (*hidden_states.shape[:-1], out_features)
    if residual is not None:
        check_same_dtype_and_device(residual, hidden_states, "residual")
        check_shape(residual, out_shape, "residual")
        check_contiguous(residual, "residual")
    flat = hidden_states.view(-1, in_features)
    if flat.shape[0] == 0 or out_features == 0:
        return hidden_states.new_empty(out_shape)
    norm = NO_NORM if norm_weight is None else Norm("pre", norm_weight, norm_bias, norm_eps)
    in_out = weight_layout == "in_out"
    if launch.uses_our_products(flat, flat.shape[0]):
        flat_residual = None if residual is None else residual.view(-1, out_features)
        out = launch.linear(flat, (weight,), (bias,), in_out, activation, flat_residual, norm)
        return out.view(out_shape)
    if norm.placement is not None:
        flat = launch.layernorm(flat, norm)
    flat_residual = None if residual is None else residual.view(-1, out_features)
    tile = tile_for(flat, (weight,), (bias,), in_out, activation, flat_residual)
    if tile is not None:
        out = linear_tiles(flat, (weight,), (bias,), tile, activation, flat_residual)
        return out.view(out_shape)
    if activation is None:
        out = launch.torch_linear(flat, weight, bias, in_out)
    else:
        out = launch.torch_linear(flat, weight, None, in_out)
        run_bias_activation(out, bias, activation, out)
    out = out.view(out_shape)
    return out if residual is None else out.add_(residual)
