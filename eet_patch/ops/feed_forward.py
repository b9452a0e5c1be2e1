"""The feed-forward block."""

from __future__ import annotations

from torch import Tensor

from eet_patch.ops import blocks, launch
from eet_patch.ops._extension import ACTIVATION_CODES, NORM_CODES
from eet_patch.ops.checks import check_choice, check_contiguous, check_operand, check_vector
from eet_patch.ops.launch import Norm
from eet_patch.ops.products import WEIGHT_LAYOUTS, check_weight
from eet_patch.ops.registration import like_first, registered


@registered(like_first)
def ffn(
    hidden_states: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str | None = "gelu",
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    add_residual: bool = True,
    weight_layout: str = "out_in",
) -> Tensor:
    """Two products with an activation between them: `x + act(x @ W1 + b1) @ W2 + b2`, normalised
    before or after.

    norm="post": `LN(x + ffn(x))`; norm="pre": `x + ffn(LN(x))`; None: no norm.

    Args:
        hidden_states: (..., hidden_size), contiguous; float32, float16 or bfloat16.
        fc1_weight: (intermediate_size, hidden_size), or transposed with `weight_layout="in_out"`.
        fc1_bias: (intermediate_size,) or None.
        fc2_weight: (hidden_size, intermediate_size), or transposed with `weight_layout="in_out"`.
        fc2_bias: (hidden_size,) or None.
        activation: "gelu" (by erf), "gelu_tanh", "relu", "silu" or None.
        norm, norm_weight, norm_bias, norm_eps: placement, (hidden_size,) parameters and epsilon of
            the layer norm.
        add_residual: whether hidden_states is added to the result.
        weight_layout: "out_in" (`nn.Linear`) or "in_out" (`Conv1D`).
    Returns:
        Like hidden_states.
    Raises:
        ValueError, TypeError: on a shape, dtype, device, layout or activation other than these.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.3. Replaces `GPT2MLP` and BERT's
        intermediate and output.
    """
    check_operand(hidden_states, "hidden_states")
    check_contiguous(hidden_states, "hidden_states")
    check_choice(weight_layout, WEIGHT_LAYOUTS, "weight_layout")
    check_choice(activation, ACTIVATION_CODES, "activation")
    check_choice(norm, NORM_CODES, "norm")
    if hidden_states.dim() == 0 or hidden_states.shape[-1] == 0:
        raise ValueError(
            "hidden_states must have a last dimension of at least 1, "
            f"got shape {tuple(hidden_states.shape)}"
        )
    hidden_size = hidden_states.shape[-1]
    intermediate_size = check_weight(
        fc1_weight, hidden_size, hidden_states, weight_layout, "fc1_weight"
    )
    check_weight(
        fc2_weight, intermediate_size, hidden_states, weight_layout, "fc2_weight", hidden_size
    )
    check_vector(fc1_bias, intermediate_size, hidden_states, "fc1_bias")
    check_vector(fc2_bias, hidden_size, hidden_states, "fc2_bias")
    if norm is not None and norm_weight is None:
        raise ValueError(f"norm_weight must be given with norm={norm!r}, got None")
    check_vector(norm_weight, hidden_size, hidden_states, "norm_weight")
    check_vector(norm_bias, hidden_size, hidden_states, "norm_bias")
    return blocks.ffn(
        hidden_states,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        weight_layout == "in_out",
        activation,
        Norm(norm, norm_weight, norm_bias, norm_eps) if norm is not None else launch.NO_NORM,
        add_residual,
    )
