"""GPT2Block, and DecisionTransformerGPT2Block, which is GPT2Block under another name, of
transformers 4.56 to 5.23: pre-norm self-attention, optional cross-attention, feed-forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from eet_patch.adapters import kv_cache
from eet_patch.adapters.causal import (
    Sight,
    norm_of,
    norms_reason,
    out_features,
    products_reason,
    sight_of,
)
from eet_patch.adapters.decoder import NO_CACHE_YET, DecoderKind, Layer, Parts
from eet_patch.adapters.host import (
    NO_HOST_MASK,
    HostMask,
    activation_of,
    attention_implementation,
    attentions_reason,
    dropout_reason,
    host_mask,
    is_recording_hook,
    other_arguments_reason,
    version_before,
)
from eet_patch.gates import note_sound, still_sound, submodule_reason
from eet_patch.ops import blocks
from eet_patch.ops.attention import MAX_HEAD_DIM
from eet_patch.ops.decode import DecodeLayer
from eet_patch.patching import Adapter

KNOWN = frozenset(
    {"hidden_states", "past_key_values", "attention_mask", "encoder_hidden_states"}
    | {"encoder_attention_mask", "output_attentions"}
)


class Plan(NamedTuple):
    sight: Sight
    scale: float
    activation: str
    cross_mask: HostMask


class Classes(NamedTuple):
    """The host's classes of one family, by the roles they play in GPT2Block."""

    attention: type
    mlp: type
    conv: type


def _classes(cls: type) -> Classes:
    module, prefix = sys.modules[cls.__module__], cls.__name__.removesuffix("Block")
    return Classes(
        getattr(module, f"{prefix}Attention"), getattr(module, f"{prefix}MLP"), module.Conv1D
    )


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    classes = _classes(cls)
    tuples = version_before("5.3")

    def plan(layer: Any, arguments: dict[str, Any]) -> Plan | str:
        reason = other_arguments_reason(arguments, KNOWN) or attentions_reason(arguments)
        if reason is not None:
            return reason
        modules = layer._modules
        attn, mlp = modules["attn"], modules["mlp"]
        hidden_states = arguments["hidden_states"]
        encoder_hidden_states = arguments.get("encoder_hidden_states")
        if hidden_states.dim() != 3:
            return f"the input has {hidden_states.dim()} dimensions"
        reason = layer_reason(layer, hidden_states)
        if reason is not None:
            return reason
        activation = activation_of(mlp.act)
        if activation is None:
            return f"there is no kernel for the activation {type(mlp.act).__name__}"
        implementation = attention_implementation(attn.config)
        if " " in implementation:
            return implementation
        if implementation == "eager" and attn.reorder_and_upcast_attn:
            return "reorder_and_upcast_attn is set"
        past = arguments.get("past_key_values")
        sight = sight_of(
            hidden_states,
            arguments.get("attention_mask"),
            kv_cache.self_attention_cache(past),
            attn.layer_idx,
            attn.num_heads,
            implementation,
            # While the attention had a causal buffer, eager applied it; later the mask does.
            "bias" in attn._buffers,
        )
        if isinstance(sight, str):
            return sight
        scale = softmax_scale(attn, implementation)
        cross_mask: Any = NO_HOST_MASK
        if encoder_hidden_states is not None:
            cross_mask = _cross_plan(layer, arguments, classes, hidden_states, implementation)
            if isinstance(cross_mask, str):
                return cross_mask
        return Plan(sight, scale, activation, cross_mask)

    def forward(plan: Plan, layer: Any, arguments: dict[str, Any]) -> Any:
        modules = layer._modules
        attn, mlp = modules["attn"], modules["mlp"]
        hidden_states = arguments["hidden_states"]
        past = arguments.get("past_key_values")
        c_attn, c_proj = attn._modules["c_attn"]._parameters, attn._modules["c_proj"]._parameters
        held: Any = kv_cache.NO_CACHE
        if past is not None:
            held = kv_cache.SelfAttentionCache(
                past,
                attn.layer_idx,
                hidden_states,
                attn.num_heads,
                arguments,
                plan.sight.kv_len,
                plan.sight.crop,
            )
        with held:
            hidden_states = blocks.attention_block(
                hidden_states,
                (c_attn["weight"],),
                (c_attn["bias"],),
                c_proj["weight"],
                c_proj["bias"],
                True,
                attn.num_heads,
                plan.scale,
                norm_of(modules["ln_1"]),
                mask=plan.sight.mask.form,
                mask_tensor=plan.sight.mask.for_torch,
                causal=plan.sight.causal,
                cache=held.buffers,
                update_kv=held.update_kv,
            )
            if arguments.get("encoder_hidden_states") is not None:
                hidden_states = _cross_attention(plan, layer, hidden_states, arguments)
            fc, proj = mlp._modules["c_fc"]._parameters, mlp._modules["c_proj"]._parameters
            hidden_states = blocks.ffn(
                hidden_states,
                fc["weight"],
                fc["bias"],
                proj["weight"],
                proj["bias"],
                True,
                plan.activation,
                norm_of(modules["ln_2"]),
            )
        return (hidden_states,) if tuples else hidden_states

    return Adapter(plan, forward)


