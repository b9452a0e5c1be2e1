"""The attention blocks of a layer: projections, attention, residual and norm in one op."""

from __future__ import annotations

from torch import Tensor

from eet_patch.ops import blocks, launch
from eet_patch.ops._extension import NORM_CODES
from eet_patch.ops.attention import MAX_HEAD_DIM, check_packing
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
from eet_patch.ops.launch import KVCache, Norm
from eet_patch.ops.masks import one_mask
from eet_patch.ops.products import WEIGHT_LAYOUTS, check_weight
from eet_patch.ops.registration import like_first, registered

Projection = tuple[Tensor, Tensor | None, str]  # weight, bias and name


def _projections(
    weights: tuple[Tensor, Tensor | None, Tensor | None], biases: tuple[Tensor | None, ...]
) -> tuple[Projection, ...]:
    """Three projections, or one that has the three side by side."""
    query, key, value = weights
    if (key is None) != (value is None):
        raise ValueError("key_weight and value_weight must be given together, got one of them")
    if key is None or value is None:
        if biases[1] is not None or biases[2] is not None:
            raise ValueError("key_bias and value_bias must be None where their weights are")
        return ((query, biases[0], "query"),)
    return (query, biases[0], "query"), (key, biases[1], "key"), (value, biases[2], "value")


def _check_block(
    hidden_states: Tensor,
    projections: tuple[Projection, ...],
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    weight_layout: str,
    dims: int = 3,
    parts: int = 1,
) -> Norm:
    check_operand(hidden_states, "hidden_states")
    check_dim(hidden_states, dims, "hidden_states")
    check_contiguous(hidden_states, "hidden_states")
    check_choice(weight_layout, WEIGHT_LAYOUTS, "weight_layout")
    check_choice(norm, NORM_CODES, "norm")
    hidden_size = hidden_states.shape[-1]
    if num_heads < 1 or hidden_size % num_heads or not hidden_size:
        raise ValueError(
            f"num_heads must divide hidden_size, got {num_heads} for hidden_size {hidden_size}"
        )
    if hidden_size // num_heads > MAX_HEAD_DIM:
        raise ValueError(
            f"num_heads must give a head_dim of at most {MAX_HEAD_DIM}, "
            f"got {hidden_size // num_heads}"
        )
    width = parts * hidden_size // len(projections)
    for weight, bias, name in projections:
        check_weight(weight, hidden_size, hidden_states, weight_layout, f"{name}_weight", width)
        check_vector(bias, width, hidden_states, f"{name}_bias")
    check_weight(out_weight, hidden_size, hidden_states, weight_layout, "out_weight", hidden_size)
    check_vector(out_bias, hidden_size, hidden_states, "out_bias")
    if norm is not None and norm_weight is None:
        raise ValueError(f"norm_weight must be given with norm={norm!r}, got None")
    check_vector(norm_weight, hidden_size, hidden_states, "norm_weight")
    check_vector(norm_bias, hidden_size, hidden_states, "norm_bias")
    return Norm(norm, norm_weight, norm_bias, norm_eps) if norm is not None else launch.NO_NORM


