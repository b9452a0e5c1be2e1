"""Where the parameters of fairseq's TransformerDecoder lie, for decoding token by token, or why
they can't be read in place.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from eet_patch.adapters.fairseq_decoder import layer_reason
from eet_patch.adapters.fairseq_host import (
    Classes,
    activation_of,
    classes_of,
    dropouts_reason,
    norms_reason,
    qkv_of,
)
from eet_patch.adapters.host import linear_reason
from eet_patch.gates import note_sound, parameter_reason, submodule_reason, watch_of
from eet_patch.generation.sentence_decoder import SentenceDecoder, addresses_of
from eet_patch.ops.decode import CrossLayer, DecodeLayer
from eet_patch.ops.launch import NO_NORM, Norm

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Methods of a decoder that an instance may have been given anew, and the step would skip.
_DECODER_METHODS = (
    "forward",
    "extract_features",
    "extract_features_scriptable",
    "output_layer",
    "get_normalized_probs",
    "get_normalized_probs_scriptable",
    "reorder_incremental_state_scripting",
)
_KNOWN_MODELS = {
    "fairseq.models.transformer.transformer_base": ("TransformerModelBase",),
    "fairseq.models.transformer.transformer_legacy": ("TransformerModel",),
    "fairseq.models.transformer_lm": ("TransformerLanguageModel",),
    "fairseq.models.bart.model": ("BARTModel",),
    "fairseq.models.transformer_align": ("TransformerAlignModel",),
}


class Stack(NamedTuple):
    """What the layers of a decoder have in common, and where their parameters lie."""

    layers: tuple[DecodeLayer, ...]
    cross_projections: tuple[tuple[Tensor, Tensor | None, Tensor, Tensor | None], ...]
    addresses: tuple[object, ...]  # of both
    num_heads: int
    activation: str | None
    norm_eps: float
    post_norm: bool
    classes: Classes  # and their methods that it rests on


def layers_reason(layers: Any) -> str | None:
    """Why the layers in a host's list are not those that run, or None."""
    dropping = getattr(sys.modules.get("fairseq.modules"), "LayerDropModuleList", None)
    if type(layers) is not nn.ModuleList and type(layers) is not dropping:
        return f"the layers are in a {type(layers).__name__}"
    if type(layers) is dropping and layers.training:
        return "layers are dropped (training mode); call model.eval() for inference"
    return None


def _class(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, None)


def _bypassed_reason(module: Any) -> str | None:
    """Why a module whose forward the step goes around may not be bypassed, or None."""
    name = type(module).__name__
    if "forward" in module.__dict__:
        return f"the forward of {name} was replaced"
    if any(module.__dict__[hooks] for hooks in _HOOKS):
        return f"{name} has hooks, which the step would skip"
    return None


def model_reason(model: Any) -> str | None:
    """Why a model's decoder can't be run without the model around it, or None."""
    names = _KNOWN_MODELS.get(type(model).__module__, ())
    if type(model).__name__ not in names:
        return f"the model is a {type(model).__name__}"
    for name in ("get_normalized_probs", "get_normalized_probs_scriptable"):
        if name in model.__dict__:
            return f"{name} of the model was replaced"
    encoder = getattr(model, "encoder", None)
    known = ("TransformerEncoderBase", "TransformerEncoder")
    if encoder is not None and type(encoder).__name__ not in known:
        return f"the encoder is a {type(encoder).__name__}"
    return None


