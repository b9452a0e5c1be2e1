"""EETBert...: the generic blocks over the parameters of transformers' BERT and its family."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eet_patch import ops
from eet_patch.models.blocks import (
    Attention,
    Embedding,
    FeedForward,
    Projection,
    norm_of,
    projection_of,
)
from eet_patch.models.hosts import from_host, kernel_of, refuse_given
from eet_patch.models.layers import Layer, Stack


class EETBertEmbedding(Embedding):
    """`BertEmbeddings`: words, positions and token types, normalised. RoBERTa's too."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETBertEmbedding:
        """Share the parameters of BertEmbeddings or RobertaEmbeddings.

        Raises:
            TypeError: `module` has not their parts.
        """
        return cls(
            module.word_embeddings.weight,
            module.position_embeddings.weight,
            module.token_type_embeddings.weight,
            norm_of(module.LayerNorm),
            padding_idx=getattr(module, "padding_idx", None),
        )


class EETBertAttention(Attention):
    """`BertAttention`: self-attention, output projection, residual and norm."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETBertAttention:
        """Share the parameters of a BertAttention.

        Raises:
            TypeError: `module` has not its parts.
            ValueError: relative positions.
        """
        own, output = module.self, module.output
        positions = getattr(own, "position_embedding_type", "absolute")
        if positions != "absolute":
            raise ValueError(f"module must have absolute positions, got {positions!r}")
        return cls(
            own.num_attention_heads,
            projection_of(own.query),
            projection_of(own.key),
            projection_of(own.value),
            projection_of(output.dense),
            norm=norm_of(output.LayerNorm),
            placement="post",
            is_causal=bool(getattr(own, "is_causal", False) or getattr(own, "is_decoder", False)),
        )


class EETBertFeedforward(FeedForward):
    """`BertIntermediate` and `BertOutput`: the feed-forward block, residual and norm."""

    @classmethod
    @from_host
    def from_torch(cls, module: Any, output: Any = None) -> EETBertFeedforward:
        """Share the parameters of a BertLayer's feed-forward half.

        Args:
            module: a BertLayer, or its BertIntermediate.
            output: the BertOutput that goes with a BertIntermediate.
        Raises:
            TypeError: `module` has not their parts.
            ValueError: an activation without a kernel.
        """
        intermediate = module.intermediate if output is None else module
        output = module.output if output is None else output
        return cls(
            projection_of(intermediate.dense),
            projection_of(output.dense),
            kernel_of(intermediate.intermediate_act_fn),
            norm=norm_of(output.LayerNorm),
            placement="post",
        )


class EETBertEncoderLayer(Layer):
    """`BertLayer`. Its forward takes hidden_states (batch_size, seq_len, hidden_size) and
    attention_mask, and returns hidden states alone.
    """

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETBertEncoderLayer:
        """Share the parameters of a BertLayer.

        Raises:
            TypeError: `module` has not its parts.
            ValueError: cross-attention, which this class has not.
        """
        if hasattr(module, "crossattention"):
            raise ValueError("module must be an encoder's layer, got one with cross-attention")
        return cls(
            EETBertAttention.from_torch(module.attention), EETBertFeedforward.from_torch(module)
        )


class EETBertEncoder(Stack):
    """`BertEncoder`: all layers. Its forward takes hidden_states (batch_size, seq_len, hidden_size)
    and attention_mask, and returns hidden states alone.
    """

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETBertEncoder:
        """Share the parameters of a BertEncoder.

        Raises:
            TypeError, ValueError: as `EETBertEncoderLayer.from_torch`.
        """
        return cls(EETBertEncoderLayer.from_torch(layer) for layer in module.layer)


class EETBertModel(nn.Module):
    """`BertModel`, and the models that are BertModel under another name, as RoBERTa."""

    pooler_weight: Tensor | None
    pooler_bias: Tensor | None

    def __init__(
        self,
        config: Any,
        embeddings: EETBertEmbedding,
        encoder: EETBertEncoder,
        pooler: Projection | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embeddings = embeddings
        self.encoder = encoder
        weight, bias = pooler if pooler is not None else (None, None)
        self.register_parameter("pooler_weight", weight)  # type: ignore[arg-type]
        self.register_parameter("pooler_bias", bias)  # type: ignore[arg-type]

    @classmethod
    @from_host
    def from_torch(cls, module: Any) -> EETBertModel:
        """Share the parameters of a BertModel.

        Raises:
            TypeError: `module` has not its parts (give a model's `.bert`, without its head).
            ValueError: an activation, position or attention without a kernel.
        """
        pooler = getattr(module, "pooler", None)
        made = cls(
            module.config,
            EETBertEmbedding.from_torch(module.embeddings),
            EETBertEncoder.from_torch(module.encoder),
            None if pooler is None else projection_of(pooler.dense),
        )
        return made.eval()

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> EETBertModel:
        """Load a model of a folder or of the hub.

        Args:
            path: a folder, or a hub id.
            options: those of transformers' `from_pretrained`, as dtype or revision.
        Raises:
            OSError: there is no such model.
            ImportError: transformers is not installed.
            TypeError, ValueError: as `from_torch`.
        """
        from transformers import AutoModel

        return cls.from_torch(AutoModel.from_pretrained(path, **options))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Encode a batch.

        Args:
            input_ids: (batch_size, seq_len), int64.
            attention_mask: (batch_size, seq_len), 1 = a token, 0 = padding; or 4-D, see
                `Attention.forward`. None: no padding.
            token_type_ids, position_ids: (batch_size or 1, seq_len), int64. None: type 0, and
                positions counted from 0 (RoBERTa: from behind the padding token's).
            return_dict: whether transformers' output class is returned, or a tuple.
            others: further arguments of BertModel, which must be None or False.
        Returns:
            BaseModelOutputWithPoolingAndCrossAttentions with last_hidden_state (batch_size,
            seq_len, hidden_size) and pooler_output (batch_size, hidden_size), None without a
            pooler. Padded positions hold what comes out for them.
        Raises:
            ValueError, TypeError: on a shape, dtype, device or argument other than these.
            IndexError: an id outside its table (CPU; on CUDA the kernel traps).
        """
        refuse_given(others)
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids)
        hidden_states = self.encoder(hidden_states, attention_mask)
        pooled = None
        if self.pooler_weight is not None:
            first = hidden_states[:, 0].contiguous()
            pooled = ops.linear(first, self.pooler_weight, self.pooler_bias).tanh()
        if not return_dict:
            return (hidden_states, pooled)
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=pooled
        )
