"""Encoders whose layers are BertLayer's maths under other names: DistilBERT and ALBERT."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from eet_patch.adapters.encoder import EncoderKind, LayerKind
from eet_patch.adapters.host import (
    activation_of,
    attention_implementation,
    dropout_reason,
    is_recording_hook,
    linear_reason,
    norm_reason,
    version_before,
)
from eet_patch.encoding.packed import EncoderLayer
from eet_patch.gates import submodule_reason
from eet_patch.ops.attention import MAX_HEAD_DIM
from eet_patch.ops.launch import Norm


class Names(NamedTuple):
    """Where a layer keeps its parts, as paths from it; `classes` are those of its own submodules
    that are not torch's, path -> names of classes (which of them there are differs by version).
    """

    classes: dict[str, tuple[str, ...]]
    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    fc1: str
    fc2: str
    output_norm: str
    activation: str
    num_heads: str  # of the attention
    dropouts: tuple[str, ...]


DISTILBERT = Names(
    classes={
        "attention": (
            "DistilBertSelfAttention",
            "MultiHeadSelfAttention",
            "DistilBertSdpaAttention",
        ),
        "ffn": ("FFN",),
    },
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    fc1="ffn.lin1",
    fc2="ffn.lin2",
    output_norm="output_layer_norm",
    activation="ffn.activation",
    num_heads="n_heads",
    dropouts=("attention.dropout", "ffn.dropout"),
)
ALBERT = Names(
    classes={"attention": ("AlbertAttention", "AlbertSdpaAttention")},
    query="attention.query",
    key="attention.key",
    value="attention.value",
    out="attention.dense",
    attention_norm="attention.LayerNorm",
    fc1="ffn",
    fc2="ffn_output",
    output_norm="full_layer_layer_norm",
    activation="activation",
    num_heads="num_attention_heads",
    dropouts=("attention.attention_dropout", "attention.output_dropout"),
)


def _part(layer: Any, path: str) -> Any:
    for name in path.split("."):
        layer = layer._modules.get(name) if name in layer._modules else getattr(layer, name)
    return layer


def _layer_kind(names: Names, cls: type) -> LayerKind:
    host, before_5 = vars(sys.modules[cls.__module__]), version_before("5.0")

    def reason(layer: Any, like: Tensor) -> str | None:
        for path, known in names.classes.items():
            module = _part(layer, path)
            classes = [host[name] for name in known if name in host]
            kind = type(module) if type(module) in classes else classes[0]
            found = submodule_reason(module, kind, is_recording_hook)
            if found is not None:
                return found
        if "ff_chunk" in layer.__dict__ or "ff_chunk" in _part(layer, names.fc1).__dict__:
            return "ff_chunk was replaced"
        return _parameters_reason(layer, names, like) or _rest_reason(layer, names)

    def implementation(layer: Any) -> str:
        attention = layer._modules["attention"]
        if not before_5:
            return attention_implementation(attention.config)
        positions = getattr(attention, "position_embedding_type", "absolute")
        if positions != "absolute":
            return f"positions are {positions}"
        return "sdpa" if "Sdpa" in type(attention).__name__ else "eager"

    return LayerKind(cls, reason, implementation, lambda layer: _packed_layer(layer, names))


def _parameters_reason(layer: Any, names: Names, like: Tensor) -> str | None:
    hidden_size = like.shape[-1]
    num_heads = getattr(layer._modules["attention"], names.num_heads)
    if hidden_size % num_heads or hidden_size // num_heads > MAX_HEAD_DIM:
        return f"there is no kernel for {num_heads} heads of a hidden size of {hidden_size}"
    fc1 = _part(layer, names.fc1)
    weight = getattr(fc1, "weight", None)
    inner = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
    linears = [(path, hidden_size, hidden_size) for path in names[1:5]]
    linears += [(names.fc1, hidden_size, inner), (names.fc2, inner, hidden_size)]
    for path, in_features, out_features in linears:
        linear = _part(layer, path)
        reason = submodule_reason(linear, nn.Linear)
        reason = reason or linear_reason(linear, like, in_features, out_features)
        if reason is not None:
            return reason
    for path in (names.attention_norm, names.output_norm):
        norm = _part(layer, path)
        reason = submodule_reason(norm, nn.LayerNorm) or norm_reason(norm, like, hidden_size)
        if reason is not None:
            return reason
    return None


def _rest_reason(layer: Any, names: Names) -> str | None:
    activation = _part(layer, names.activation)
    if activation_of(activation) is None:
        return f"there is no kernel for the activation {type(activation).__name__}"
    if isinstance(activation, nn.Module):
        reason = submodule_reason(activation, type(activation))
        if reason is not None:
            return reason
    for path in names.dropouts:
        dropout = _part(layer, path)
        reason = submodule_reason(dropout, nn.Dropout) or dropout_reason(layer, dropout)
        if reason is not None:
            return reason
    return None


def _packed_layer(layer: Any, names: Names) -> EncoderLayer:
    def parameters(path: str) -> Any:
        return _part(layer, path)._parameters

    def norm(path: str) -> Norm:
        module = _part(layer, path)
        return Norm("post", module._parameters["weight"], module._parameters["bias"], module.eps)

    qkv = [parameters(path) for path in (names.query, names.key, names.value)]
    out, fc1, fc2 = parameters(names.out), parameters(names.fc1), parameters(names.fc2)
    activation = activation_of(_part(layer, names.activation))
    assert activation is not None  # else it were the reason
    num_heads = getattr(layer._modules["attention"], names.num_heads)
    return EncoderLayer(
        tuple(p["weight"] for p in qkv),
        tuple(p["bias"] for p in qkv),
        out["weight"],
        out["bias"],
        norm(names.attention_norm),
        fc1["weight"],
        fc1["bias"],
        fc2["weight"],
        fc2["bias"],
        norm(names.output_norm),
        num_heads,
        (out["weight"].shape[0] // num_heads) ** -0.5,
        activation,
    )


def _distilbert_layers(encoder: Any) -> tuple[Any, ...]:
    return tuple(encoder._modules["layer"]._modules.values())


def _albert_layers(encoder: Any) -> tuple[Any, ...]:
    """A group of layers is run several times over."""
    groups = list(encoder._modules["albert_layer_groups"]._modules.values())
    count = encoder.config.num_hidden_layers
    used = (groups[int(i / (count / len(groups)))] for i in range(count))
    return tuple(layer for group in used for layer in group._modules["albert_layers"])


def _albert_reason(encoder: Any) -> str | None:
    group_class = vars(sys.modules[type(encoder).__module__])["AlbertLayerGroup"]
    for group in encoder._modules["albert_layer_groups"]._modules.values():
        reason = submodule_reason(group, group_class)
        if reason is not None:
            return reason
    return None


DISTILBERT_KIND: EncoderKind = EncoderKind(
    "TransformerBlock",
    lambda cls: _layer_kind(DISTILBERT, cls),
    _distilbert_layers,
    renamed={"x": "hidden_states", "attn_mask": "attention_mask"},
)
ALBERT_KIND: EncoderKind = EncoderKind(
    "AlbertLayer",
    lambda cls: _layer_kind(ALBERT, cls),
    _albert_layers,
    reason=_albert_reason,
    before=lambda encoder, hidden_states: encoder.embedding_hidden_mapping_in(hidden_states),
    states_every=lambda encoder: encoder.config.inner_group_num,
    width=lambda encoder: encoder._modules["embedding_hidden_mapping_in"]._parameters["weight"],
)
