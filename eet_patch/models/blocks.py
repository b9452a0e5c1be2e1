"""The generic blocks of the model-level API: one norm, attention, feed-forward and embedding, over
`eet_patch.ops`; layers of them are in layers.py. The classes that users know are in bert.py,
gpt2.py and fairseq_decoder.py.

Blocks hold the very parameters that they are given: nothing is copied, and what changes a parameter
in place changes it for both. They are for inference: a backward pass through them raises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eet_patch import ops
from eet_patch.models.cache import LayerCache


class Projection(NamedTuple):
    """A weight with its bias, as a host's module has them."""

    weight: Tensor
    bias: Tensor | None = None


def projection_of(module: Any) -> Projection:
    """Weight and bias of a Linear or Conv1D."""
    return Projection(module.weight, module.bias)


class LayerNorm(nn.Module):
    """`torch.nn.LayerNorm` over the last dimension.

    Args:
        weight, bias: (hidden_size,), or None for 1 and 0.
        eps: added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> None:
        super().__init__()
        _share(self, "weight", weight)
        _share(self, "bias", bias)
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise each row.

        Args:
            hidden_states: (..., hidden_size), contiguous; float32, float16 or bfloat16, as the
                parameters.
        Returns:
            Like hidden_states.
        Raises:
            ValueError, TypeError: on a shape, dtype, device or layout other than these.
        """
        return ops.layernorm(hidden_states, self.weight, self.bias, self.eps)


def norm_of(module: Any) -> LayerNorm:
    """Our norm over the parameters of a LayerNorm."""
    return LayerNorm(module.weight, module.bias, module.eps)


class _Block(nn.Module):
    """What an attention and a feed-forward block share: the norm, where it stands, the residual."""

    norm: LayerNorm | None

    def __init__(self, norm: LayerNorm | None, placement: str | None, add_residual: bool) -> None:
        super().__init__()
        if (norm is None) != (placement is None):
            raise ValueError(f"norm and its placement go together, got {norm} and {placement!r}")
        self.norm = norm
        self.placement = placement
        self.add_residual = add_residual

    def _norm_arguments(self) -> dict[str, Any]:
        norm = self.norm
        if norm is None:
            return {"norm": None, "add_residual": self.add_residual}
        return {
            "norm": self.placement,
            "norm_weight": norm.weight,
            "norm_bias": norm.bias,
            "norm_eps": norm.eps,
            "add_residual": self.add_residual,
        }


