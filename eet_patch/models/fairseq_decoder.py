"""EETTransformer...: the generic blocks over the parameters of fairseq's decoder modules.

fairseq has (seq_len, batch_size, embed_dim); the blocks beneath have the batch first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eet_patch import ops
from eet_patch.adapters.fairseq_host import activation_of
from eet_patch.models.blocks import (
    Attention,
    Embedding,
    FeedForward,
    LayerNorm,
    norm_of,
    projection_of,
    wide_mask,
)
from eet_patch.models.cache import KVCache, LayerCache
from eet_patch.models.hosts import from_host, refuse_given
from eet_patch.models.layers import Layer

CACHE = "eet_patch.cache"  # our key of an incremental_state


def cache_of(incremental_state: dict[str, Any] | None) -> KVCache | None:
    """The cache that an incremental_state holds, made when it is first asked for."""
    if incremental_state is None:
        return None
    cache = incremental_state.setdefault(CACHE, KVCache())
    if not isinstance(cache, KVCache):
        raise TypeError(f"incremental_state[{CACHE!r}] must be a KVCache, got {type(cache)}")
    return cache


def _batch_first(x: Tensor, name: str) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() != 3:
        raise ValueError(f"{name} must be a tensor (seq_len, batch_size, embed_dim)")
    return x.transpose(0, 1).contiguous()


def _one_mask(attn_mask: Tensor | None, padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """fairseq's two masks, additive (q_len, kv_len) and True = padding, as one."""
    keep = None if padding_mask is None else ~padding_mask.bool()[:, None, None, :]
    if attn_mask is None:
        return keep
    if attn_mask.dim() != 2:
        raise ValueError(f"attn_mask must be (q_len, kv_len), got {tuple(attn_mask.shape)}")
    added = attn_mask.to(like)[None, None]
    return added if keep is None else added.masked_fill(~keep, -torch.inf)


