"""GPTBigCodeBlock of transformers 4.56 to 5.23: GPT-2's block with one product for query, key and
value, whose heads share one key and value (multi_query) or stand key and value beside each query.
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
from eet_patch.adapters.host import (
    TRAINING,
    TRAINING_DROPOUT,
    activation_of,
    attention_implementation,
    attentions_reason,
    dropout_reason,
    is_recording_hook,
    other_arguments_reason,
    version_before,
)
from eet_patch.gates import note_sound, still_sound, submodule_reason
from eet_patch.ops import blocks
from eet_patch.ops.attention import MAX_HEAD_DIM
from eet_patch.ops.launch import attention
from eet_patch.patching import Adapter

KNOWN = frozenset({"hidden_states", "layer_past", "attention_mask", "output_attentions"})


class Plan(NamedTuple):
    sight: Sight
    activation: str


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    tuples, cuts_masks = version_before("5.4"), version_before("5.2")

    def plan(layer: Any, arguments: dict[str, Any]) -> Plan | str:
        if arguments.get("encoder_hidden_states") is not None:
            return "cross-attention, for which this layer has no kernel"
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
        attn, mlp = layer._modules["attn"], layer._modules["mlp"]
        activation = activation_of(mlp.act)
        if activation is None:
            return f"there is no kernel for the activation {type(mlp.act).__name__}"
        implementation = attention_implementation(attn.config)
        if " " in implementation:
            return implementation
        sight = sight_of(
            hidden_states,
            arguments.get("attention_mask"),
            kv_cache.self_attention_cache(arguments.get("layer_past")),
            attn.layer_idx,
            attn.num_heads,
            implementation,
            cuts_masks=cuts_masks,
        )
        return sight if isinstance(sight, str) else Plan(sight, activation)

    def forward(plan: Plan, layer: Any, arguments: dict[str, Any]) -> Any:
        modules = layer._modules
        attn, mlp = modules["attn"], modules["mlp"]._modules
        fc, proj = mlp["c_fc"]._parameters, mlp["c_proj"]._parameters
        hidden_states, past = arguments["hidden_states"], arguments.get("layer_past")
        held: Any = kv_cache.NO_CACHE
        if past is not None:
            held = kv_cache.SelfAttentionCache(
                past,
                attn.layer_idx,
                hidden_states,
                attn.kv_heads,
                arguments,
                plan.sight.kv_len,
                plan.sight.crop,
                attn.head_dim,
            )
        with held:
            hidden_states = _attend(attn, modules["ln_1"], hidden_states, plan.sight, held)
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
        # With the weights of the attention, which nobody asked for.
        return (hidden_states, None) if tuples else hidden_states

    return Adapter(plan, forward)


def _attend(attn: Any, ln_1: Any, hidden_states: Tensor, sight: Sight, held: Any) -> Tensor:
    batch, q_len, hidden_size = hidden_states.shape
    if hidden_states.numel() == 0:
        return hidden_states.clone()
    heads, head_dim, rows = attn.num_heads, attn.head_dim, batch * q_len
    c_attn, c_proj = attn._modules["c_attn"]._parameters, attn._modules["c_proj"]._parameters
    flat, norm = hidden_states.view(rows, hidden_size), norm_of(ln_1)
    (packed,) = blocks.project_qkv(
        flat, (c_attn["weight"],), (c_attn["bias"],), False, norm, parts=1
    )
    packed = packed.view(batch, q_len, -1)
    if attn.multi_query:
        query, key, value = packed.split((hidden_size, head_dim, head_dim), dim=2)
        query = query.unflatten(2, (heads, head_dim)).transpose(1, 2)
        key, value = key[:, None], value[:, None]
    else:
        each = packed.unflatten(2, (heads, 3 * head_dim)).transpose(1, 2)
        query, key, value = each.split(head_dim, dim=3)
    if held.buffers is not None:
        past_len = held.buffers.past_len
        end = past_len + q_len
        held.buffers.key[:, :, past_len:end].copy_(key)
        held.buffers.value[:, :, past_len:end].copy_(value)
        key, value = held.buffers.key[:, :, :end], held.buffers.value[:, :, :end]
    elif held.update_kv is not None:
        key, value = held.update_kv(key, value)
    context = attention(
        query,
        key,
        value,
        sight.mask.form,
        sight.causal,
        attn.scaling,
        mask_tensor=sight.mask.for_torch,
    )
    out = blocks.project_out(
        context.view(rows, hidden_size), c_proj["weight"], c_proj["bias"], False, norm, flat
    )
    return out.view(hidden_states.shape)


def layer_reason(layer: Any, like: Tensor) -> str | None:
    """Why the modules and parameters of a GPTBigCodeBlock can't be read in place, or None."""
    if still_sound(layer, like):
        return None
    module: Any = sys.modules[type(layer).__module__]
    modules, hidden_size = layer._modules, like.shape[-1]
    attn, mlp = modules["attn"], modules["mlp"]
    reason = submodule_reason(
        attn, module.GPTBigCodeAttention, is_recording_hook
    ) or submodule_reason(mlp, module.GPTBigCodeMLP)
    if reason is not None:
        return reason
    if attn.training and (attn.attn_dropout or attn.attn_pdrop):
        return TRAINING_DROPOUT
    if attn.embed_dim != hidden_size or attn.head_dim * attn.num_heads != hidden_size:
        return (
            f"heads were pruned, or the input's hidden size {hidden_size} is not {attn.embed_dim}"
        )
    if attn.head_dim > MAX_HEAD_DIM:
        return f"there is no kernel for a head size of {attn.head_dim}"
    parts, ffn = attn._modules, mlp._modules
    inner = out_features(ffn["c_fc"], 0)
    packed = hidden_size + 2 * (attn.head_dim if attn.multi_query else hidden_size)
    reason = (
        products_reason(
            like,
            nn.Linear,
            (parts["c_attn"], hidden_size, packed),
            (parts["c_proj"], hidden_size, hidden_size),
            (ffn["c_fc"], hidden_size, inner),
            (ffn["c_proj"], inner, hidden_size),
        )
        or norms_reason(like, modules["ln_1"], modules["ln_2"])
        or submodule_reason(parts["resid_dropout"], nn.Dropout)
        or submodule_reason(ffn["dropout"], nn.Dropout)
        or dropout_reason(attn, parts["resid_dropout"])
        or dropout_reason(mlp, ffn["dropout"])
        or activation_reason(ffn.get("act"))
    )
    if reason is None:
        note_sound(layer, like)
    return reason