def layer_reason(layer: Any, like: Tensor) -> str | None:
    """Why the modules and parameters of a GPT2Block can't be read in place, or None."""
    if still_sound(layer, like):
        return None
    classes = _classes(type(layer))
    modules = layer._modules
    attn, mlp, ln_1, ln_2 = modules["attn"], modules["mlp"], modules["ln_1"], modules["ln_2"]
    reason = (
        submodule_reason(attn, classes.attention, is_recording_hook)
        or _attention_reason(attn, classes.conv, like, 3)
        or submodule_reason(mlp, classes.mlp)
        or _mlp_reason(mlp, classes.conv, like)
        or norms_reason(like, ln_1, ln_2)
    )
    if reason is None:
        note_sound(layer, like)
    return reason


def softmax_scale(attn: Any, implementation: str) -> float:
    """The factor of the scores. Before 5.4 only eager looked at the two options that change it."""
    scaling = getattr(attn, "scaling", None)
    if scaling is not None:
        return scaling
    if implementation != "eager":
        return attn.head_dim**-0.5
    scale = attn.head_dim**-0.5 if attn.scale_attn_weights else 1.0
    return scale / (attn.layer_idx + 1) if attn.scale_attn_by_inverse_layer_idx else scale


def _attention_reason(attn: Any, conv_cls: type, like: Tensor, parts: int) -> str | None:
    """Checks c_attn (of `parts` projections), c_proj, the dropouts and the head size of a
    GPT2Attention.
    """
    modules = attn._modules
    hidden_size = like.shape[-1]
    if attn.embed_dim != hidden_size or attn.head_dim * attn.num_heads != hidden_size:
        return (
            f"heads were pruned, or the input's hidden size {hidden_size} is not {attn.embed_dim}"
        )
    if attn.head_dim > MAX_HEAD_DIM:
        return f"there is no kernel for a head size of {attn.head_dim}"
    return (
        products_reason(
            like,
            conv_cls,
            (modules["c_attn"], hidden_size, parts * hidden_size),
            (modules["c_proj"], hidden_size, hidden_size),
        )
        or submodule_reason(modules["attn_dropout"], nn.Dropout)
        or submodule_reason(modules["resid_dropout"], nn.Dropout)
        or dropout_reason(attn, modules["attn_dropout"], modules["resid_dropout"])
    )


def _mlp_reason(mlp: Any, conv_cls: type, like: Tensor) -> str | None:
    modules = mlp._modules
    hidden_size = like.shape[-1]
    inner = out_features(modules["c_fc"], 1)
    return (
        products_reason(
            like,
            conv_cls,
            (modules["c_fc"], hidden_size, inner),
            (modules["c_proj"], inner, hidden_size),
        )
        or submodule_reason(modules["dropout"], nn.Dropout)
        or dropout_reason(mlp, modules["dropout"])
        or submodule_reason(modules["act"], type(modules["act"]))
    )


def _cross_plan(
    layer: Any, arguments: dict[str, Any], classes: Classes, like: Tensor, implementation: str
) -> HostMask | str:
    modules = layer._modules
    if "crossattention" not in modules:
        return "the layer has no cross-attention (the original raises the error)"
    cross = modules["crossattention"]
    encoder = arguments["encoder_hidden_states"]
    if implementation == "eager" and cross.reorder_and_upcast_attn:
        return "reorder_and_upcast_attn is set"
    if type(encoder) is not Tensor or encoder.dtype != like.dtype or encoder.device != like.device:
        return "encoder_hidden_states differ from the input in type, dtype or device"
    if (
        encoder.shape != (like.shape[0], encoder.shape[1], like.shape[2])
        or not encoder.is_contiguous()
    ):
        return "encoder_hidden_states have another batch or hidden size, or are not contiguous"
    reason = (
        submodule_reason(cross, classes.attention, is_recording_hook)
        or _attention_reason(cross, classes.conv, like, 2)
        or products_reason(
            like, classes.conv, (cross._modules.get("q_attn"), like.shape[2], like.shape[2])
        )
        or norms_reason(like, modules["ln_cross_attn"])
    )
    if reason is not None:
        return reason
    past = arguments.get("past_key_values")
    if past is not None and type(past).__name__ != "EncoderDecoderCache":
        return f"cross-attention with a {type(past).__name__}"
    if past is not None and past.is_updated.get(cross.layer_idx):
        reason = kv_cache.kept_reason(past, cross.layer_idx, like, encoder.shape[1], cross.head_dim)
        if reason is not None:
            return reason
    sizes = (like.shape[0], cross.num_heads, like.shape[1], encoder.shape[1])
    return host_mask(arguments.get("encoder_attention_mask"), like, sizes)