class Attention(_Block):
    """Attention with its projections, and norm and residual where it has them: over its own input,
    causal or not, or over an encoder's output.

    Args:
        num_heads: divides hidden_size.
        query, key, value: the projections. Side by side in one weight: `query` has all three and
            `key` and `value` are None; of cross-attention `key` may have two, and `value` None.
        out: the output projection.
        norm, placement: a norm that stands "pre" or "post" the attention, or None and None.
        add_residual: whether the input is added to the result.
        is_causal: whether later tokens are hidden.
        is_cross: whether keys are an encoder's.
        softmax_scale: factor of the scores. Default: 1 / sqrt(head_dim).
        weight_layout: "out_in" (`nn.Linear`) or "in_out" (`Conv1D`).
    """

    query_weight: Tensor
    query_bias: Tensor | None
    key_weight: Tensor | None
    key_bias: Tensor | None
    value_weight: Tensor | None
    value_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None

    def __init__(
        self,
        num_heads: int,
        query: Projection,
        key: Projection | None,
        value: Projection | None,
        out: Projection,
        *,
        norm: LayerNorm | None = None,
        placement: str | None = None,
        add_residual: bool = True,
        is_causal: bool = False,
        is_cross: bool = False,
        softmax_scale: float | None = None,
        weight_layout: str = "out_in",
    ) -> None:
        super().__init__(norm, placement, add_residual)
        for name, projection in (("query", query), ("key", key), ("value", value), ("out", out)):
            weight, bias = projection if projection is not None else (None, None)
            _share(self, f"{name}_weight", weight)
            _share(self, f"{name}_bias", bias)
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.is_cross = is_cross
        self.softmax_scale = softmax_scale
        self.weight_layout = weight_layout

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: LayerCache | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (batch_size, q_len, hidden_size), contiguous; float32, float16 or
                bfloat16, as the parameters.
            attention_mask: (batch_size, kv_len), non-zero = attend; or (batch_size or 1, num_heads
                or 1, q_len or 1, kv_len), bool (True = attend) or additive. None: every token.
            encoder_hidden_states: (batch_size, kv_len, encoder_size), contiguous; cross-attention
                alone reads it, and only while past_key_values has no keys of it.
            encoder_attention_mask: as attention_mask, over the encoder's tokens.
            past_key_values: the layer's part of a `KVCache`, which new keys and values are written
                to.
            is_causal: overrides the block's own.
        Returns:
            Like hidden_states.
        Raises:
            ValueError, TypeError: on a shape, dtype, device or layout other than these.
        """
        shared = self._norm_arguments() | {
            "softmax_scale": self.softmax_scale,
            "weight_layout": self.weight_layout,
        }
        if self.is_cross:
            key, value = self._encoder_keys(encoder_hidden_states, past_key_values)
            return ops.cross_multi_head_attention(
                hidden_states,
                self.query_weight,
                self.query_bias,
                key,
                value,
                self.out_weight,
                self.out_bias,
                self.num_heads,
                attention_mask=wide_mask(encoder_attention_mask, "encoder_attention_mask"),
                **shared,
            )
        parameters = (
            *(self.query_weight, self.key_weight, self.value_weight),
            *(self.query_bias, self.key_bias, self.value_bias),
            *(self.out_weight, self.out_bias),
        )
        mask = wide_mask(attention_mask, "attention_mask")
        causal = self.is_causal if is_causal is None else is_causal
        if not causal and past_key_values is None:
            return ops.multi_head_attention(
                hidden_states, *parameters, self.num_heads, attention_mask=mask, **shared
            )
        cached = shared
        if past_key_values is not None:
            q_len = hidden_states.shape[1]
            key, value = past_key_values.reserve(hidden_states, self.num_heads, q_len)
            past_len = past_key_values.length
            cached = shared | {"key_cache": key, "value_cache": value, "past_len": past_len}
        out = ops.masked_multi_head_attention(
            hidden_states, *parameters, self.num_heads, attention_mask=mask, **cached
        )
        if past_key_values is not None:
            past_key_values.length += hidden_states.shape[1]
        return out

    def _encoder_keys(
        self, encoder_hidden_states: Tensor | None, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.cross is not None:
            return cache.cross
        if encoder_hidden_states is None or self.key_weight is None:
            raise ValueError("encoder_hidden_states must be given for cross-attention, got None")
        layout = self.weight_layout
        both = ops.linear(
            encoder_hidden_states, self.key_weight, self.key_bias, weight_layout=layout
        )
        if self.value_weight is None:
            key, value = both.chunk(2, dim=-1)
        else:
            key = both
            value = ops.linear(
                encoder_hidden_states, self.value_weight, self.value_bias, weight_layout=layout
            )
        key, value = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (key, value))
        if cache is not None:
            cache.cross = key, value
        return key, value


class FeedForward(_Block):
    """Two products with an activation between them, and norm and residual where it has them.

    Args:
        fc1, fc2: the products, hidden_size to intermediate_size and back.
        activation: "gelu" (by erf), "gelu_tanh", "relu", "silu" or None.
        norm, placement, add_residual, weight_layout: as of `Attention`.
    """

    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None

    def __init__(
        self,
        fc1: Projection,
        fc2: Projection,
        activation: str | None,
        *,
        norm: LayerNorm | None = None,
        placement: str | None = None,
        add_residual: bool = True,
        weight_layout: str = "out_in",
    ) -> None:
        super().__init__(norm, placement, add_residual)
        for name, projection in (("fc1", fc1), ("fc2", fc2)):
            _share(self, f"{name}_weight", projection.weight)
            _share(self, f"{name}_bias", projection.bias)
        self.activation = activation
        self.weight_layout = weight_layout

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`x + fc2(activation(fc1(x)))`, normalised before or after.

        Args:
            hidden_states: (..., hidden_size), contiguous; float32, float16 or bfloat16, as the
                parameters.
        Returns:
            Like hidden_states.
        Raises:
            ValueError, TypeError: on a shape, dtype, device or layout other than these.
        """
        return ops.ffn(
            hidden_states,
            self.fc1_weight,
            self.fc1_bias,
            self.fc2_weight,
            self.fc2_bias,
            activation=self.activation,
            weight_layout=self.weight_layout,
            **self._norm_arguments(),
        )