def decoder_of(decoder: Any, has_encoder: bool) -> SentenceDecoder | str:
    """The decoder's parameters, or why it can't be decoded by our kernels."""
    base = "fairseq.models.transformer.transformer_decoder"
    known = [_class(base, name) for name in ("TransformerDecoderBase", "TransformerDecoder")]
    if type(decoder) not in known:
        return f"the decoder is a {type(decoder).__name__}"
    for name in _DECODER_METHODS:
        if name in decoder.__dict__:
            return f"{name} of the decoder was replaced"
    for name in ("adaptive_softmax", "quant_noise"):
        if getattr(decoder, name) is not None:
            return f"the decoder has a {name}"
    if decoder.cross_self_attention:
        return "cross_self_attention is set"
    embed = decoder.embed_tokens
    reason = (
        _bypassed_reason(decoder)
        or submodule_reason(embed, nn.Embedding)
        or submodule_reason(decoder.output_projection, nn.Linear)
    )
    if reason is not None:
        return reason
    if embed.max_norm is not None:
        return "the embedding renormalises its rows"
    word_weight = embed.weight
    if not decoder.layers._modules:
        return "the decoder has no layers"
    hidden_size = decoder.embed_dim
    like = word_weight.new_empty(1, 1, hidden_size)
    reason = parameter_reason(word_weight, word_weight, tuple(word_weight.shape))
    project_in, project_out = decoder.project_in_dim, decoder.project_out_dim
    sizes = (word_weight.shape[1], hidden_size, decoder.output_embed_dim)
    for module, in_features, out_features in zip(
        (project_in, project_out), sizes[:2], sizes[1:], strict=True
    ):
        if reason is None and module is not None:
            reason = submodule_reason(module, nn.Linear) or linear_reason(
                module, like, in_features, out_features
            )
        elif reason is None and in_features != out_features:
            reason = "the embedding and the layers differ in size"
    head = decoder.output_projection
    reason = reason or linear_reason(head, like, sizes[2], head.weight.shape[0])
    if reason is not None:
        return reason
    position_weight = _positions(decoder.embed_positions, like)
    if isinstance(position_weight, str):
        return position_weight
    layer_class = _class("fairseq.modules.transformer_layer", "TransformerDecoderLayerBase")
    classes = classes_of(layer_class)
    norms = [n for n in (decoder.layernorm_embedding, decoder.layer_norm) if n is not None]
    reason = norms_reason(like, *norms) or dropouts_reason(classes, decoder.dropout_module)
    if reason is not None:
        return reason
    stack = _stack_of(decoder.layers, like, layer_class, classes)
    if isinstance(stack, str):
        return stack
    if stack.layers[0].cross is not None and not has_encoder:
        return "the decoder attends to an encoder, and the model has none"
    return _parameters(decoder, stack, position_weight)


def _stack_of(modules: Any, like: Tensor, layer_class: type, classes: Classes) -> Stack | str:
    """Made once for as long as nothing of the layers has changed."""
    reason = layers_reason(modules)
    if reason is not None:
        return reason
    watch = watch_of(modules, like)
    if watch is not None and watch.holds(like) and watch.notes.classes == classes:
        return watch.notes
    found = _looked_through(list(modules._modules.values()), like, layer_class, classes)
    if not isinstance(found, str):
        note_sound(modules, like, found)
    return found


def _positions(module: Any, like: Tensor) -> Tensor | str | None:
    """The table of positions, None without one, or why it can't be read."""
    if module is None:
        return None
    sinusoidal = _class(
        "fairseq.modules.sinusoidal_positional_embedding", "SinusoidalPositionalEmbedding"
    )
    learned = _class("fairseq.modules.learned_positional_embedding", "LearnedPositionalEmbedding")
    if type(module) is sinusoidal:
        table = module.weights
    elif type(module) is learned:
        table = module.weight
        if module.max_norm is not None:
            return "the position embedding renormalises its rows"
    else:
        return f"the positions are a {type(module).__name__}"
    if module.padding_idx is None or module.onnx_trace:
        return "the positions begin elsewhere"
    return (
        _bypassed_reason(module)
        or parameter_reason(table, like, (table.shape[0], like.shape[2]))
        or table
    )


