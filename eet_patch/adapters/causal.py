"""What the adapters of decoder layers share: which keys a call's self-attention sees, from the
host's mask and cache, and the checks of norms and products beside each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eet_patch.adapters import kv_cache
from eet_patch.adapters.host import HostMask, host_mask, linear_reason, norm_reason
from eet_patch.gates import submodule_reason
from eet_patch.ops.launch import Norm


class Sight(NamedTuple):
    """What the queries of a call see."""

    mask: HostMask
    kv_len: int
    causal: bool
    crop: bool  # without a mask only the first q_len keys count, however long the cache


def sight_of(
    hidden_states: Tensor,
    attention_mask: Any,
    cache: Any,
    layer_idx: int,
    num_heads: int,
    implementation: str,
    eager_is_causal: bool = False,
    cuts_masks: bool = False,
) -> Sight | str:
    """What the queries of a self-attention see, or why that can't be told.

    Args:
        cache: of the layer's own keys, or None.
        implementation: "sdpa", "eager" or "flash".
        eager_is_causal: the host's eager attention applies causality itself, and does not leave it
            to the mask.
        cuts_masks: the host's eager attention reads of a longer mask what covers the keys.
    """
    batch, q_len, _ = hidden_states.shape
    kv_len = q_len
    if cache is not None:
        if type(cache).__name__ == "EncoderDecoderCache":
            return "self-attention with an EncoderDecoderCache"
        length = kv_cache.kv_length(cache, layer_idx, q_len)
        if isinstance(length, str):
            return length
        kv_len = length
    if type(attention_mask) is Tensor:
        if implementation != "flash" and attention_mask.dim() == 2:
            return f"the attention mask has two dimensions, with {implementation} attention"
        if implementation == "eager":
            if attention_mask.dtype == torch.bool:
                return "the attention mask is bool, and eager attention adds it to the scores"
            if cuts_masks:
                attention_mask = attention_mask[..., :kv_len]
    mask = host_mask(attention_mask, hidden_states, (batch, num_heads, q_len, kv_len))
    if isinstance(mask, str):
        return mask
    causal = crop = False
    if q_len > 1:
        if implementation == "eager":
            causal = eager_is_causal
        elif implementation == "sdpa":
            # Without a mask sdpa aligns causality with the first key, and keys beyond q_len don't
            # count.
            causal = crop = attention_mask is None
        else:
            causal = True
    return Sight(mask, kv_len, causal, crop)


def norm_of(module: nn.LayerNorm, placement: str = "pre") -> Norm:
    parameters = module._parameters
    return Norm(placement, parameters["weight"], parameters["bias"], module.eps)


def norms_reason(like: Tensor, *norms: Any) -> str | None:
    """Why a LayerNorm of hidden_size can't be read in place, or None."""
    for norm in norms:
        reason = submodule_reason(norm, nn.LayerNorm) or norm_reason(norm, like, like.shape[-1])
        if reason is not None:
            return reason
    return None


def products_reason(like: Tensor, cls: type, *products: tuple[Any, int, int]) -> str | None:
    """Why one of the products (module, in_features, out_features) can't be read in place, or None.

    Args:
        cls: nn.Linear, or the host's Conv1D, whose weight is (in_features, out_features).
    """
    for module, in_features, out_features in products:
        reason = submodule_reason(module, cls) or linear_reason(
            module, like, in_features, out_features, cls is not nn.Linear
        )
        if reason is not None:
            return reason
    return None


def activation_reason(module: Any) -> str | None:
    """Why an activation may not be skipped, or None; what it is, `activation_of` says. A function
    in a module's place is no submodule.
    """
    return None if module is None else submodule_reason(module, type(module))


def out_features(module: Any, dim: int) -> int:
    """How wide a product is by its weight, or 0 where it has none that could be read."""
    weight = module._parameters.get("weight")
    return weight.shape[dim] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