class Embedding(nn.Module):
    """Words, positions and token types, and the norm of their sum.

    Args:
        word_weight: (vocab_size, hidden_size).
        position_weight: (num_positions, hidden_size), or None for no positions.
        token_type_weight: (num_token_types, hidden_size), or None.
        norm: of the sum, or None.
        word_scale: factor of the words.
        padding_idx: positions count the tokens other than this one, and begin behind it (RoBERTa,
            fairseq). None: they count all tokens, from 0.
        types_are_words: whether token types are looked up among the words (GPT-2).
    """

    word_weight: Tensor
    position_weight: Tensor | None
    token_type_weight: Tensor | None
    norm: LayerNorm | None

    def __init__(
        self,
        word_weight: Tensor,
        position_weight: Tensor | None = None,
        token_type_weight: Tensor | None = None,
        norm: LayerNorm | None = None,
        word_scale: float = 1.0,
        padding_idx: int | None = None,
        types_are_words: bool = False,
    ) -> None:
        super().__init__()
        _share(self, "word_weight", word_weight)
        _share(self, "position_weight", position_weight)
        _share(self, "token_type_weight", token_type_weight)
        self.norm = norm
        self.word_scale = word_scale
        self.padding_idx = padding_idx
        self.types_are_words = types_are_words

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        """Look up and add.

        Args:
            input_ids: (batch_size, seq_len), int64.
            token_type_ids: (batch_size or 1, seq_len), int64. None: type 0 of every token, where
                the block has types of its own.
            position_ids: (batch_size or 1, seq_len), int64. None: counted, see `padding_idx`.
            past_key_values_length: tokens before these, counted into the positions.
        Returns:
            (batch_size, seq_len, hidden_size).
        Raises:
            ValueError, TypeError: on a shape, dtype, device or layout other than these.
            IndexError: an id outside its table (CPU; on CUDA the kernel traps).
        """
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            raise ValueError("input_ids must be a tensor (batch_size, seq_len)")
        if position_ids is None and self.position_weight is not None:
            position_ids = self.positions(input_ids, past_key_values_length)
        norm, type_weight = self.norm, self.token_type_weight
        if self.types_are_words and token_type_ids is not None:
            type_weight = self.word_weight
        return ops.embedding(
            input_ids.contiguous(),
            self.word_weight,
            None if position_ids is None else position_ids.contiguous(),
            self.position_weight,
            None if token_type_ids is None else token_type_ids.contiguous(),
            type_weight,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            1e-12 if norm is None else norm.eps,
            self.word_scale,
        )

    def positions(self, input_ids: Tensor, past_len: int = 0) -> Tensor:
        """(batch_size or 1, seq_len), int64: the position of each token."""
        if self.padding_idx is None:
            count = input_ids.shape[1]
            return torch.arange(past_len, past_len + count, device=input_ids.device)[None]
        is_token = input_ids != self.padding_idx
        return (is_token.cumsum(1) + past_len) * is_token + self.padding_idx


def wide_mask(mask: Tensor | None, name: str) -> Tensor | None:
    """A mask over (batch_size, num_heads, q_len, kv_len), as the ops take it."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask != 0)[:, None, None, :]
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return mask
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise ValueError(f"{name} must have 2 or 4 dimensions, got {shape}")


def _share(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Registers a parameter as the very object, and any other tensor as a buffer."""
    if value is None or isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value, persistent=False)