class EETTransformerLayerNorm(LayerNorm):
    """`torch.nn.LayerNorm`, as fairseq has it."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETTransformerLayerNorm:
        """Share the parameters of a LayerNorm.

        Raises:
            TypeError: `module` has not the parts of a LayerNorm.
        """
        return cls(module.weight, module.bias, module.eps)


class EETTransformerEmbedding(Embedding):
    """What stands before a decoder's first layer: scaled words, learned or sinusoidal positions,
    and their norm where there is one.
    """

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETTransformerEmbedding:
        """Share the embeddings of a TransformerDecoder. A sinusoidal table, which is no parameter,
        is kept in the words' dtype.

        Raises:
            TypeError: `module` has not their parts.
            ValueError: embeddings of another size than the layers, or adaptive ones.
        """
        if module.project_in_dim is not None:
            raise ValueError("module must have words as wide as its layers, got a project_in_dim")
        words, positions = module.embed_tokens.weight, module.embed_positions
        table = None
        if positions is not None:
            table = positions.weight if hasattr(positions, "weight") else positions.weights
            if not isinstance(table, nn.Parameter):
                table = table.to(words.dtype)
        norm = module.layernorm_embedding
        return cls(
            words,
            table,
            norm=None if norm is None else norm_of(norm),
            word_scale=float(module.embed_scale),
            padding_idx=module.padding_idx,
        )


class EETTransformerAttention(Attention):
    """`MultiheadAttention`; with the norm that goes with it, that part of a decoder layer."""

    layer_idx = 0  # of the cache's layers, where a module is used alone

    @classmethod
    @from_host
    def from_torch(
        cls, module: Any, norm: Any = None, normalize_before: bool = False
    ) -> EETTransformerAttention:
        """Share the parameters of a MultiheadAttention.

        Args:
            module: a MultiheadAttention of a decoder: self-attention or encoder-decoder attention.
            norm: the LayerNorm that goes with it; the block then adds its input to the result, as
                the layer does. None: the attention alone.
            normalize_before: whether that norm stands before the attention.
        Raises:
            TypeError: `module` has not the parts of a MultiheadAttention.
            ValueError: bias_k, add_zero_attn, or keys and values of different sizes.
        """
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("module must not have bias_k or add_zero_attn")
        if module.kdim != module.vdim:
            raise ValueError("module must have keys and values of one size")
        placement = None if norm is None else "pre" if normalize_before else "post"
        return cls(
            module.num_heads,
            projection_of(module.q_proj),
            projection_of(module.k_proj),
            projection_of(module.v_proj),
            projection_of(module.out_proj),
            norm=None if norm is None else norm_of(norm),
            placement=placement,
            add_residual=norm is not None,
            is_cross=bool(module.encoder_decoder_attention),
            softmax_scale=float(module.scaling),
        )

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict[str, Any] | None = None,
        need_weights: bool = False,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Attend, with fairseq's arguments.

        Args:
            query: (q_len, batch_size, embed_dim); float32, float16 or bfloat16.
            key, value: of encoder-decoder attention the encoder's output (kv_len, batch_size,
                kdim), the same in both; else query again, or None.
            key_padding_mask: (batch_size, kv_len), True = padding.
            incremental_state: a dictionary that holds our `KVCache` between calls: keys of earlier
                calls count too, and later tokens are hidden.
            need_weights: must be False: the kernels don't form the weights.
            static_kv: ignored; an encoder's keys are kept where there is an incremental_state.
            attn_mask: (q_len, kv_len), additive.
            others: further arguments of MultiheadAttention, which must be None or False.
        Returns:
            (q_len, batch_size, embed_dim), and None for the weights.
        Raises:
            ValueError, TypeError: on a shape, dtype, device or argument other than these.
        """
        refuse_given(others | {"need_weights": need_weights})
        hidden_states = _batch_first(query, "query")
        cache = cache_of(incremental_state)
        layer = None if cache is None else cache.layer(self.layer_idx)
        mask = _one_mask(attn_mask, key_padding_mask, query)
        encoder = None
        if self.is_cross and key is not None:
            encoder = _batch_first(key, "key")
        out = self.attend(hidden_states, mask, encoder, mask, layer)
        return out.transpose(0, 1), None

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """`Attention.forward`: the batch first, and our masks."""
        return super().forward(*args, **kwargs)


