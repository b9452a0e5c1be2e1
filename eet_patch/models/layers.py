"""The generic layer and stack of layers of the model-level API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from eet_patch.models.blocks import Attention, FeedForward, LayerNorm, wide_mask
from eet_patch.models.cache import LayerCache


class Layer(nn.Module):
    """Self-attention, cross-attention where there is one, and feed-forward."""

    feed_forward: FeedForward

    def __init__(
        self,
        attention: Attention,
        feed_forward: FeedForward,
        cross_attention: Attention | None = None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: LayerCache | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Run the layer. Args, Returns, Raises: as `Attention.forward`."""
        hidden_states = self.attention(
            hidden_states,
            attention_mask,
            past_key_values=past_key_values,
            is_causal=is_causal,
        )
        has_keys = past_key_values is not None and past_key_values.cross is not None
        if self.cross_attention is not None and (encoder_hidden_states is not None or has_keys):
            hidden_states = self.cross_attention(
                hidden_states,
                None,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
            )
        out: Tensor = self.feed_forward(hidden_states)
        return out


class Stack(nn.Module):
    """Layers one after the other, and the norm behind them where there is one."""

    norm: LayerNorm | None

    def __init__(self, layers: Iterable[Layer], norm: LayerNorm | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            past_key_values: a `KVCache`, or None.
            hidden_states ... encoder_attention_mask, is_causal: as of `Attention.forward`.
        Returns:
            Like hidden_states.
        Raises:
            ValueError, TypeError: as `Attention.forward`.
        """
        # Once for all layers.
        mask = wide_mask(attention_mask, "attention_mask")
        encoder_mask = wide_mask(encoder_attention_mask, "encoder_attention_mask")
        for index, layer in enumerate(self.layers):
            cache = None if past_key_values is None else past_key_values.layer(index)
            hidden_states = layer(
                hidden_states, mask, encoder_hidden_states, encoder_mask, cache, is_causal
            )
        return hidden_states if self.norm is None else self.norm(hidden_states)
