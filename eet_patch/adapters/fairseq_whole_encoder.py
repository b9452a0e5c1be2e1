"""TransformerEncoderBase of fairseq 0.12, whole: all layers of a call over the real tokens alone.
The host's own embedding and last norm run around them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eet_patch import patching
from eet_patch.adapters.encoder import Encoder, EncoderKind, Encoders, LayerKind
from eet_patch.adapters.fairseq_encoder import modules_reason
from eet_patch.adapters.fairseq_host import (
    Activation,
    activation_of,
    classes_of,
    dropouts_reason,
    norm_of,
    norms_reason,
    padding_mask,
    qkv_of,
)
from eet_patch.adapters.fairseq_model import layers_reason
from eet_patch.adapters.host import HostMask
from eet_patch.encoding.encode import CAPTURED
from eet_patch.encoding.packed import PADDING_KEPT, Batch, EncoderLayer
from eet_patch.ops.packing import launch_gather_rows
from eet_patch.patching import Adapter, Withdrawn


class Plan(NamedTuple):
    encoder: Encoder
    padding: Tensor  # (batch_size, seq_len), True where a token is padding
    mask: HostMask


def _layer_kind(cls: type) -> LayerKind:
    classes = classes_of(cls)

    def reason(layer: Any, like: Tensor) -> str | None:
        if layer.return_fc:
            return "return_fc is set, and the fused kernel doesn't keep that result"
        activation = activation_of(layer.activation_fn)
        if isinstance(activation, str):
            return activation
        if activation.function is not None:
            return "the activation is the host's own function"
        return modules_reason(layer, classes, like)

    return LayerKind(cls, reason, lambda layer: "padding", _packed)


def _packed(layer: Any) -> EncoderLayer:
    modules = layer._modules
    attn = modules["self_attn"]
    weights, biases = qkv_of(attn)
    out, fc1, fc2 = (
        module._parameters for module in (attn._modules["out_proj"], modules["fc1"], modules["fc2"])
    )
    activation = activation_of(layer.activation_fn)
    assert isinstance(activation, Activation)
    return EncoderLayer(
        weights,
        biases,
        out["weight"],
        out["bias"],
        norm_of(layer, "self_attn_layer_norm"),
        fc1["weight"],
        fc1["bias"],
        fc2["weight"],
        fc2["bias"],
        norm_of(layer, "final_layer_norm"),
        attn.num_heads,
        attn.scaling,
        activation.kernel,
    )


# Of its list of layers, which alone is watched: the encoder itself holds a dictionary of words.
KIND = EncoderKind(
    "TransformerEncoderLayerBase", _layer_kind, lambda layers: tuple(layers._modules.values())
)


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    """For `forward_scriptable`: (src_tokens, ...) to the dictionary that the host makes of it."""
    host = sys.modules[cls.__module__]
    encoders = Encoders(KIND, cls, host.transformer_layer)  # type: ignore[attr-defined]
    layer_class = encoders.layer.cls
    classes = classes_of(layer_class)

    def plan(encoder: Any, arguments: dict[str, Any]) -> Plan | str:
        if arguments.get("return_all_hiddens"):
            return "the hidden states of all layers are returned"
        tokens, modules = arguments["src_tokens"], encoder._modules
        if type(tokens) is not Tensor or tokens.dim() != 2 or not tokens.numel():
            return "the source is no batch of tokens"
        layers, norm = modules["layers"], modules.get("layer_norm")
        reason = layers_reason(layers)
        if reason is not None:
            return reason
        if classes_of(layer_class) != classes:
            return "a method of the layers was replaced"
        like = operand(encoder, arguments)
        if tokens.device != like.device:
            return f"the source is on {tokens.device} and the model on {like.device}"
        reason = dropouts_reason(classes, modules["dropout_module"])
        if reason is None and norm is not None:
            reason = norms_reason(like, norm)
        if reason is not None:
            return reason
        found = encoders.checked(layers, like)
        if isinstance(found, str):
            return found
        padding = tokens.eq(encoder.padding_idx)
        # Before the embedding, which the original would run again.
        if patching.keeps_padding() and bool(padding.any()):
            return PADDING_KEPT
        if padding.is_cuda and torch.cuda.is_current_stream_capturing():
            return CAPTURED
        mask = padding_mask(padding, like, (tokens.shape[0], tokens.shape[1]))
        return mask if isinstance(mask, str) else Plan(found, padding, mask)

    def forward(plan: Plan, encoder: Any, arguments: dict[str, Any]) -> Any:
        tokens = arguments["src_tokens"]
        x, embedding = encoder.forward_embedding(tokens, arguments.get("token_embeddings"))
        like = operand(encoder, arguments)
        if x.dtype != like.dtype or x.shape != (*tokens.shape, like.shape[0]):
            raise Withdrawn(f"the embeddings are {x.dtype}, of shape {tuple(x.shape)}")
        x = x.contiguous()
        batch_size, seq_len, size = x.shape
        padded = x.view(-1, size)
        batch = Batch(batch_size, seq_len, size, x, plan.mask.form, partial(_embed, padded), padded)
        out = encoders.run(plan.encoder, batch)
        norm = encoder.layer_norm
        if norm is not None:
            out = norm(out).masked_fill_(plan.padding[:, :, None], 0.0)
        lengths = tokens.ne(encoder.padding_idx).sum(dim=1, dtype=torch.int32)
        return {
            "encoder_out": [out.transpose(0, 1)],
            "encoder_padding_mask": [plan.padding],
            "encoder_embedding": [embedding],
            "encoder_states": [],
            "fc_results": [],
            "src_tokens": [],
            "src_lengths": [lengths.reshape(-1, 1).contiguous()],
        }

    def operand(encoder: Any, arguments: dict[str, Any]) -> Any:
        """A parameter of the layers: their input is made on the way."""
        first = next(iter(encoder._modules["layers"]._modules.values()), None)
        return getattr(getattr(first, "fc2", None), "bias", None)

    known = frozenset({host.TransformerEncoder})  # type: ignore[attr-defined]
    return Adapter(plan, forward, operand, known)


def _embed(padded: Tensor, tokens: Tensor, out: Tensor) -> None:
    launch_gather_rows(padded, tokens, out)
