"""EETGPT2...: the generic blocks over the parameters of transformers' GPT-2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import eet_patch
from eet_patch import ops, patching
from eet_patch.adapters import host
from eet_patch.adapters.gpt2 import softmax_scale
from eet_patch.models.blocks import (
    Attention,
    Embedding,
    FeedForward,
    LayerNorm,
    norm_of,
    projection_of,
)
from eet_patch.models.cache import KVCache
from eet_patch.models.hosts import HostReference, from_host, kernel_of, refuse_given
from eet_patch.models.layers import Layer, Stack


class EETLayerNorm(LayerNorm):
    """`torch.nn.LayerNorm`, as GPT-2 has it."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETLayerNorm:
        """Share the parameters of a LayerNorm.

        Raises:
            TypeError: `module` has not the parts of a LayerNorm.
        """
        return cls(module.weight, module.bias, module.eps)


class EETGPT2Embedding(Embedding):
    """`wte` and `wpe` of a GPT2Model. Token types are looked up among the words."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETGPT2Embedding:
        """Share the embeddings of a GPT2Model.

        Raises:
            TypeError: `module` has no wte and wpe.
        """
        return cls(module.wte.weight, module.wpe.weight, types_are_words=True)


class EETGPT2Attention(Attention):
    """`GPT2Attention`; with the norm before it, that half of a `GPT2Block`."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any, norm: Any = None) -> EETGPT2Attention:
        """Share the parameters of a GPT2Attention.

        Args:
            module: a GPT2Attention, of self- or cross-attention.
            norm: the LayerNorm before it; the block then adds its input to the result, as the layer
                does. None: the attention alone.
        Raises:
            TypeError: `module` has not the parts of a GPT2Attention.
            ValueError: reorder_and_upcast_attn, which the kernels don't know.
        """
        if module.reorder_and_upcast_attn:
            raise ValueError("module must not have reorder_and_upcast_attn, got True")
        scale = softmax_scale(module, host.attention_implementation(module.config))
        is_cross = bool(module.is_cross_attention)
        query = module.q_attn if is_cross else module.c_attn
        return cls(
            module.num_heads,
            projection_of(query),
            projection_of(module.c_attn) if is_cross else None,
            None,
            projection_of(module.c_proj),
            norm=None if norm is None else norm_of(norm),
            placement=None if norm is None else "pre",
            add_residual=norm is not None,
            is_causal=not is_cross,
            is_cross=is_cross,
            softmax_scale=scale,
            weight_layout="in_out",
        )


class EETGPT2Feedforward(FeedForward):
    """`GPT2MLP`; with the norm before it, that half of a `GPT2Block`."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any, norm: Any = None) -> EETGPT2Feedforward:
        """Share the parameters of a GPT2MLP.

        Args:
            module: a GPT2MLP.
            norm: as of `EETGPT2Attention.from_torch`.
        Raises:
            TypeError: `module` has not the parts of a GPT2MLP.
            ValueError: an activation without a kernel.
        """
        return cls(
            projection_of(module.c_fc),
            projection_of(module.c_proj),
            kernel_of(module.act),
            norm=None if norm is None else norm_of(norm),
            placement=None if norm is None else "pre",
            add_residual=norm is not None,
            weight_layout="in_out",
        )


class EETGPT2DecoderLayer(Layer):
    """`GPT2Block`. Its forward returns hidden states alone."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETGPT2DecoderLayer:
        """Share the parameters of a GPT2Block.

        Raises:
            TypeError, ValueError: as `EETGPT2Attention` and `EETGPT2Feedforward`.
        """
        cross = getattr(module, "crossattention", None)
        return cls(
            EETGPT2Attention.from_torch(module.attn, module.ln_1),
            EETGPT2Feedforward.from_torch(module.mlp, module.ln_2),
            None if cross is None else EETGPT2Attention.from_torch(cross, module.ln_cross_attn),
        )


class EETGPT2Decoder(Stack):
    """The blocks of a `GPT2Model` and the norm behind them. Its forward takes and returns hidden
    states.
    """

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETGPT2Decoder:
        """Share the parameters of a GPT2Model's blocks and last norm.

        Raises:
            TypeError, ValueError: as `EETGPT2DecoderLayer.from_torch`.
        """
        layers = [EETGPT2DecoderLayer.from_torch(block) for block in module.h]
        return cls(layers, EETLayerNorm.from_torch(module.ln_f))


