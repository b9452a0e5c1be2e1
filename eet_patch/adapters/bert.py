"""BertLayer and the layers that are BertLayer under another name, of transformers 4.56 to 5.23."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from eet_patch.adapters import kv_cache
from eet_patch.adapters.encoder import LayerKind
from eet_patch.adapters.host import (
    NO_HOST_MASK,
    HostMask,
    activation_of,
    attention_implementation,
    attentions_reason,
    dropout_reason,
    host_mask,
    is_recording_hook,
    linear_reason,
    norm_reason,
    other_arguments_reason,
    version_before,
)
from eet_patch.encoding.packed import EncoderLayer
from eet_patch.gates import note_sound, still_sound, submodule_reason
from eet_patch.ops import blocks
from eet_patch.ops.attention import MAX_HEAD_DIM
from eet_patch.ops.launch import Norm
from eet_patch.patching import Adapter

KNOWN = frozenset(
    {"hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"}
    | {"past_key_values", "output_attentions"}
)


class Plan(NamedTuple):
    mask: HostMask
    kv_len: int
    causal: bool
    crop: bool  # without a mask only the first q_len keys count, however long the cache
    activation: str
    cross_mask: HostMask | None


class Classes(NamedTuple):
    """The host's classes of one family, by the roles they play in BertLayer."""

    attention: type
    self_attentions: tuple[type, ...]
    cross_attentions: tuple[type, ...]
    self_output: type
    intermediate: type
    output: type


def _classes(cls: type) -> Classes:
    module = sys.modules[cls.__module__]
    prefix = cls.__name__.removesuffix("Layer")

    def existing(*names: str) -> tuple[type, ...]:
        found = (getattr(module, prefix + name, None) for name in names)
        return tuple(c for c in found if c is not None)

    own = existing("SelfAttention", "SdpaSelfAttention")
    (attention,), (self_output,) = existing("Attention"), existing("SelfOutput")
    (intermediate,), (output,) = existing("Intermediate"), existing("Output")
    # Before 5.0 one class served both kinds of attention.
    cross = existing("CrossAttention") or own
    return Classes(attention, own, cross, self_output, intermediate, output)


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    classes = _classes(cls)
    before_5 = version_before("5.0")

    def plan(layer: Any, arguments: dict[str, Any]) -> Plan | str:
        reason = other_arguments_reason(arguments, KNOWN) or attentions_reason(arguments)
        if reason is not None:
            return reason
        hidden_states = arguments["hidden_states"]
        if hidden_states.dim() != 3:
            return f"the input has {hidden_states.dim()} dimensions"
        if "feed_forward_chunk" in layer.__dict__:
            return "feed_forward_chunk was replaced"
        modules = layer._modules
        batch, q_len, _ = hidden_states.shape
        if not still_sound(layer, hidden_states):
            reason = _modules_reason(layer, classes, hidden_states)
            if reason is not None:
                return reason
            note_sound(layer, hidden_states)
        own = modules["attention"]._modules["self"]
        activation = activation_of(modules["intermediate"].intermediate_act_fn)
        assert activation is not None  # one of the reasons
        implementation = _implementation(own, before_5)
        if " " in implementation:
            return implementation
        past, kv_len = arguments.get("past_key_values"), q_len
        if past is not None:
            cache = kv_cache.self_attention_cache(past)
            kv_len = kv_cache.kv_length(cache, own.layer_idx, q_len)
            if isinstance(kv_len, str):
                return kv_len
        given = arguments.get("attention_mask")
        mask = host_mask(given, hidden_states, (batch, own.num_attention_heads, q_len, kv_len))
        if isinstance(mask, str):
            return mask
        decoder = own.is_decoder if before_5 else own.is_causal
        causal = decoder and q_len > 1 and given is None and implementation != "eager"
        crop = causal and implementation == "sdpa"
        if implementation == "flash":
            causal = decoder and q_len > 1
        cross_mask: HostMask | None = None
        if layer.is_decoder and arguments.get("encoder_hidden_states") is not None:
            cross = _cross_plan(layer, arguments, classes, hidden_states)
            if isinstance(cross, str):
                return cross
            cross_mask = cross
        return Plan(mask, kv_len, causal, crop, activation, cross_mask)

    def forward(plan: Plan, layer: Any, arguments: dict[str, Any]) -> Any:
        modules = layer._modules
        attention = modules["attention"]._modules
        own, dense, norm = _parts(attention)
        query, key, value = (own._modules[n]._parameters for n in ("query", "key", "value"))
        hidden_states = arguments["hidden_states"]
        past = arguments.get("past_key_values")
        held: Any = kv_cache.NO_CACHE
        if past is not None:
            held = kv_cache.SelfAttentionCache(
                past,
                own.layer_idx,
                hidden_states,
                own.num_attention_heads,
                arguments,
                plan.kv_len,
                plan.crop,
            )
        with held:
            hidden_states = blocks.attention_block(
                hidden_states,
                (query["weight"], key["weight"], value["weight"]),
                (query["bias"], key["bias"], value["bias"]),
                dense["weight"],
                dense["bias"],
                False,
                own.num_attention_heads,
                own.attention_head_size**-0.5,
                norm,
                mask=plan.mask.form,
                mask_tensor=plan.mask.for_torch,
                causal=plan.causal,
                cache=held.buffers,
                update_kv=held.update_kv,
            )
            if plan.cross_mask is not None:
                hidden_states = _cross_attention(plan.cross_mask, layer, hidden_states, arguments)
            fc1 = modules["intermediate"]._modules["dense"]._parameters
            output = modules["output"]._modules
            fc2 = output["dense"]._parameters
            hidden_states = blocks.ffn(
                hidden_states,
                fc1["weight"],
                fc1["bias"],
                fc2["weight"],
                fc2["bias"],
                False,
                plan.activation,
                _norm(output["LayerNorm"]),
            )
        if not before_5:
            return hidden_states
        # The weights of each attention, which nobody asked for.
        return (hidden_states, None) if plan.cross_mask is None else (hidden_states, None, None)

    return Adapter(plan, forward)


