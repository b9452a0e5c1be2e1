"""GPT2Block of transformers 4.56 to 5.23: pre-norm self-attention, optional cross-attention,
feed-forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from eet_patch.adapters import kv_cache
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
from eet_patch.gates import note_sound, still_sound, submodule_reason
from eet_patch.ops import blocks
from eet_patch.ops.attention import MAX_HEAD_DIM
from eet_patch.ops.launch import Norm
from eet_patch.patching import Adapter

KNOWN = frozenset(
    {"hidden_states", "past_key_values", "attention_mask", "encoder_hidden_states"}
    | {"encoder_attention_mask", "output_attentions"}
)


class Plan(NamedTuple):
    mask: HostMask
    kv_len: int
    causal: bool
    crop: bool  # without a mask only the first q_len keys count, however long the cache
    scale: float
    activation: str
    cross_mask: HostMask


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    module = sys.modules[cls.__module__]
    attention_cls, conv_cls = module.GPT2Attention, module.Conv1D  # type: ignore[attr-defined]
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
        batch, q_len, hidden_size = hidden_states.shape
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
        past, kv_len = arguments.get("past_key_values"), q_len
        if past is not None:
            cache = kv_cache.self_attention_cache(past)
            kv_len = kv_cache.kv_length(cache, attn.layer_idx, q_len)
            if isinstance(kv_len, str):
                return kv_len
        given = arguments.get("attention_mask")
        mask = host_mask(given, hidden_states, (batch, attn.num_heads, q_len, kv_len))
        if isinstance(mask, str):
            return mask
        causal = crop = False
        if q_len > 1:
            if implementation == "eager":
                # While the attention had a causal buffer, eager applied it; later the mask does.
                causal = "bias" in attn._buffers
            elif implementation == "sdpa":
                # Without a mask sdpa aligns causality with the first key, and keys beyond q_len
                # don't count.
                causal = given is None
                crop = causal
            else:
                causal = True
        scale = softmax_scale(attn, implementation)
        cross_mask: Any = NO_HOST_MASK
        if encoder_hidden_states is not None:
            cross_mask = _cross_plan(
                layer, arguments, attention_cls, conv_cls, hidden_states, implementation
            )
            if isinstance(cross_mask, str):
                return cross_mask
        return Plan(mask, kv_len, causal, crop, scale, activation, cross_mask)

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
                plan.kv_len,
                plan.crop,
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
                _norm(modules["ln_1"]),
                mask=plan.mask.form,
                mask_tensor=plan.mask.for_torch,
                causal=plan.causal,
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
                _norm(modules["ln_2"]),
            )
        return (hidden_states,) if tuples else hidden_states

    return Adapter(plan, forward)


def layer_reason(layer: Any, like: Tensor) -> str | None:
    """Why the modules and parameters of a GPT2Block can't be read in place, or None."""
    if still_sound(layer, like):
        return None
    module = sys.modules[type(layer).__module__]
    attention_cls, mlp_cls, conv_cls = module.GPT2Attention, module.GPT2MLP, module.Conv1D  # type: ignore[attr-defined]
    modules = layer._modules
    attn, mlp, ln_1, ln_2 = modules["attn"], modules["mlp"], modules["ln_1"], modules["ln_2"]
    reason = (
        submodule_reason(attn, attention_cls, is_recording_hook)
        or _attention_reason(attn, conv_cls, like, 3)
        or submodule_reason(mlp, mlp_cls)
        or _mlp_reason(mlp, conv_cls, like)
        or _norms_reason(like, ln_1, ln_2)
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


def _norm(module: nn.LayerNorm) -> Norm:
    parameters = module._parameters
    return Norm("pre", parameters["weight"], parameters["bias"], module.eps)


def _norms_reason(like: Tensor, *norms: Any) -> str | None:
    for norm in norms:
        reason = submodule_reason(norm, nn.LayerNorm) or norm_reason(norm, like, like.shape[-1])
        if reason is not None:
            return reason
    return None


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
        submodule_reason(modules["c_attn"], conv_cls)
        or submodule_reason(modules["c_proj"], conv_cls)
        or linear_reason(modules["c_attn"], like, hidden_size, parts * hidden_size, True)
        or linear_reason(modules["c_proj"], like, hidden_size, hidden_size, True)
        or submodule_reason(modules["attn_dropout"], nn.Dropout)
        or submodule_reason(modules["resid_dropout"], nn.Dropout)
        or dropout_reason(attn, modules["attn_dropout"], modules["resid_dropout"])
    )


def _mlp_reason(mlp: Any, conv_cls: type, like: Tensor) -> str | None:
    modules = mlp._modules
    hidden_size = like.shape[-1]
    reason = (
        submodule_reason(modules["c_fc"], conv_cls)
        or submodule_reason(modules["c_proj"], conv_cls)
        or submodule_reason(modules["dropout"], nn.Dropout)
        or dropout_reason(mlp, modules["dropout"])
        or submodule_reason(modules["act"], type(modules["act"]))
    )
    if reason is not None:
        return reason
    weight = modules["c_fc"]._parameters["weight"]
    inner = weight.shape[1] if weight is not None and weight.dim() == 2 else 0
    return linear_reason(modules["c_fc"], like, hidden_size, inner, True) or linear_reason(
        modules["c_proj"], like, inner, hidden_size, True
    )


def _cross_plan(
    layer: Any,
    arguments: dict[str, Any],
    attention_cls: type,
    conv_cls: type,
    like: Tensor,
    implementation: str,
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
        submodule_reason(cross, attention_cls, is_recording_hook)
        or _attention_reason(cross, conv_cls, like, 2)
        or submodule_reason(cross._modules.get("q_attn"), conv_cls)
        or linear_reason(cross._modules["q_attn"], like, like.shape[2], like.shape[2], True)
        or _norms_reason(like, modules["ln_cross_attn"])
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
        _norm(layer._modules["ln_cross_attn"]),
        mask=plan.cross_mask.form,
    )
