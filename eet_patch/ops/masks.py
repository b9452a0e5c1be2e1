"""The two public mask arguments, turned into the kernel's form: an address, its kind and four
strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eet_patch.ops._extension import (
    MASK_ADD_ELEMENT,
    MASK_ADD_FLOAT32,
    MASK_BOOL_DROP,
    MASK_BOOL_KEEP,
    NO_MASK,
)
from eet_patch.ops.checks import check_tensor

Mask = tuple[int, int, int, int, int, int]


def broadcast_strides(mask: Tensor, sizes: tuple[int, int, int, int]) -> tuple[int, ...] | None:
    """Strides of a 4-D mask over `sizes`, 0 where it is broadcast; None if it doesn't broadcast to
    them.
    """
    strides = []
    for have, want, stride in zip(mask.shape, sizes, mask.stride(), strict=True):
        if have != want and have != 1:
            return None
        strides.append(stride if have == want and have != 1 else 0)
    return tuple(strides)


def attention_mask_form(mask: Tensor, like: Tensor, sizes: tuple[int, int, int, int]) -> Mask:
    """An additive float mask, or a bool one with True = attend, that broadcasts to (batch, heads,
    q_len, kv_len).
    """
    check_tensor(mask, "attention_mask")
    if mask.dtype == torch.bool:
        kind = MASK_BOOL_KEEP
    elif mask.dtype == torch.float32:
        kind = MASK_ADD_FLOAT32
    elif mask.dtype == like.dtype:
        kind = MASK_ADD_ELEMENT
    else:
        raise TypeError(f"attention_mask must be bool, float32 or {like.dtype}, got {mask.dtype}")
    strides = broadcast_strides(mask, sizes) if mask.dim() == 4 else None
    if strides is None:
        raise ValueError(
            "attention_mask must broadcast to (batch_size, num_heads, q_len, kv_len) = "
            f"{sizes}, got shape {tuple(mask.shape)}"
        )
    if mask.device != like.device:
        raise ValueError(f"attention_mask must be on {like.device}, got {mask.device}")
    return (mask.data_ptr(), kind, *strides)  # type: ignore[return-value]


def key_padding_mask_form(mask: Tensor, like: Tensor, sizes: tuple[int, int, int, int]) -> Mask:
    """A bool mask (batch, kv_len), True = padding."""
    check_tensor(mask, "key_padding_mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, got {mask.dtype}")
    batch, _, _, kv_len = sizes
    if tuple(mask.shape) != (batch, kv_len):
        raise ValueError(
            f"key_padding_mask must have shape {(batch, kv_len)}, got {tuple(mask.shape)}"
        )
    if mask.device != like.device:
        raise ValueError(f"key_padding_mask must be on {like.device}, got {mask.device}")
    return (mask.data_ptr(), MASK_BOOL_DROP, mask.stride(0), 0, 0, mask.stride(1))


def one_mask(
    attention_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    like: Tensor,
    sizes: tuple[int, int, int, int],
) -> Mask:
    if attention_mask is not None and key_padding_mask is not None:
        raise ValueError("give attention_mask or key_padding_mask, not both")
    if attention_mask is not None:
        return attention_mask_form(attention_mask, like, sizes)
    if key_padding_mask is not None:
        return key_padding_mask_form(key_padding_mask, like, sizes)
    return NO_MASK