def _modules_reason(layer: Any, classes: Classes, like: Tensor) -> str | None:
    modules = layer._modules
    attention, intermediate = modules["attention"], modules["intermediate"]
    reason = _attention_reason(attention, classes, classes.self_attentions, like)
    reason = reason or _feed_forward_reason(intermediate, modules["output"], classes, like)
    if reason is None and activation_of(intermediate.intermediate_act_fn) is None:
        kind = type(intermediate.intermediate_act_fn).__name__
        reason = f"there is no kernel for the activation {kind}"
    return reason


def layer_kind(cls: type) -> LayerKind:
    """What the step level needs to know of a BertLayer `cls`, or of one under another name."""
    classes, before_5 = _classes(cls), version_before("5.0")

    def reason(layer: Any, like: Tensor) -> str | None:
        if "feed_forward_chunk" in layer.__dict__:
            return "feed_forward_chunk was replaced"
        own = layer.attention.self
        if layer.is_decoder or (own.is_decoder if before_5 else own.is_causal):
            return "a layer is a decoder's"
        return _modules_reason(layer, classes, like)

    def implementation(layer: Any) -> str:
        return _implementation(layer._modules["attention"]._modules["self"], before_5)

    return LayerKind(cls, reason, implementation, _packed_layer)


def _packed_layer(layer: Any) -> EncoderLayer:
    modules = layer._modules
    own, dense, norm = _parts(modules["attention"]._modules)
    qkv = tuple(own._modules[n]._parameters for n in ("query", "key", "value"))
    fc1 = modules["intermediate"]._modules["dense"]._parameters
    output = modules["output"]._modules
    fc2 = output["dense"]._parameters
    activation = activation_of(modules["intermediate"].intermediate_act_fn)
    assert activation is not None
    return EncoderLayer(
        tuple(p["weight"] for p in qkv),
        tuple(p["bias"] for p in qkv),
        dense["weight"],
        dense["bias"],
        norm,
        fc1["weight"],
        fc1["bias"],
        fc2["weight"],
        fc2["bias"],
        _norm(output["LayerNorm"]),
        own.num_attention_heads,
        own.attention_head_size**-0.5,
        activation,
    )


def _norm(module: nn.LayerNorm) -> Norm:
    parameters = module._parameters
    return Norm("post", parameters["weight"], parameters["bias"], module.eps)


def _parts(attention: dict[str, Any]) -> tuple[Any, dict[str, Any], Norm]:
    """Inner attention, parameters of the output projection and norm of a BertAttention."""
    output = attention["output"]._modules
    return attention["self"], output["dense"]._parameters, _norm(output["LayerNorm"])


def _implementation(own: Any, before_5: bool) -> str:
    if not before_5:
        return attention_implementation(own.config)
    # Before 5.0 the class says which attention it is, and relative positions stand in it.
    if own.position_embedding_type != "absolute":
        return f"positions are {own.position_embedding_type}"
    return "sdpa" if "Sdpa" in type(own).__name__ else "eager"