class EETTransformerFeedforward(FeedForward):
    """The feed-forward half of a decoder layer: `fc1`, `fc2`, residual and `final_layer_norm`."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETTransformerFeedforward:
        """Share the parameters of a TransformerDecoderLayer's (or encoder layer's) second half.

        Raises:
            TypeError: `module` has not their parts.
            ValueError: an activation without a kernel.
        """
        activation = activation_of(module.activation_fn)
        if isinstance(activation, str):
            raise ValueError(activation)
        if activation.function is not None:
            raise ValueError(f"there is no kernel for the activation {activation.function}")
        return cls(
            projection_of(module.fc1),
            projection_of(module.fc2),
            activation.kernel,
            norm=norm_of(module.final_layer_norm),
            placement="pre" if module.normalize_before else "post",
        )


class EETTransformerDecoderLayer(Layer):
    """`TransformerDecoderLayer`, with and without encoder attention, pre- and post-norm."""

    layer_idx = 0
    attention: EETTransformerAttention
    cross_attention: EETTransformerAttention | None

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETTransformerDecoderLayer:
        """Share the parameters of a TransformerDecoderLayer.

        Raises:
            TypeError: `module` has not its parts.
            ValueError: attn_ln, c_attn, ffn_layernorm, w_resid or cross_self_attention, which the
                kernels don't know; or as the parts'.
        """
        for name in ("attn_ln", "c_attn", "ffn_layernorm", "w_resid"):
            if getattr(module, name) is not None:
                raise ValueError(f"module must not have a {name}")
        if module.cross_self_attention:
            raise ValueError("module must not have cross_self_attention")
        before, cross = bool(module.normalize_before), module.encoder_attn
        return cls(
            EETTransformerAttention.from_torch(
                module.self_attn, module.self_attn_layer_norm, before
            ),
            EETTransformerFeedforward.from_torch(module),
            None
            if cross is None
            else EETTransformerAttention.from_torch(cross, module.encoder_attn_layer_norm, before),
        )

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        encoder_out: Tensor | None = None,
        encoder_padding_mask: Tensor | None = None,
        incremental_state: dict[str, Any] | None = None,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None, None]:
        """Run the layer, with fairseq's arguments.

        Args:
            x: (seq_len, batch_size, embed_dim); float32, float16 or bfloat16.
            encoder_out: (kv_len, batch_size, kdim), for a layer with encoder attention.
            encoder_padding_mask: (batch_size, kv_len), True = padding.
            incremental_state: as of `EETTransformerAttention.forward`.
            self_attn_mask: (seq_len, seq_len), additive: the decoder's mask of later tokens.
            self_attn_padding_mask: (batch_size, kv_len), True = padding.
            others: further arguments of TransformerDecoderLayer, which must be None or False.
        Returns:
            (seq_len, batch_size, embed_dim), None for the weights, None.
        Raises:
            ValueError, TypeError: on a shape, dtype, device or argument other than these.
        """
        refuse_given(others)
        mask = _one_mask(self_attn_mask, self_attn_padding_mask, x)
        cache = cache_of(incremental_state)
        out = self.run(
            _batch_first(x, "x"),
            mask,
            None if encoder_out is None else _batch_first(encoder_out, "encoder_out"),
            None if encoder_padding_mask is None else ~encoder_padding_mask.bool(),
            None if cache is None else cache.layer(self.layer_idx),
            False,
        )
        return out.transpose(0, 1), None, None

    def run(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        cache: LayerCache | None,
        is_causal: bool,
    ) -> Tensor:
        """`Layer.forward`: the batch first, and our masks."""
        hidden_states = self.attention.attend(
            hidden_states, attention_mask, None, None, cache, is_causal
        )
        has_keys = cache is not None and cache.cross is not None
        if self.cross_attention is not None and (encoder_hidden_states is not None or has_keys):
            hidden_states = self.cross_attention.attend(
                hidden_states, None, encoder_hidden_states, encoder_attention_mask, cache
            )
        out: Tensor = self.feed_forward(hidden_states)
        return out


class EETTransformerDecoder(nn.Module):
    """`TransformerDecoder` of translation and language models."""

    output_weight: Tensor

    def __init__(
        self,
        embeddings: EETTransformerEmbedding,
        layers: list[EETTransformerDecoderLayer],
        norm: LayerNorm | None,
        output_weight: Tensor,
        padding_idx: int,
    ) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.layers = nn.ModuleList(layers)
        for index, layer in enumerate(layers):
            layer.layer_idx = index
        self.norm = norm
        self.register_parameter("output_weight", output_weight)  # type: ignore[arg-type]
        self.padding_idx = padding_idx

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETTransformerDecoder:
        """Share the parameters of a TransformerDecoder.

        Raises:
            TypeError: `module` has not its parts.
            ValueError: adaptive softmax, projections around the layers, or as the layers'.
        """
        if module.adaptive_softmax is not None or module.project_out_dim is not None:
            raise ValueError("module must not have an adaptive softmax or a project_out_dim")
        norm, head = module.layer_norm, module.output_projection
        if getattr(head, "bias", None) is not None:
            raise ValueError("module must have an output projection without a bias")
        made = cls(
            EETTransformerEmbedding.from_torch(module),
            [EETTransformerDecoderLayer.from_torch(layer) for layer in module.layers],
            None if norm is None else norm_of(norm),
            head.weight,
            module.padding_idx,
        )
        return made.eval()

    @classmethod
    def from_pretrained(cls, path: str, data: str | None = None) -> EETTransformerDecoder:
        """Load the decoder of a checkpoint.

        Args:
            path: a checkpoint, as `checkpoint_best.pt`.
            data: the folder with its dictionaries. None: what the checkpoint names.
        Raises:
            OSError: there is no such file.
            ImportError: fairseq is not installed.
            TypeError, ValueError: as `from_torch`.
        """
        import argparse

        from fairseq import checkpoint_utils

        overrides = {} if data is None else {"data": data}
        # From torch 2.6 on options such as its checkpoints hold must be allowed.
        with torch.serialization.safe_globals([argparse.Namespace]):
            models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
                [path], arg_overrides=overrides
            )
        return cls.from_torch(models[0].decoder)

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, list[Tensor]] | None = None,
        incremental_state: dict[str, Any] | None = None,
        features_only: bool = False,
        full_context_alignment: bool = False,
        src_lengths: Any = None,
        **others: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run target tokens, with fairseq's arguments.

        Args:
            prev_output_tokens: (batch_size, tgt_len), int64, all tokens so far. With an
                incremental_state those that it doesn't hold yet are run at once: a prefix costs one
                pass. Padding, to the left or right, counts into no position.
            encoder_out: what the encoder returned: `encoder_out` (src_len, batch_size, embed_dim)
                and `encoder_padding_mask` (batch_size, src_len), each in a list.
            incremental_state: a dictionary, empty at first, that holds our `KVCache`.
            features_only: leave the output projection out.
            full_context_alignment: let tokens see later ones.
            src_lengths: ignored.
            others: further arguments of TransformerDecoder, which must be None or False.
        Returns:
            (batch_size, new_len, vocab_size), or embed_dim with features_only; and a dictionary
            whose `attn` is [None], for the kernels don't form the weights.
        Raises:
            ValueError, TypeError: on a shape, dtype, device or argument other than these.
            IndexError: a token outside the vocabulary (CPU; on CUDA the kernel traps).
        """
        refuse_given(others)
        tokens = prev_output_tokens
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            raise ValueError("prev_output_tokens must be a tensor (batch_size, tgt_len)")
        cache = cache_of(incremental_state)
        past_len = 0 if cache is None else cache.get_seq_length()
        if not past_len < tokens.shape[1]:
            raise ValueError(
                f"prev_output_tokens must hold more than the {past_len} tokens of the "
                f"incremental_state, got {tokens.shape[1]}"
            )
        mask = None
        is_padding = tokens == self.padding_idx
        if cache is not None or bool(is_padding.any()):
            mask = wide_mask(~is_padding, "prev_output_tokens")
        encoder, encoder_mask = _encoder_parts(encoder_out)
        positions = self.embeddings.positions(tokens)[:, past_len:]
        hidden_states = self.embeddings(tokens[:, past_len:], None, positions)
        for index, layer in enumerate(self.layers):
            part = None if cache is None else cache.layer(index)
            hidden_states = layer.run(  # type: ignore[operator]
                hidden_states, mask, encoder, encoder_mask, part, not full_context_alignment
            )
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        extra = {"attn": [None], "inner_states": None}
        return (hidden_states if features_only else self.output_layer(hidden_states)), extra

    def output_layer(self, features: Tensor) -> Tensor:
        """Project (..., embed_dim), contiguous, to (..., vocab_size)."""
        return ops.linear(features, self.output_weight)

    def reorder_incremental_state(
        self, incremental_state: dict[str, Any], new_order: Tensor
    ) -> None:
        """Go on with the rows `new_order` (new_batch_size,), int64: beams in another order, or a
        batch of which rows have ended.
        """
        cache = cache_of(incremental_state)
        if cache is not None:
            cache.reorder(new_order)

    def max_positions(self) -> int:
        """Tokens that the table of positions has room for."""
        table = self.embeddings.position_weight
        return 10**5 if table is None else int(table.shape[0]) - self.padding_idx - 1


def _encoder_parts(
    encoder_out: dict[str, list[Tensor]] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """An encoder's output with the batch first, and its mask, True = attend."""
    if encoder_out is None or not encoder_out["encoder_out"]:
        return None, None
    padding = encoder_out.get("encoder_padding_mask") or [None]  # type: ignore[list-item]
    mask = None if padding[0] is None else ~padding[0].bool()
    return _batch_first(encoder_out["encoder_out"][0], "encoder_out"), mask
