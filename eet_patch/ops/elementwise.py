"""Embedding, layer norm and the element-wise ops between products."""

from __future__ import annotations

import torch
from torch import Tensor

from eet_patch.ops._extension import ACTIVATION_CODES, extension, place
from eet_patch.ops.checks import (
    check_choice,
    check_contiguous,
    check_dim,
    check_index,
    check_operand,
    check_same_dtype_and_device,
    check_shape,
    check_vector,
)
from eet_patch.ops.registration import like_first, registered, returns_nothing


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _output(like: Tensor, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty_like(like)
    check_same_dtype_and_device(out, like, "out")
    check_shape(out, like.shape, "out")
    check_contiguous(out, "out")
    return out


def _fake_embedding(input_ids: Tensor, word_weight: Tensor, *_: object, **__: object) -> Tensor:
    return word_weight.new_empty(*input_ids.shape, word_weight.shape[1])


@registered(_fake_embedding)
def embedding(
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-12,
    word_scale: float = 1.0,
    tokens: Tensor | None = None,
) -> Tensor:
    """Sum word, position and token type rows, and normalise the sum if `norm_weight` is given.

    `LN(word_scale * word_weight[input_ids] + position_weight[position_ids] +
    token_type_weight[token_type_ids])`, added and normalised in fp32, rounded once.

    Args:
        input_ids: (batch_size, seq_len), int64, contiguous.
        word_weight: (vocab_size, hidden_size), contiguous; float32, float16 or bfloat16.
        position_ids: (batch_size or 1, seq_len), int64; required with `position_weight`.
        position_weight: (num_positions, hidden_size), as word_weight, or None for no positions.
        token_type_ids: (batch_size or 1, seq_len), int64; None with a `token_type_weight` means
            type 0.
        token_type_weight: (num_token_types, hidden_size), as word_weight, or None for no types.
        norm_weight, norm_bias: (hidden_size,), as word_weight, or None.
        eps: added to the variance.
        word_scale: factor of the word rows (fairseq's sqrt(embed_dim)).
        tokens: (count,) int32, places in the flattened input_ids; a negative one yields zeros.
    Returns:
        (batch_size, seq_len, hidden_size), dtype and device of word_weight; with `tokens` (count,
        hidden_size).
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
        IndexError: an id outside its table (CPU; on CUDA the kernel traps, as torch's does).
    Source: Devlin et al. 2018, arXiv:1810.04805. Replaces `BertEmbeddings` and the sums before
        GPT-2's first block.
    """
    check_operand(word_weight, "word_weight")
    check_dim(word_weight, 2, "word_weight")
    check_contiguous(word_weight, "word_weight")
    check_index(input_ids, word_weight, "input_ids")
    check_dim(input_ids, 2, "input_ids")
    batch_size, seq_len = input_ids.shape
    hidden_size = word_weight.shape[1]
    for weight, name in (
        (position_weight, "position_weight"),
        (token_type_weight, "token_type_weight"),
    ):
        if weight is not None:
            check_same_dtype_and_device(weight, word_weight, name)
            check_dim(weight, 2, name)
            check_shape(weight, (weight.shape[0], hidden_size), name)
            check_contiguous(weight, name)
    if position_weight is not None and position_ids is None:
        raise ValueError("position_ids must be given with position_weight, got None")
    for ids, name in ((position_ids, "position_ids"), (token_type_ids, "token_type_ids")):
        if ids is not None:
            check_index(ids, word_weight, name)
            check_dim(ids, 2, name)
            check_shape(ids, (batch_size if ids.shape[0] != 1 else 1, seq_len), name)
    check_vector(norm_weight, hidden_size, word_weight, "norm_weight")
    check_vector(norm_bias, hidden_size, word_weight, "norm_bias")
    if tokens is None:
        out = word_weight.new_empty(batch_size, seq_len, hidden_size)
    else:
        if tokens.dtype != torch.int32 or tokens.device != word_weight.device:
            raise TypeError(
                f"tokens must be int32 on {word_weight.device}, got {tokens.dtype} "
                f"on {tokens.device}"
            )
        check_dim(tokens, 1, "tokens")
        check_contiguous(tokens, "tokens")
        out = word_weight.new_empty(tokens.shape[0], hidden_size)
    if out.numel() == 0:
        return out
    for weight in (word_weight, position_weight, token_type_weight):
        if weight is not None and weight.shape[0] == 0:
            # It has no address, by which the kernel would take it for a table that was left out.
            raise IndexError("eet_patch.embedding: index out of range of its table")
    return launch_embedding(
        out,
        input_ids,
        word_weight,
        position_ids,
        position_weight,
        token_type_ids,
        token_type_weight,
        norm_weight,
        norm_bias,
        eps,
        word_scale,
        tokens,
    )


def launch_embedding(
    out: Tensor,
    input_ids: Tensor,
    word_weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    token_type_ids: Tensor | None,
    token_type_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    word_scale: float = 1.0,
    tokens: Tensor | None = None,
) -> Tensor:
    """`embedding` without its checks; `tokens` may be longer than `out`."""
    hidden_size = word_weight.shape[1]
    extension().embedding(
        out.data_ptr(),
        word_weight.data_ptr(),
        _address(position_weight),
        _address(token_type_weight),
        input_ids.data_ptr(),
        _address(position_ids if position_weight is not None else None),
        _address(token_type_ids if token_type_weight is not None else None),
        _address(norm_weight),
        _address(norm_bias),
        out.numel() // hidden_size,
        hidden_size,
        word_weight.shape[0],
        0 if position_weight is None else position_weight.shape[0],
        0 if token_type_weight is None else token_type_weight.shape[0],
        1 if position_ids is None else position_ids.numel(),
        1 if token_type_ids is None else token_type_ids.numel(),
        word_scale,
        eps,
        *place(word_weight),
        tokens=_address(tokens),
    )
    return out


def layernorm(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise each row: `(x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, statistics in fp32.

    Args:
        hidden_states: (..., hidden_size), contiguous; float32, float16 or bfloat16.
        weight, bias: (hidden_size,), same dtype and device as hidden_states, or None for 1 and 0.
        eps: added to the variance.
        out: where to write, like hidden_states; may be hidden_states itself. Default: a new tensor.
    Returns:
        out.
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: Ba et al. 2016, arXiv:1607.06450. Replaces `torch.nn.LayerNorm` in patched layers.
    """
    if out is None:
        return _layernorm(hidden_states, weight, bias, eps)
    _layernorm_out(hidden_states, weight, bias, eps, out)
    return out


@registered(like_first, name="layernorm")
def _layernorm(
    hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _run_layernorm(hidden_states, weight, bias, eps, None)


@registered(returns_nothing, mutates=("out",), name="layernorm_out")
def _layernorm_out(
    hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    _run_layernorm(hidden_states, weight, bias, eps, out)


def _run_layernorm(
    hidden_states: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor | None,
) -> Tensor:
    check_operand(hidden_states, "hidden_states")
    check_contiguous(hidden_states, "hidden_states")
    hidden_size = _hidden_size(hidden_states)
    check_vector(weight, hidden_size, hidden_states, "weight")
    check_vector(bias, hidden_size, hidden_states, "bias")
    out = _output(hidden_states, out)
    if out.numel():
        extension().layernorm(
            out.data_ptr(),
            hidden_states.data_ptr(),
            _address(weight),
            _address(bias),
            hidden_states.numel() // hidden_size,
            hidden_size,
            eps,
            *place(hidden_states),
        )
    return out


def bias_residual_layernorm(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
    out: Tensor | None = None,
    sum_out: Tensor | None = None,
) -> Tensor:
    """Normalise the sum of a product, its bias and the residual: `LN(hidden_states + bias +
    residual)`.

    Args:
        hidden_states: (..., hidden_size), contiguous; float32, float16 or bfloat16.
        bias: (hidden_size,) or None.
        residual: like hidden_states, or None.
        weight, norm_bias: (hidden_size,), scale and shift of the norm, or None for 1 and 0.
        eps: added to the variance.
        out: where to write, like hidden_states; may be hidden_states or residual itself. Default: a
            new tensor.
        sum_out: receives the sum before the norm (what a pre-norm layer carries on), like
            hidden_states, or None.
    Returns:
        out.
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: the epilogue of post-norm (arXiv:1706.03762) and pre-norm (arXiv:2002.04745) layers.
    """
    if out is None:
        return _bias_residual_layernorm(
            hidden_states, bias, residual, weight, norm_bias, eps, sum_out
        )
    _bias_residual_layernorm_out(
        hidden_states, bias, residual, weight, norm_bias, eps, out, sum_out
    )
    return out


@registered(like_first, mutates=("sum_out",), name="bias_residual_layernorm")
def _bias_residual_layernorm(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    sum_out: Tensor | None,
) -> Tensor:
    return _run_bias_residual_layernorm(
        hidden_states, bias, residual, weight, norm_bias, eps, None, sum_out
    )


@registered(returns_nothing, mutates=("out", "sum_out"), name="bias_residual_layernorm_out")
def _bias_residual_layernorm_out(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    out: Tensor,
    sum_out: Tensor | None,
) -> None:
    _run_bias_residual_layernorm(
        hidden_states, bias, residual, weight, norm_bias, eps, out, sum_out
    )


def _run_bias_residual_layernorm(
    hidden_states: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    out: Tensor | None,
    sum_out: Tensor | None,
) -> Tensor:
    check_operand(hidden_states, "hidden_states")
    check_contiguous(hidden_states, "hidden_states")
    hidden_size = _hidden_size(hidden_states)
    check_vector(bias, hidden_size, hidden_states, "bias")
    check_vector(weight, hidden_size, hidden_states, "weight")
    check_vector(norm_bias, hidden_size, hidden_states, "norm_bias")
    for tensor, name in ((residual, "residual"), (sum_out, "sum_out")):
        if tensor is not None:
            check_same_dtype_and_device(tensor, hidden_states, name)
            check_shape(tensor, hidden_states.shape, name)
            check_contiguous(tensor, name)
    out = _output(hidden_states, out)
    if out.numel():
        extension().bias_residual_layernorm(
            out.data_ptr(),
            _address(sum_out),
            hidden_states.data_ptr(),
            _address(bias),
            _address(residual),
            _address(weight),
            _address(norm_bias),
            hidden_states.numel() // hidden_size,
            hidden_size,
            eps,
            *place(hidden_states),
        )
    return out


def bias_activation(
    hidden_states: Tensor,
    bias: Tensor | None,
    activation: str | None = "gelu",
    out: Tensor | None = None,
) -> Tensor:
    """Add a bias and apply an activation: `activation(hidden_states + bias)`, computed in fp32.

    Args:
        hidden_states: (..., size), contiguous; float32, float16 or bfloat16.
        bias: (size,), same dtype and device, or None.
        activation: "gelu" (by erf, exact), "gelu_tanh" (GPT-2's approximation), "relu", "silu" or
            None.
        out: where to write, like hidden_states; may be hidden_states itself. Default: a new tensor.
    Returns:
        out.
    Raises:
        ValueError, TypeError: on a shape, dtype, device, layout or activation other than these.
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    if out is None:
        return _bias_activation(hidden_states, bias, activation)
    _bias_activation_out(hidden_states, bias, activation, out)
    return out


@registered(like_first, name="bias_activation")
def _bias_activation(hidden_states: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return run_bias_activation(hidden_states, bias, activation, None)


@registered(returns_nothing, mutates=("out",), name="bias_activation_out")
def _bias_activation_out(
    hidden_states: Tensor, bias: Tensor | None, activation: str | None, out: Tensor
) -> None:
    run_bias_activation(hidden_states, bias, activation, out)


def run_bias_activation(
    hidden_states: Tensor, bias: Tensor | None, activation: str | None, out: Tensor | None
) -> Tensor:
    """`bias_activation` with its checks, past the dispatcher."""
    check_operand(hidden_states, "hidden_states")
    check_contiguous(hidden_states, "hidden_states")
    check_choice(activation, ACTIVATION_CODES, "activation")
    size = _hidden_size(hidden_states)
    check_vector(bias, size, hidden_states, "bias")
    out = _output(hidden_states, out)
    if out.numel():
        extension().bias_activation(
            out.data_ptr(),
            hidden_states.data_ptr(),
            _address(bias),
            hidden_states.numel() // size,
            size,
            ACTIVATION_CODES[activation],
            *place(hidden_states),
        )
    return out


def _hidden_size(hidden_states: Tensor) -> int:
    if hidden_states.dim() == 0 or hidden_states.shape[-1] == 0:
        raise ValueError(
            "hidden_states must have at least one dimension and a last one of at least 1, "
            f"got shape {tuple(hidden_states.shape)}"
        )
    return hidden_states.shape[-1]