class EETGPT2Model(nn.Module):
    """`GPT2Model`; made from a `GPT2LMHeadModel`, its `generate()` too."""

    lm_head_weight: Tensor | None

    def __init__(
        self,
        config: Any,
        embeddings: EETGPT2Embedding,
        decoder: EETGPT2Decoder,
        head: Any = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = embeddings
        self.decoder = decoder
        # Shares every parameter, so it is no submodule; `_apply` keeps its buffers in step.
        self._head = HostReference(head)
        weight = None if head is None else head.lm_head.weight
        self.register_parameter("lm_head_weight", weight)

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETGPT2Model:
        """Share the parameters of a GPT2Model or GPT2LMHeadModel.

        Raises:
            TypeError: `module` has not their parts.
            ValueError: an activation or option without a kernel.
        """
        head = module if hasattr(module, "lm_head") else None
        beneath = module if head is None else module.transformer
        made = cls(
            beneath.config,
            EETGPT2Embedding.from_torch(beneath),
            EETGPT2Decoder.from_torch(beneath),
            head,
        )
        return made.eval()

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> EETGPT2Model:
        """Load a model of a folder or of the hub, with its language model head.

        Args:
            path: a folder, or a hub id.
            options: those of transformers' `from_pretrained`, as dtype or revision.
        Raises:
            OSError: there is no such model.
            ImportError: transformers is not installed.
            TypeError, ValueError: as `from_torch`.
        """
        from transformers import GPT2LMHeadModel

        return cls.from_torch(GPT2LMHeadModel.from_pretrained(path, **options).eval())

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: KVCache | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Run a prompt, or the next tokens behind a cache.

        Args:
            input_ids: (batch_size, q_len), int64: what the cache doesn't hold yet.
            past_key_values: what an earlier call returned, which is written in place.
            attention_mask: (batch_size, past_len + q_len), 1 = a token, 0 = padding, or 4-D, see
                `Attention.forward`. None: no padding.
            token_type_ids: (batch_size or 1, q_len), int64, ids of words. None: none.
            position_ids: (batch_size or 1, q_len), int64. None: counted from past_len on, padding
                or not, as GPT2Model does.
            encoder_hidden_states: (batch_size, kv_len, hidden_size), contiguous, for a model with
                cross-attention.
            encoder_attention_mask: (batch_size, kv_len), 1 = a token.
            use_cache: whether to make a cache where none is given. None: the configuration's.
            return_dict: whether transformers' output class is returned, or a tuple.
            others: further arguments of GPT2Model, which must be None or False.
        Returns:
            BaseModelOutputWithPastAndCrossAttentions with last_hidden_state (batch_size, q_len,
            hidden_size) and past_key_values, a `KVCache` or None.
        Raises:
            ValueError, TypeError: on a shape, dtype, device, cache or argument other than these.
            IndexError: an id outside its table (CPU; on CUDA the kernel traps).
        """
        refuse_given(others)
        if past_key_values is not None and not isinstance(past_key_values, KVCache):
            raise TypeError(
                "past_key_values must be a KVCache of eet_patch.models, got "
                f"{type(past_key_values).__name__}; the patched GPT2Model takes transformers' own"
            )
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", False))
        if use_cache and past_key_values is None:
            past_key_values = KVCache()
        past_len = 0 if past_key_values is None else past_key_values.get_seq_length()
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, past_len)
        hidden_states = self.decoder(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            past_key_values,
        )
        if not return_dict:
            return (hidden_states, past_key_values)
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,  # type: ignore[arg-type]
        )

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The language model head.

        Args:
            hidden_states: (..., hidden_size), contiguous, as `forward` returns them.
        Returns:
            (..., vocab_size).
        Raises:
            ValueError: the model was made without a head; or a shape, dtype or layout.
        """
        if self.lm_head_weight is None:
            raise ValueError("the model has no head: make it from a GPT2LMHeadModel")
        return ops.linear(hidden_states, self.lm_head_weight)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`GPT2LMHeadModel.generate`, patched: its arguments, its result, its tokens.

        Where the patch is off, it is on for the time of the call, in all threads.

        Raises:
            ValueError: the model was made without a head; or what `generate` itself raises.
        """
        head = self._head.module
        if head is None:
            raise ValueError("the model has no head: make it from a GPT2LMHeadModel")
        if patching.is_enabled():
            return head.generate(*args, **kwargs)
        with eet_patch.enabled():
            return head.generate(*args, **kwargs)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        super()._apply(fn, *args, **kwargs)
        self._head.apply_to_buffers(fn)
        return self
