"""OPTDecoderLayer of transformers 4.56 to 5.23: causal self-attention and feed-forward, each with
its norm before it (do_layer_norm_before) or behind it (OPT-350m).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

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
from eet_patch.adapters.host import (
    TRAINING,
    TRAINING_DROPOUT,
    activation_of,
    attention_implementation,
    attentions_reason,
    is_recording_hook,
    other_arguments_reason,
    version_before,
)
from eet_patch.gates import note_sound, still_sound, submodule_reason
from eet_patch.ops import blocks
from eet_patch.ops.attention import MAX_HEAD_DIM
from eet_patch.ops.decode import DecodeLayer
from eet_patch.patching import Adapter

KNOWN = frozenset({"hidden_states", "past_key_values", "attention_mask", "output_attentions"})
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Plan(NamedTuple):
    sight: Sight
    activation: str


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    tuples = version_before("5.4")

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
        activation = activation_of(layer.activation_fn)
        if activation is None:
            return f"there is no kernel for the activation {type(layer.activation_fn).__name__}"
        attn = layer._modules["self_attn"]
        implementation = attention_implementation(attn.config)
        if " " in implementation:
            return implementation
        sight = sight_of(
            hidden_states,
            arguments.get("attention_mask"),
            arguments.get("past_key_values"),
            attn.layer_idx,
            attn.num_heads,
            implementation,
        )
        return sight if isinstance(sight, str) else Plan(sight, activation)

    def forward(plan: Plan, layer: Any, arguments: dict[str, Any]) -> Any:
        modules = layer._modules
        attn = modules["self_attn"]
        hidden_states, past = arguments["hidden_states"], arguments.get("past_key_values")
        qkv = [attn._modules[name]._parameters for name in PROJECTIONS]
        out, fc1, fc2 = (
            module._parameters
            for module in (attn._modules["out_proj"], modules["fc1"], modules["fc2"])
        )
        placement = "pre" if layer.do_layer_norm_before else "post"
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
                tuple(part["weight"] for part in qkv),
                tuple(part["bias"] for part in qkv),
                out["weight"],
                out["bias"],
                False,
                attn.num_heads,
                attn.scaling,
                norm_of(modules["self_attn_layer_norm"], placement),
                mask=plan.sight.mask.form,
                mask_tensor=plan.sight.mask.for_torch,
                causal=plan.sight.causal,
                cache=held.buffers,
                update_kv=held.update_kv,
            )
            hidden_states = blocks.ffn(
                hidden_states,
                fc1["weight"],
                fc1["bias"],
                fc2["weight"],
                fc2["bias"],
                False,
                plan.activation,
                norm_of(modules["final_layer_norm"], placement),
            )
        return (hidden_states,) if tuples else hidden_states

    return Adapter(plan, forward)


def layer_reason(layer: Any, like: Tensor) -> str | None:
    """Why the modules and parameters of an OPTDecoderLayer can't be read in place, or None."""
    if still_sound(layer, like):
        return None
    attn, hidden_size = layer._modules["self_attn"], like.shape[-1]
    attention_cls = sys.modules[type(layer).__module__].OPTAttention  # type: ignore[attr-defined]
    modules, parts = layer._modules, attn._modules
    reason = submodule_reason(attn, attention_cls, is_recording_hook)
    if reason is not None:
        return reason
    if attn.training and attn.dropout:
        return TRAINING_DROPOUT
    if attn.embed_dim != hidden_size or attn.head_dim * attn.num_heads != hidden_size:
        return (
            f"heads were pruned, or the input's hidden size {hidden_size} is not {attn.embed_dim}"
        )
    if attn.head_dim > MAX_HEAD_DIM:
        return f"there is no kernel for a head size of {attn.head_dim}"
    inner = out_features(modules["fc1"], 0)
    reason = (
        products_reason(
            like,
            nn.Linear,
            *((parts[name], hidden_size, hidden_size) for name in (*PROJECTIONS, "out_proj")),
            (modules["fc1"], hidden_size, inner),
            (modules["fc2"], inner, hidden_size),
        )
        or norms_reason(like, modules["self_attn_layer_norm"], modules["final_layer_norm"])
        or activation_reason(modules.get("activation_fn"))
    )
    if reason is None:
        note_sound(layer, like)
    return reason


# --- the model in the terms of the loops ---------------------------------------------------------


def _loop_parts(model: Any) -> Parts | str:
    module: Any = sys.modules[type(model).__module__]
    beneath: Any = model._modules["model"]
    decoder: Any = beneath._modules.get("decoder")
    if decoder is None:
        return f"the model is a {type(beneath).__name__}"
    if decoder.training:
        return TRAINING  # where layers may be left out at random
    modules = decoder._modules
    if modules.get("project_in") is not None or modules.get("project_out") is not None:
        return "words are projected to the layers' width"
    if modules.get("final_layer_norm") is None:
        return "there is no norm behind the layers"
    positions = modules["embed_positions"]
    return Parts(
        ((beneath, module.OPTModel), (decoder, module.OPTDecoder)),
        modules["embed_tokens"],
        (positions, module.OPTLearnedPositionalEmbedding),
        positions.offset,
        modules["final_layer_norm"],
        modules["layers"],
        module.OPTDecoderLayer,
    )


def _loop_layer(layer: Any, like: Tensor) -> Layer | str:
    reason = TRAINING if layer.training else layer_reason(layer, like)
    if reason is not None:
        return reason
    if not layer.do_layer_norm_before:
        return "the norms stand behind attention and feed-forward"
    modules = layer._modules
    attn = modules["self_attn"]
    implementation = attention_implementation(attn.config)
    if " " in implementation:
        return implementation
    norms = modules["self_attn_layer_norm"], modules["final_layer_norm"]
    first, second = (norm._parameters for norm in norms)
    qkv = [attn._modules[name]._parameters for name in PROJECTIONS]
    out, fc1, fc2 = (
        module._parameters for module in (attn._modules["out_proj"], modules["fc1"], modules["fc2"])
    )
    parameters = DecodeLayer(
        first["weight"],
        first["bias"],
        tuple(part["weight"] for part in qkv),
        tuple(part["bias"] for part in qkv),
        out["weight"],
        out["bias"],
        second["weight"],
        second["bias"],
        fc1["weight"],
        fc1["bias"],
        fc2["weight"],
        fc2["bias"],
        NO_CACHE_YET,
        NO_CACHE_YET,
        attn.scaling,
    )
    activation, eps = activation_of(layer.activation_fn), (norms[0].eps, norms[1].eps)
    return Layer(parameters, attn.num_heads, activation, eps, False)


LOOP: DecoderKind = DecoderKind(_loop_parts, _loop_layer)
