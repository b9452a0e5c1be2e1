"""GPTNeoBlock of transformers 4.56 to 5.23: GPT-2's block with three projections without biases,
unscaled scores, and layers that see a window of the past (`local`) between those that see all.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eet_patch.adapters import kv_cache
from eet_patch.adapters.causal import (
    Sight,
    activation_reason,
    norm_of,
    norms_reason,
    out_features,
    products_reason,
    sight_of,
)
from eet_patch.adapters.decoder import NO_CACHE_YET, DecoderKind, Layer, Parts
from eet_patch.adapters.gpt2 import gpt_parts
from eet_patch.adapters.host import (
    TRAINING,
    activation_of,
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

KNOWN = frozenset({"hidden_states", "layer_past", "attention_mask", "output_attentions"})
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Plan(NamedTuple):
    sight: Sight
    activation: str


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    cuts_masks = version_before("5.2")

    def plan(layer: Any, arguments: dict[str, Any]) -> Plan | str:
        reason = other_arguments_reason(arguments, KNOWN) or attentions_reason(arguments)
        if reason is not None:
            return reason
        if layer.training:
            return TRAINING
        hidden_states = arguments["hidden_states"]
        if hidden_states.dim() != 3:
            return f"the input has {hidden_states.dim()} dimensions"
        reason = layer_reason(layer, hidden_states)
        if reason is not None:
            return reason
        act = layer._modules["mlp"].act
        activation = activation_of(act)
        if activation is None:
            return f"there is no kernel for the activation {type(act).__name__}"
        sight = _sight_of(layer, arguments, cuts_masks)
        return sight if isinstance(sight, str) else Plan(sight, activation)

    def forward(plan: Plan, layer: Any, arguments: dict[str, Any]) -> Any:
        modules = layer._modules
        own, mlp = modules["attn"]._modules["attention"], modules["mlp"]._modules
        hidden_states, past = arguments["hidden_states"], arguments.get("layer_past")
        qkv = [own._modules[name]._parameters for name in PROJECTIONS]
        out, fc, proj = (
            module._parameters for module in (own._modules["out_proj"], mlp["c_fc"], mlp["c_proj"])
        )
        held: Any = kv_cache.NO_CACHE
        if past is not None:
            held = kv_cache.SelfAttentionCache(
                past,
                own.layer_id,
                hidden_states,
                own.num_heads,
                arguments,
                plan.sight.kv_len,
                plan.sight.crop,
            )
        with held:
            hidden_states = blocks.attention_block(
                hidden_states,
                tuple(part["weight"] for part in qkv),
                tuple(part["bias"] for part in qkv),
                out["weight"],
                out["bias"],
                False,
                own.num_heads,
                1.0,
                norm_of(modules["ln_1"]),
                mask=plan.sight.mask.form,
                mask_tensor=plan.sight.mask.for_torch,
                causal=plan.sight.causal,
                cache=held.buffers,
                update_kv=held.update_kv,
            )
            hidden_states = blocks.ffn(
                hidden_states,
                fc["weight"],
                fc["bias"],
                proj["weight"],
                proj["bias"],
                False,
                plan.activation,
                norm_of(modules["ln_2"]),
            )
        return hidden_states, None  # the weights of the attention, which nobody asked for

    return Adapter(plan, forward)


def _sight_of(layer: Any, arguments: dict[str, Any], cuts_masks: bool) -> Sight | str:
    attention = layer._modules["attn"]
    own = attention._modules["attention"]
    hidden_states = arguments["hidden_states"]
    q_len = hidden_states.shape[1]
    sight = sight_of(
        hidden_states,
        arguments.get("attention_mask"),
        arguments.get("layer_past"),
        own.layer_id,
        own.num_heads,
        "eager",
        eager_is_causal=True,
        cuts_masks=cuts_masks,
    )
    if isinstance(sight, str):
        return sight
    reason = buffer_reason(attention)
    if reason is not None:
        return reason
    seen = own._buffers["bias"]
    if sight.kv_len > seen.shape[-1]:
        return "there are more keys than the model has positions"
    if attention.attention_type == "global" or sight.kv_len <= own.config.window_size:
        return sight
    past = arguments.get("layer_past")
    if past is not None and own.layer_id < len(past.layers):
        if type(past.layers[own.layer_id]).__name__ == "StaticLayer":
            # The host counts its window from the end of the cache, and not from the last token.
            return "a local layer over a static cache"
    seen = seen[:, :, sight.kv_len - q_len : sight.kv_len, : sight.kv_len]
    given = sight.mask.tensor
    if given is not None:
        seen = torch.where(seen, given, torch.finfo(given.dtype).min)
    sizes = (hidden_states.shape[0], own.num_heads, q_len, sight.kv_len)
    mask = host_mask(seen, hidden_states, sizes)
    return mask if isinstance(mask, str) else Sight(mask, sight.kv_len, False, False)


# What each attention's buffer was when it was last found to be the host's own.
_buffers: weakref.WeakKeyDictionary[Any, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def buffer_reason(attention: Any) -> str | None:
    """Why the buffer that the host's attention masks by isn't one of causality, or for a local
    layer of causality and its window; or None. Some people write prefixes into it.
    """
    own = attention._modules["attention"]
    buffer, kind, window = own._buffers["bias"], attention.attention_type, own.config.window_size
    version = 0 if buffer.is_inference() else buffer._version
    state = buffer.data_ptr(), version, buffer.shape, buffer.device, kind, window
    if _buffers.get(own) == state:
        return None
    positions = buffer.shape[-1]
    expected = torch.ones(positions, positions, dtype=torch.bool, device=buffer.device).tril()
    if kind == "local":
        expected ^= expected.tril(-window)
    if buffer.dtype != torch.bool or not torch.equal(buffer, expected[None, None]):
        return "the causal buffer of an attention was changed"
    _buffers[own] = state
    return None


def layer_reason(layer: Any, like: Tensor) -> str | None:
    """Why the modules and parameters of a GPTNeoBlock can't be read in place, or None."""
    if still_sound(layer, like):
        return None
    module: Any = sys.modules[type(layer).__module__]
    modules, hidden_size = layer._modules, like.shape[-1]
    attention, mlp = modules["attn"], modules["mlp"]
    own = attention._modules["attention"]
    reason = (
        submodule_reason(attention, module.GPTNeoAttention, is_recording_hook)
        or submodule_reason(own, module.GPTNeoSelfAttention, is_recording_hook)
        or submodule_reason(mlp, module.GPTNeoMLP)
    )
    if reason is not None:
        return reason
    if own.embed_dim != hidden_size or own.head_dim * own.num_heads != hidden_size:
        return f"heads were pruned, or the input's hidden size {hidden_size} is not {own.embed_dim}"
    if own.head_dim > MAX_HEAD_DIM:
        return f"there is no kernel for a head size of {own.head_dim}"
    parts, ffn = own._modules, mlp._modules
    inner = out_features(ffn["c_fc"], 0)
    dropouts = parts["attn_dropout"], parts["resid_dropout"]
    reason = (
        products_reason(
            like,
            nn.Linear,
            *((parts[name], hidden_size, hidden_size) for name in (*PROJECTIONS, "out_proj")),
            (ffn["c_fc"], hidden_size, inner),
            (ffn["c_proj"], inner, hidden_size),
        )
        or norms_reason(like, modules["ln_1"], modules["ln_2"])
        or submodule_reason(dropouts[0], nn.Dropout)
        or submodule_reason(dropouts[1], nn.Dropout)
        or submodule_reason(ffn["dropout"], nn.Dropout)
        or dropout_reason(own, *dropouts)
        or dropout_reason(mlp, ffn["dropout"])
        or activation_reason(ffn.get("act"))
    )
    if reason is None:
        note_sound(layer, like)
    return reason