@registered(like_first)
def multi_head_attention(
    hidden_states: Tensor,
    query_weight: Tensor,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-12,
    add_residual: bool = True,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
    weight_layout: str = "out_in",
) -> Tensor:
    """Encoder self-attention with its projections, residual and norm, every token seeing every
    unmasked token.

    norm="post": `LN(x + attention(x))`; norm="pre": `x + attention(LN(x))`; None: no norm. The
    three projections are one launch over three pointers.

    Args:
        hidden_states: (batch_size, seq_len, hidden_size), contiguous; float32, float16 or bfloat16.
            Packed (with cu_seqlens): (total_tokens, hidden_size).
        query_weight, key_weight, value_weight, out_weight: (hidden_size, hidden_size), in
            `weight_layout` order. With None for key_weight and value_weight, query_weight has the
            three side by side, 3 * hidden_size output features in this order (GPT-2's `c_attn`).
        query_bias, key_bias, value_bias, out_bias: (hidden_size,) or None; the first (3 *
            hidden_size,) with the two behind it None, where the weights are side by side.
        num_heads: divides hidden_size; head_dim at most 256.
        norm: "pre", "post" or None, where the layer norm stands.
        norm_weight, norm_bias: (hidden_size,), its scale and shift; the bias may be None.
        norm_eps: added to its variance.
        add_residual: whether hidden_states is added to the result.
        attention_mask: bool (True = attend) or additive float, broadcastable to (batch_size,
            num_heads, seq_len, seq_len).
        key_padding_mask: bool (batch_size, seq_len), True = padding.
        cu_seqlens, max_seqlen: starts of the packed sequences, (batch_size + 1,) int64, and the
            longest length.
        softmax_scale: factor of the scores. Default: 1 / sqrt(head_dim).
        weight_layout: "out_in" (`nn.Linear`) or "in_out" (`Conv1D`).
    Returns:
        Like hidden_states.
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: Vaswani et al. 2017, arXiv:1706.03762. Replaces the attention half of `BertLayer`.
    """
    projections = _projections(
        (query_weight, key_weight, value_weight), (query_bias, key_bias, value_bias)
    )
    packed = cu_seqlens is not None
    placed = _check_block(
        hidden_states,
        projections,
        out_weight,
        out_bias,
        num_heads,
        norm,
        norm_weight,
        norm_bias,
        norm_eps,
        weight_layout,
        2 if packed else 3,
        parts=3,
    )
    head_dim = hidden_states.shape[-1] // num_heads
    if packed:
        assert cu_seqlens is not None
        check_packing(cu_seqlens, max_seqlen, hidden_states)
        if attention_mask is not None or key_padding_mask is not None:
            raise ValueError("packed tokens take no attention_mask or key_padding_mask")
        mask = launch.NO_MASK
    else:
        batch_size, seq_len, _ = hidden_states.shape
        sizes = (batch_size, num_heads, seq_len, seq_len)
        mask = one_mask(attention_mask, key_padding_mask, hidden_states, sizes)
    return blocks.attention_block(
        hidden_states,
        tuple(weight for weight, _, _ in projections),
        tuple(bias for _, bias, _ in projections),
        out_weight,
        out_bias,
        weight_layout == "in_out",
        num_heads,
        head_dim**-0.5 if softmax_scale is None else softmax_scale,
        placed,
        add_residual,
        mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen or 0,
    )


@registered(like_first, mutates=("key_cache", "value_cache"))
def masked_multi_head_attention(
    hidden_states: Tensor,
    query_weight: Tensor,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    past_len: int = 0,
    kv_start: Tensor | None = None,
    attention_mask: Tensor | None = None,
    norm: str | None = "pre",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    add_residual: bool = True,
    softmax_scale: float | None = None,
    weight_layout: str = "out_in",
) -> Tensor:
    """Decoder self-attention: prefill (any q_len) and one-token decoding over a KV cache, with left
    padding.

    The new keys and values are written into the caches at [past_len, past_len + q_len); query i
    then sees the cached keys up to past_len + i.

    Args:
        hidden_states: (batch_size, q_len, hidden_size), contiguous; float32, float16 or bfloat16.
        query_weight, key_weight, value_weight, out_weight: (hidden_size, hidden_size), in
            `weight_layout` order. With None for key_weight and value_weight, query_weight has the
            three side by side, 3 * hidden_size output features in this order (GPT-2's `c_attn`).
        query_bias, key_bias, value_bias, out_bias: (hidden_size,) or None; the first (3 *
            hidden_size,) with the two behind it None, where the weights are side by side.
        num_heads: divides hidden_size; head_dim at most 256.
        key_cache, value_cache: (batch_size, num_heads, capacity, head_dim), equal strides, capacity
            at least past_len + q_len, written in place; or None for no cache (past_len is 0 then).
        past_len: tokens in the cache so far.
        kv_start: (batch_size,), int64: keys before it are left padding.
        attention_mask: bool (True = attend) or additive float, broadcastable to
            (batch_size, num_heads, q_len, past_len + q_len), on top of the causal rule.
        norm: "pre", "post" or None, where the layer norm stands.
        norm_weight, norm_bias: (hidden_size,), its scale and shift; the bias may be None.
        norm_eps: added to its variance.
        add_residual: whether hidden_states is added to the result.
        softmax_scale: factor of the scores. Default: 1 / sqrt(head_dim).
        weight_layout: "out_in" (`nn.Linear`) or "in_out" (`Conv1D`).
    Returns:
        (batch_size, q_len, hidden_size).
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: Radford et al. 2019 (GPT-2). Replaces the attention half of `GPT2Block` and of fairseq's
        decoder layer.
    """
    projections = _projections(
        (query_weight, key_weight, value_weight), (query_bias, key_bias, value_bias)
    )
    placed = _check_block(
        hidden_states,
        projections,
        out_weight,
        out_bias,
        num_heads,
        norm,
        norm_weight,
        norm_bias,
        norm_eps,
        weight_layout,
        parts=3,
    )
    batch_size, q_len, hidden_size = hidden_states.shape
    head_dim = hidden_size // num_heads
    cache = None
    if (key_cache is None) != (value_cache is None):
        raise ValueError("key_cache and value_cache must be given together, got one of them")
    if key_cache is not None and value_cache is not None:
        for tensor, name in ((key_cache, "key_cache"), (value_cache, "value_cache")):
            check_same_dtype_and_device(tensor, hidden_states, name)
            check_dim(tensor, 4, name)
            check_shape(tensor, (batch_size, num_heads, key_cache.shape[2], head_dim), name)
        if not 0 <= past_len <= key_cache.shape[2] - q_len:
            raise ValueError(
                f"past_len must be 0 to {key_cache.shape[2] - q_len} (capacity less q_len), "
                f"got {past_len}"
            )
        if key_cache.stride() != value_cache.stride() or key_cache.stride(3) != 1:
            raise ValueError(
                "key_cache and value_cache must have equal strides and a contiguous last one, "
                f"got {key_cache.stride()} and {value_cache.stride()}"
            )
        cache = KVCache(key_cache, value_cache, past_len)
    elif past_len:
        raise ValueError(f"past_len must be 0 without a cache, got {past_len}")
    if kv_start is not None:
        check_index(kv_start, hidden_states, "kv_start")
        check_shape(kv_start, (batch_size,), "kv_start")
    sizes = (batch_size, num_heads, q_len, past_len + q_len)
    return blocks.attention_block(
        hidden_states,
        tuple(weight for weight, _, _ in projections),
        tuple(bias for _, bias, _ in projections),
        out_weight,
        out_bias,
        weight_layout == "in_out",
        num_heads,
        head_dim**-0.5 if softmax_scale is None else softmax_scale,
        placed,
        add_residual,
        one_mask(attention_mask, None, hidden_states, sizes),
        causal=True,
        kv_start=kv_start,
        cache=cache,
    )