def _looked_through(
    layers: list[Any], like: Tensor, layer_class: type, classes: Classes
) -> Stack | str:
    for layer in layers:
        if type(layer) is not layer_class:
            return f"a layer is a {type(layer).__name__}"
    first = layers[0]
    activation = activation_of(first.activation_fn)
    if isinstance(activation, str):
        return activation
    if activation.function is not None:
        return "there is no kernel for the activation in a step"
    crosses = first.encoder_attn is not None
    eps = first.self_attn_layer_norm.eps
    made, projections = [], []
    for layer in layers:
        reason = _bypassed_reason(layer) or layer_reason(layer, classes, like)
        if reason is not None:
            return reason
        modules = layer._modules
        attn, cross = modules["self_attn"], modules.get("encoder_attn")
        norms = [modules["self_attn_layer_norm"], modules["final_layer_norm"]]
        if (cross is not None) != crosses:
            return "some layers attend to the encoder, others don't"
        if cross is not None:
            norms.append(modules["encoder_attn_layer_norm"])
            if (cross.num_heads, cross.scaling) != (attn.num_heads, attn.scaling):
                return "the two attentions of a layer have heads of their own"
        if any(norm.eps != eps for norm in norms):
            return "the norms of the decoder differ in eps"
        if (
            layer.activation_fn is not first.activation_fn
            and activation_of(layer.activation_fn) != activation
        ) or layer.normalize_before != first.normalize_before:
            return "the layers of the decoder differ"
        if attn.num_heads != first.self_attn.num_heads or (
            layer.fc1.weight.shape != first.fc1.weight.shape
        ):
            return "the layers of the decoder differ"
        made.append(_layer(modules, attn, cross))
        if cross is not None:
            weights, biases = qkv_of(cross)
            projections.append((weights[1], biases[1], weights[2], biases[2]))
    both = (tuple(made), tuple(projections))
    return Stack(
        *both,
        addresses_of(both),
        first.self_attn.num_heads,
        activation.kernel,
        eps,
        not first.normalize_before,
        classes,
    )


def _parameters(
    decoder: Any, stack: Stack, position_weight: Tensor | None
) -> SentenceDecoder | str:
    embed_norm, final_norm = decoder.layernorm_embedding, decoder.layer_norm
    if final_norm is not None and final_norm.eps != stack.norm_eps:
        return "the norms of the decoder differ in eps"
    head = decoder.output_projection
    return SentenceDecoder(
        stack.layers,
        stack.cross_projections,
        decoder.embed_tokens.weight,
        float(decoder.embed_scale),
        position_weight,
        0 if decoder.embed_positions is None else decoder.embed_positions.padding_idx + 1,
        NO_NORM
        if embed_norm is None
        else Norm("post", embed_norm.weight, embed_norm.bias, embed_norm.eps),
        NO_NORM
        if final_norm is None
        else Norm("pre", final_norm.weight, final_norm.bias, final_norm.eps),
        _pair_of(decoder.project_in_dim),
        _pair_of(decoder.project_out_dim),
        head.weight,
        head.bias,
        stack.num_heads,
        stack.activation,
        stack.norm_eps,
        stack.post_norm,
        stack.addresses,
    )


def _pair_of(module: Any) -> tuple[Tensor, Tensor | None] | None:
    return None if module is None else (module.weight, module.bias)


def _layer(modules: dict[str, Any], attn: Any, cross: Any) -> DecodeLayer:
    def pair(name: str, owner: dict[str, Any] = modules) -> tuple[Tensor, Tensor | None]:
        parameters = owner[name]._parameters
        return parameters["weight"], parameters["bias"]

    # For what a step fills in; a slice would keep the weight's storage.
    nothing = attn.q_proj.weight.new_empty(0)
    weights, biases = qkv_of(attn)
    crossing = None
    if cross is not None:
        crossing = CrossLayer(
            *pair("encoder_attn_layer_norm"),
            *pair("q_proj", cross._modules),
            *pair("out_proj", cross._modules),
            nothing,
            nothing,
        )
    return DecodeLayer(
        *pair("self_attn_layer_norm"),
        weights,
        biases,
        *pair("out_proj", attn._modules),
        *pair("final_layer_norm"),
        *pair("fc1"),
        *pair("fc2"),
        nothing,
        nothing,
        attn.scaling,
        crossing,
    )