def _cross_attention(
    plan: Plan, layer: Any, hidden_states: Tensor, arguments: dict[str, Any]
) -> Tensor:
    cross = layer._modules["crossattention"]
    modules = cross._modules
    encoder, past = arguments["encoder_hidden_states"], arguments.get("past_key_values")
    batch, kv_len, hidden_size = encoder.shape
    if past is not None and past.is_updated.get(cross.layer_idx):
        kept = past.cross_attention_cache.layers[cross.layer_idx]
        key, value = kept.keys, kept.values
    else:
        c_attn = modules["c_attn"]._parameters
        pair = blocks.project_kv(
            encoder.view(batch * kv_len, hidden_size),
            (c_attn["weight"],),
            (c_attn["bias"],),
            True,
        )
        key, value = (
            t.unflatten(0, (batch, kv_len)).unflatten(2, (cross.num_heads, -1)).transpose(1, 2)
            for t in pair
        )
        if past is not None:
            key, value = past.cross_attention_cache.update(key, value, cross.layer_idx)
            past.is_updated[cross.layer_idx] = True
    q_attn, c_proj = modules["q_attn"]._parameters, modules["c_proj"]._parameters
    scale = softmax_scale(cross, attention_implementation(cross.config))
    return blocks.cross_attention_block(
        hidden_states,
        (q_attn["weight"],),
        (q_attn["bias"],),
        key,
        value,
        c_proj["weight"],
        c_proj["bias"],
        True,
        cross.num_heads,
        scale,
        norm_of(layer._modules["ln_cross_attn"]),
        mask=plan.cross_mask.form,
    )


# --- the model in the terms of the loops ---------------------------------------------------------


def gpt_parts(model: Any, model_cls: type, layer_cls: type) -> Parts | str:
    """Of a model whose modules are named as GPT-2's."""
    beneath: Any = model._modules["transformer"]
    modules, training = beneath._modules, beneath.training
    if type(beneath) is not model_cls:
        return f"the model is a {type(beneath).__name__}"
    reason = submodule_reason(modules["drop"], nn.Dropout)
    if reason is not None:
        return reason
    if modules["drop"].p and (training or modules["drop"].training):
        return "dropout is active (the model is in training mode); call model.eval() for inference"
    return Parts(
        ((beneath, model_cls),),
        modules["wte"],
        (modules["wpe"], nn.Embedding),
        0,
        modules["ln_f"],
        modules["h"],
        layer_cls,
    )


def _loop_parts(model: Any) -> Parts | str:
    module: Any = sys.modules[type(model).__module__]
    return gpt_parts(model, module.GPT2Model, module.GPT2Block)


def _loop_layer(layer: Any, like: Tensor) -> Layer | str:
    reason = layer_reason(layer, like)
    if reason is not None:
        return reason
    modules = layer._modules
    if "crossattention" in modules:
        return "the model has cross-attention"
    attn, mlp, ln_1, ln_2 = modules["attn"], modules["mlp"], modules["ln_1"], modules["ln_2"]
    implementation = attention_implementation(attn.config)
    if " " in implementation:
        return implementation
    if implementation == "eager" and attn.reorder_and_upcast_attn:
        return "reorder_and_upcast_attn is set"
    c_attn, c_proj = attn._modules["c_attn"]._parameters, attn._modules["c_proj"]._parameters
    fc, proj = mlp._modules["c_fc"]._parameters, mlp._modules["c_proj"]._parameters
    parameters = DecodeLayer(
        ln_1._parameters["weight"],
        ln_1._parameters["bias"],
        (c_attn["weight"],),
        (c_attn["bias"],),
        c_proj["weight"],
        c_proj["bias"],
        ln_2._parameters["weight"],
        ln_2._parameters["bias"],
        fc["weight"],
        fc["bias"],
        proj["weight"],
        proj["bias"],
        NO_CACHE_YET,
        NO_CACHE_YET,
        softmax_scale(attn, implementation),
    )
    activation, eps = activation_of(mlp.act), (ln_1.eps, ln_2.eps)
    return Layer(parameters, attn.num_heads, activation, eps, True)


LOOP: DecoderKind = DecoderKind(_loop_parts, _loop_layer)
