"""Scaled dot-product attention; the blocks built on it are in multi_head_attention.py."""

from __future__ import annotations

from torch import Tensor

from eet_patch.ops import launch
from eet_patch.ops.checks import (
    check_dim,
    check_index,
    check_operand,
    check_same_dtype_and_device,
    check_shape,
)
from eet_patch.ops.masks import one_mask
from eet_patch.ops.registration import registered

MAX_HEAD_DIM = 256


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor | None = None, **_: object
) -> Tensor:
    if cu_seqlens is not None:
        return query.new_empty(query.shape)
    batch_size, num_heads, q_len, head_dim = query.shape
    return query.new_empty(batch_size, q_len, num_heads, head_dim)


@registered(_fake_attention)
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
        check_packing(cu_seqlens, max_seqlen, query)
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


def check_packing(cu_seqlens: Tensor, max_seqlen: int | None, like: Tensor) -> None:
    check_index(cu_seqlens, like, "cu_seqlens")
    check_dim(cu_seqlens, 1, "cu_seqlens")
    if cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must have at least 2 entries, got {cu_seqlens.numel()}")
    if max_seqlen is None or max_seqlen < 1:
        raise ValueError(f"max_seqlen must be at least 1 with cu_seqlens, got {max_seqlen}")
