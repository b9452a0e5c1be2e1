"""Scaled dot-product attention and the attention blocks built on it."""

from __future__ import annotations

from torch import Tensor

from eet_patch.ops import blocks, launch
from eet_patch.ops._extension import NORM_CODES
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

MAX_HEAD_DIM = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attention_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    kv_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attend: `softmax(softmax_scale * query @ key^T + mask) @ value` per head, softmax in fp32.

    A query that may see no key yields zeros. With is_causal, query i sees key j when j <= i +
    kv_len - q_len.

    Args:
        query: (batch_size, num_heads, q_len, head_dim), any strides with a contiguous last
            dimension; float32, float16 or bfloat16; head_dim 1 to 256. Packed: (total_tokens,
            num_heads, head_dim).
        key, value: (batch_size, num_kv_heads, kv_len, head_dim), num_kv_heads dividing num_heads.
            Packed: (total_tokens, num_kv_heads, head_dim).
        attention_mask: bool (True = attend) or additive float, broadcastable to (batch_size,
            num_heads, q_len, kv_len). -inf or the lowest finite value excludes a key.
        key_padding_mask: bool (batch_size, kv_len), True = padding.
        is_causal: whether later keys are hidden.
        kv_start: (batch_size,), int64: keys before it are left padding.
        cu_seqlens: (batch_size + 1,), int64, for packed tokens: where each sequence starts; no
            masks then.
        max_seqlen: length of the longest packed sequence.
        softmax_scale: factor of the scores. Default: 1 / sqrt(head_dim).
    Returns:
        (batch_size, q_len, num_heads, head_dim), contiguous; packed: (total_tokens, num_heads,
        head_dim).
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691.
    """
    check_operand(query, "query")
    packed = cu_seqlens is not None
    check_dim(query, 3 if packed else 4, "query")
    for tensor, name in ((key, "key"), (value, "value")):
        check_same_dtype_and_device(tensor, query, name)
        check_dim(tensor, query.dim(), name)
    for tensor, name in ((query, "query"), (key, "key"), (value, "value")):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must have a contiguous last dimension, got strides {tensor.stride()}"
            )
    head_dim, num_heads, num_kv_heads = query.shape[-1], query.shape[1], key.shape[1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"query must have a head_dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"key must have a number of heads that divides query's {num_heads}, got {num_kv_heads}"
        )
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if packed:
        assert cu_seqlens is not None
        _check_packing(cu_seqlens, max_seqlen, query)
        if attention_mask is not None or key_padding_mask is not None or kv_start is not None:
            raise ValueError("packed tokens take no attention_mask, key_padding_mask or kv_start")
        check_shape(key, (query.shape[0], num_kv_heads, head_dim), "key")
        check_shape(value, key.shape, "value")
        mask = one_mask(None, None, query, (0, 0, 0, 0))
    else:
        batch_size, _, q_len, _ = query.shape
        kv_len = key.shape[2]
        check_shape(key, (batch_size, num_kv_heads, kv_len, head_dim), "key")
        check_shape(value, key.shape, "value")
        if is_causal and kv_len < q_len:
            raise ValueError(
                f"key must be at least as long as query with is_causal, got {kv_len} < {q_len}"
            )
        if kv_start is not None:
            check_index(kv_start, query, "kv_start")
            check_shape(kv_start, (batch_size,), "kv_start")
        sizes = (batch_size, num_heads, q_len, kv_len)
        mask = one_mask(attention_mask, key_padding_mask, query, sizes)
    return launch.attention(
        query, key, value, mask, is_causal, scale, kv_start, cu_seqlens, max_seqlen or 0
    )


def _check_packing(cu_seqlens: Tensor, max_seqlen: int | None, like: Tensor) -> None:
    check_index(cu_seqlens, like, "cu_seqlens")
    check_dim(cu_seqlens, 1, "cu_seqlens")
    if cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have at least 2 entries, got {cu_seqlens.numel()}")
    if max_seqlen is None or max_seqlen < 1:
        raise ValueError(f"max_seqlen must be at least 1 with cu_seqlens, got {max_seqlen}")


def _check_block(
    hidden_states: Tensor,
    weights: tuple[tuple[Tensor, Tensor | None, str], ...],
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    weight_layout: str,
    dims: int = 3,
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
    for weight, bias, name in (*weights, (out_weight, out_bias, "out")):
        check_weight(
            weight, hidden_size, hidden_states, weight_layout, f"{name}_weight", hidden_size
        )
        check_vector(bias, hidden_size, hidden_states, f"{name}_bias")
    if norm is not None and norm_weight is None:
        raise ValueError(f"norm_weight must be given with norm={norm!r}, got None")
    check_vector(norm_weight, hidden_size, hidden_states, "norm_weight")
    check_vector(norm_bias, hidden_size, hidden_states, "norm_bias")
    return Norm(norm, norm_weight, norm_bias, norm_eps) if norm is not None else launch.NO_NORM


def multi_head_attention(
    hidden_states: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
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
            `weight_layout` order.
        query_bias, key_bias, value_bias, out_bias: (hidden_size,) or None.
        num_heads: divides hidden_size; head_dim at most 256.
        norm, norm_weight, norm_bias, norm_eps: placement, (hidden_size,) parameters and epsilon of
            the layer norm.
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
    weights = (
        (query_weight, query_bias, "query"),
        (key_weight, key_bias, "key"),
        (value_weight, value_bias, "value"),
    )
    packed = cu_seqlens is not None
    placed = _check_block(
        hidden_states,
        weights,
        out_weight,
        out_bias,
        num_heads,
        norm,
        norm_weight,
        norm_bias,
        norm_eps,
        weight_layout,
        2 if packed else 3,
    )
    head_dim = hidden_states.shape[-1] // num_heads
    if packed:
        assert cu_seqlens is not None
        _check_packing(cu_seqlens, max_seqlen, hidden_states)
        if attention_mask is not None or key_padding_mask is not None:
            raise ValueError("packed tokens take no attention_mask or key_padding_mask")
        mask = launch.NO_MASK
    else:
        batch_size, seq_len, _ = hidden_states.shape
        sizes = (batch_size, num_heads, seq_len, seq_len)
        mask = one_mask(attention_mask, key_padding_mask, hidden_states, sizes)
    return blocks.attention_block(
        hidden_states,
        (query_weight, key_weight, value_weight),
        (query_bias, key_bias, value_bias),
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


def masked_multi_head_attention(
    hidden_states: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
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
        query_weight ... num_heads, norm ... weight_layout: as in `multi_head_attention`.
        key_cache, value_cache: (batch_size, num_heads, capacity, head_dim), equal strides, capacity
            at least past_len + q_len, written in place; or None for no cache (past_len is 0 then).
        past_len: tokens in the cache so far.
        kv_start: (batch_size,), int64: keys before it are left padding.
        attention_mask: bool (True = attend) or additive float, broadcastable to
            (batch_size, num_heads, q_len, past_len + q_len), on top of the causal rule.
    Returns:
        (batch_size, q_len, hidden_size).
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: Radford et al. 2019 (GPT-2). Replaces the attention half of `GPT2Block` and of fairseq's
        decoder layer.
    """
    weights = (
        (query_weight, query_bias, "query"),
        (key_weight, key_bias, "key"),
        (value_weight, value_bias, "value"),
    )
    placed = _check_block(
        hidden_states,
        weights,
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
        (query_weight, key_weight, value_weight),
        (query_bias, key_bias, value_bias),
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
        attention_mask, key_padding_mask: as in `attention`, over kv_len keys.
        num_heads, norm ... weight_layout: as in `multi_head_attention`.
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