# --- the model in the terms of the loops ---------------------------------------------------------


def _loop_parts(model: Any) -> Parts | str:
    module: Any = sys.modules[type(model).__module__]
    return gpt_parts(model, module.GPTNeoModel, module.GPTNeoBlock)


def _loop_layer(layer: Any, like: Tensor) -> Layer | str:
    if layer.training:
        return TRAINING
    reason = layer_reason(layer, like) or buffer_reason(layer._modules["attn"])
    if reason is not None:
        return reason
    modules = layer._modules
    attention, mlp = modules["attn"], modules["mlp"]
    own, ln_1, ln_2 = attention._modules["attention"], modules["ln_1"], modules["ln_2"]
    qkv = [own._modules[name]._parameters for name in PROJECTIONS]
    out, fc, proj = (
        module._parameters
        for module in (own._modules["out_proj"], mlp._modules["c_fc"], mlp._modules["c_proj"])
    )
    parameters = DecodeLayer(
        ln_1._parameters["weight"],
        ln_1._parameters["bias"],
        tuple(part["weight"] for part in qkv),
        tuple(part["bias"] for part in qkv),
        out["weight"],
        out["bias"],
        ln_2._parameters["weight"],
        ln_2._parameters["bias"],
        fc["weight"],
        fc["bias"],
        proj["weight"],
        proj["bias"],
        NO_CACHE_YET,
        NO_CACHE_YET,
        1.0,
    )
    window = own.config.window_size if attention.attention_type == "local" else None
    activation, eps = activation_of(mlp.act), (ln_1.eps, ln_2.eps)
    return Layer(parameters, own.num_heads, activation, eps, False, window)


LOOP: DecoderKind = DecoderKind(_loop_parts, _loop_layer)