@registered(like_first)
def cross_multi_head_attention(
    hidden_states: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key: Tensor,
    value: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    add_residual: bool = True,
    softmax_scale: float | None = None,
    weight_layout: str = "out_in",
) -> Tensor:
    """Attention of a decoder over an encoder's keys and values, which are projected once and kept
    by the caller.

    Args:
        hidden_states: (batch_size, q_len, hidden_size), contiguous; float32, float16 or bfloat16.
        query_weight, out_weight: (hidden_size, hidden_size), in `weight_layout` order.
        query_bias, out_bias: (hidden_size,) or None.
        key, value: (batch_size, num_heads, kv_len, head_dim), any strides with a contiguous last
            dimension: the encoder's output through the key and value projections (see `linear`).
        num_heads: divides hidden_size; head_dim at most 256.
        attention_mask: bool (True = attend) or additive float, broadcastable to (batch_size,
            num_heads, q_len, kv_len).
        key_padding_mask: bool (batch_size, kv_len), True = padding.
        norm: "pre", "post" or None, where the layer norm stands.
        norm_weight, norm_bias: (hidden_size,), its scale and shift; the bias may be None.
        norm_eps: added to its variance.
        add_residual: whether hidden_states is added to the result.
        softmax_scale: factor of the scores. Default: 1 / sqrt(head_dim).
        weight_layout: "out_in" (`nn.Linear`) or "in_out" (`Conv1D`).
    Returns:
        (batch_size, q_len, hidden_size).
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.
    """
    placed = _check_block(
        hidden_states,
        ((query_weight, query_bias, "query"),),
        out_weight,
        out_bias,
        num_heads,
        norm,
        norm_weight,
        norm_bias,
        norm_eps,
        weight_layout,
    )
    batch_size, q_len, hidden_size = hidden_states.shape
    head_dim = hidden_size // num_heads
    for tensor, name in ((key, "key"), (value, "value")):
        check_same_dtype_and_device(tensor, hidden_states, name)
        check_dim(tensor, 4, name)
        check_shape(tensor, (batch_size, num_heads, key.shape[2], head_dim), name)
        if head_dim > 1 and tensor.stride(3) != 1:
            raise ValueError(
                f"{name} must have a contiguous last dimension, got strides {tensor.stride()}"
            )
    if batch_size * q_len == 0:
        return hidden_states.clone()
    sizes = (batch_size, num_heads, q_len, key.shape[2])
    return blocks.cross_attention_block(
        hidden_states,
        (query_weight,),
        (query_bias,),
        key,
        value,
        out_weight,
        out_bias,
        weight_layout == "in_out",
        num_heads,
        head_dim**-0.5 if softmax_scale is None else softmax_scale,
        placed,
        add_residual,
        one_mask(attention_mask, key_padding_mask, hidden_states, sizes),
    )