def _attention_reason(
    attention: Any, classes: Classes, inner: tuple[type, ...], like: Tensor
) -> str | None:
    reason = submodule_reason(attention, classes.attention)
    if reason is not None:
        return reason
    own, output = attention._modules["self"], attention._modules["output"]
    kind = type(own) if type(own) in inner else inner[0]
    hidden_size = like.shape[-1]
    modules, out = own._modules, output._modules
    reason = submodule_reason(own, kind, is_recording_hook) or submodule_reason(
        output, classes.self_output
    )
    if reason is not None:
        return reason
    if own.num_attention_heads * own.attention_head_size != hidden_size:
        return f"heads were pruned, or the input's hidden size {hidden_size} is another"
    if own.attention_head_size > MAX_HEAD_DIM:
        return f"there is no kernel for a head size of {own.attention_head_size}"
    for linear in (modules["query"], modules["key"], modules["value"], out["dense"]):
        reason = submodule_reason(linear, nn.Linear) or linear_reason(
            linear, like, hidden_size, hidden_size
        )
        if reason is not None:
            return reason
    return (
        submodule_reason(out["LayerNorm"], nn.LayerNorm)
        or norm_reason(out["LayerNorm"], like, hidden_size)
        or submodule_reason(modules["dropout"], nn.Dropout)
        or submodule_reason(out["dropout"], nn.Dropout)
        or dropout_reason(own, modules["dropout"], out["dropout"])
    )


def _feed_forward_reason(
    intermediate: Any, output: Any, classes: Classes, like: Tensor
) -> str | None:
    hidden_size = like.shape[-1]
    reason = submodule_reason(intermediate, classes.intermediate) or submodule_reason(
        output, classes.output
    )
    if reason is not None:
        return reason
    fc1, out = intermediate._modules["dense"], output._modules
    weight = fc1._parameters.get("weight")
    inner = weight.shape[0] if weight is not None and weight.dim() == 2 else 0
    act = intermediate._modules.get("intermediate_act_fn")
    return (
        submodule_reason(fc1, nn.Linear)
        or linear_reason(fc1, like, hidden_size, inner)
        or submodule_reason(out["dense"], nn.Linear)
        or linear_reason(out["dense"], like, inner, hidden_size)
        or submodule_reason(out["LayerNorm"], nn.LayerNorm)
        or norm_reason(out["LayerNorm"], like, hidden_size)
        or submodule_reason(out["dropout"], nn.Dropout)
        or dropout_reason(output, out["dropout"])
        or (submodule_reason(act, type(act)) if act is not None else None)
    )


def _cross_plan(
    layer: Any, arguments: dict[str, Any], classes: Classes, like: Tensor
) -> HostMask | str:
    cross = layer._modules.get("crossattention")
    if cross is None:
        return "the layer has no cross-attention (the original raises the error)"
    encoder = arguments["encoder_hidden_states"]
    if type(encoder) is not Tensor or encoder.dtype != like.dtype or encoder.device != like.device:
        return "encoder_hidden_states differ from the input in type, dtype or device"
    if encoder.dim() != 3 or encoder.shape[0] != like.shape[0] or encoder.shape[2] != like.shape[2]:
        return f"encoder_hidden_states have shape {tuple(encoder.shape)}"
    if not encoder.is_contiguous():
        return "encoder_hidden_states are not contiguous"
    reason = _attention_reason(cross, classes, classes.cross_attentions, like)
    if reason is not None:
        return reason
    own, past = cross._modules["self"], arguments.get("past_key_values")
    if past is not None:
        if type(past).__name__ != "EncoderDecoderCache":
            return f"cross-attention with a {type(past).__name__}"
        if past.is_updated.get(own.layer_idx):
            reason = kv_cache.kept_reason(
                past, own.layer_idx, like, encoder.shape[1], own.attention_head_size
            )
            if reason is not None:
                return reason
    given = arguments.get("encoder_attention_mask")
    if given is None:
        return NO_HOST_MASK
    sizes = (like.shape[0], own.num_attention_heads, like.shape[1], encoder.shape[1])
    return host_mask(given, like, sizes)


def _cross_attention(
    mask: HostMask, layer: Any, hidden_states: Tensor, arguments: dict[str, Any]
) -> Tensor:
    own, dense, norm = _parts(layer._modules["crossattention"]._modules)
    encoder, past = arguments["encoder_hidden_states"], arguments.get("past_key_values")
    batch, kv_len, hidden_size = encoder.shape
    query, key, value = (own._modules[n]._parameters for n in ("query", "key", "value"))
    if past is not None and past.is_updated.get(own.layer_idx):
        kept = past.cross_attention_cache.layers[own.layer_idx]
        keys, values = kept.keys, kept.values
    else:
        pair = blocks.project_kv(
            encoder.view(batch * kv_len, hidden_size),
            (key["weight"], value["weight"]),
            (key["bias"], value["bias"]),
            False,
        )
        keys, values = (
            t.unflatten(0, (batch, kv_len))
            .unflatten(2, (own.num_attention_heads, -1))
            .transpose(1, 2)
            for t in pair
        )
        if past is not None:
            keys, values = past.cross_attention_cache.update(keys, values, own.layer_idx)
            past.is_updated[own.layer_idx] = True
    return blocks.cross_attention_block(
        hidden_states,
        (query["weight"],),
        (query["bias"],),
        keys,
        values,
        dense["weight"],
        dense["bias"],
        False,
        own.num_attention_heads,
        own.attention_head_size**-0.5,
        norm,
        mask=mask.form,
    )
