"""TransformerDecoderLayerBase of fairseq 0.12, with and without encoder attention.

The caches stay in fairseq's own format, `incremental_state["<uuid>.attn_state"]` with prev_key and
prev_value (batch_size, num_heads, length, head_dim) and prev_key_padding_mask: its generator
reorders them between two steps, and its own layer can go on from them at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eet_patch.adapters.fairseq_host import (
    Activation,
    Classes,
    activation_of,
    additive_mask,
    attention_reason,
    batch_first,
    classes_of,
    feed_forward,
    feed_forward_reason,
    is_future_mask,
    norm_of,
    norms_reason,
    operand,
    padding_mask,
    qkv_of,
)
from eet_patch.adapters.host import HostMask
from eet_patch.gates import note_sound, still_sound
from eet_patch.ops import blocks
from eet_patch.ops.launch import NO_NORM, KVCache
from eet_patch.patching import GRADIENTS_NEEDED, Adapter

State = dict[str, Tensor | None]


class SelfPlan(NamedTuple):
    """`state` is None without incremental decoding; else the layer's part of it, which becomes
    true only when the layer is through.
    """

    mask: HostMask
    causal: bool
    state: State | None
    past: tuple[Tensor, Tensor] | None  # its keys and values so far
    padding: Tensor | None  # what it holds afterwards


class CrossPlan(NamedTuple):
    """`keys` is what the state held, or None: then the encoder's output is projected."""

    mask: HostMask
    keys: tuple[Tensor, Tensor] | None
    encoder_out: Tensor
    state: State | None
    padding: Tensor | None
    weights: bool
    head_weights: bool


class Plan(NamedTuple):
    activation: Activation
    own: SelfPlan
    cross: CrossPlan | None


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    classes = classes_of(cls)

    def plan(layer: Any, arguments: dict[str, Any]) -> Plan | str:
        x = arguments["x"]
        if x.dim() != 3 or x.numel() == 0:
            return f"the input has shape {tuple(x.shape)}"
        for name in ("prev_self_attn_state", "prev_attn_state"):
            if arguments.get(name) is not None:
                return f"{name} is given, which the kernels don't know"
        if not still_sound(layer, x):
            reason = layer_reason(layer, classes, x)
            if reason is not None:
                return reason
            note_sound(layer, x)
        activation = activation_of(layer.activation_fn)
        if isinstance(activation, str):
            return activation
        own = _self_plan(layer._modules["self_attn"], arguments)
        if isinstance(own, str):
            return own
        cross = None
        if layer.encoder_attn is not None and arguments.get("encoder_out") is not None:
            found = _cross_plan(layer, arguments)
            if isinstance(found, str):
                return found
            cross = found
        return Plan(activation, own, cross)

    def forward(plan: Plan, layer: Any, arguments: dict[str, Any]) -> Any:
        hidden_states = batch_first(arguments["x"])
        attn = layer._modules["self_attn"]
        cache = _grown(plan.own, attn, hidden_states) if plan.own.state is not None else None
        weights, biases = qkv_of(attn)
        out = attn._modules["out_proj"]._parameters
        hidden_states = blocks.attention_block(
            hidden_states,
            weights,
            biases,
            out["weight"],
            out["bias"],
            False,
            attn.num_heads,
            attn.scaling,
            norm_of(layer, "self_attn_layer_norm"),
            mask=plan.own.mask.form,
            mask_tensor=plan.own.mask.for_torch,
            causal=plan.own.causal,
            cache=cache,
        )
        attention_weights = keys = None
        if plan.cross is not None:
            hidden_states, attention_weights, keys = _cross_attention(
                plan.cross, layer, hidden_states
            )
        hidden_states = feed_forward(layer, hidden_states, plan.activation)
        # Only now, so that after an out-of-memory the original finds what it left.
        incremental_state = arguments.get("incremental_state")
        if plan.own.state is not None and cache is not None:
            kept = {"prev_key": cache.key, "prev_value": cache.value}
            plan.own.state.update(kept, prev_key_padding_mask=plan.own.padding)
            attn._set_input_buffer(incremental_state, plan.own.state)
        if plan.cross is not None and plan.cross.state is not None and keys is not None:
            kept = {"prev_key": keys[0], "prev_value": keys[1]}
            plan.cross.state.update(kept, prev_key_padding_mask=plan.cross.padding)
            layer._modules["encoder_attn"]._set_input_buffer(incremental_state, plan.cross.state)
        return hidden_states.transpose(0, 1), attention_weights, None

    return Adapter(plan, forward, operand)


def layer_reason(layer: Any, classes: Classes, like: Tensor) -> str | None:
    """Why the modules and parameters of a decoder layer can't be read in place, or None."""
    for name in ("attn_ln", "c_attn", "ffn_layernorm", "w_resid"):
        if getattr(layer, name) is not None:
            return f"the layer has a {name}, which the kernels don't know"
    if layer.cross_self_attention:
        return "cross_self_attention is set"
    if layer.onnx_trace:
        return "the layer is being exported (onnx_trace)"
    modules, size = layer._modules, like.shape[2]
    attn = modules["self_attn"]
    reason = attention_reason(attn, classes, like, (size, size))
    if reason is None and not attn.self_attention:
        reason = "the self-attention takes keys of its own"
    cross = modules.get("encoder_attn")
    if reason is None and cross is not None:
        reason = attention_reason(cross, classes, like, (cross.kdim, cross.vdim)) or norms_reason(
            like, modules["encoder_attn_layer_norm"]
        )
        if reason is None and (not cross.encoder_decoder_attention or cross.self_attention):
            reason = "the encoder attention is not an encoder-decoder attention"
        if reason is None and cross.kdim != cross.vdim:
            reason = "keys and values of the encoder attention differ in size"
    return reason or feed_forward_reason(layer, classes, like)


def _self_plan(attn: Any, arguments: dict[str, Any]) -> SelfPlan | str:
    x, incremental_state = arguments["x"], arguments.get("incremental_state")
    q_len, batch, _ = x.shape
    given, padding = arguments.get("self_attn_mask"), arguments.get("self_attn_padding_mask")
    state, past, past_len = None, None, 0
    if incremental_state is not None:
        state = attn._get_input_buffer(incremental_state)
        if state.get("prev_key") is not None:
            reason = _kept_reason(attn, state, x)
            if reason is not None:
                return reason
            past = (state["prev_key"], state["prev_value"])
            past_len = past[0].shape[2]
            if past[0].shape[0] != batch:
                return f"the state is of {past[0].shape[0]} sequences, and the input of {batch}"
        padding = attn._append_prev_key_padding_mask(
            padding, state.get("prev_key_padding_mask"), batch, past_len + q_len, False
        )
    sizes = (batch, attn.num_heads, q_len, past_len + q_len)
    mask = padding_mask(padding, x, (batch, past_len + q_len))
    if isinstance(mask, str):
        return mask
    causal = False
    if given is not None:
        causal = type(given) is Tensor and past_len == 0 and is_future_mask(given)
        if causal and given.shape[0] != q_len:
            return f"the attention mask has shape {tuple(given.shape)}, not {sizes[2:]}"
        if not causal:
            merged = additive_mask(given, mask, x, sizes)
            if isinstance(merged, str):
                return merged
            mask = merged
    return SelfPlan(mask, causal, state, past, padding)


def _kept_reason(attn: Any, state: State, like: Tensor) -> str | None:
    """Why the keys and values of an incremental state can't be read, or None."""
    key, value = state["prev_key"], state.get("prev_value")
    for tensor in (key, value):
        if type(tensor) is not Tensor or tensor.dtype != like.dtype or tensor.device != like.device:
            return "the incremental state differs from the input in type, dtype or device"
        if tensor.dim() != 4 or tensor.shape[1::2] != (attn.num_heads, attn.head_dim):
            return f"the incremental state holds keys of shape {tuple(tensor.shape)}"
        if attn.head_dim > 1 and tensor.stride(3) != 1:
            return "the incremental state's head dimension is not contiguous"
        if tensor.requires_grad and torch.is_grad_enabled():
            # Of all that a call reads the state alone is no argument or parameter.
            return GRADIENTS_NEEDED
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    if key.shape != value.shape:
        return "the incremental state holds keys and values of different shapes"
    return None


def _grown(plan: SelfPlan, attn: Any, hidden_states: Tensor) -> KVCache:
    """Buffers of exactly the past and the new tokens: a generator copies the whole state between
    two steps, so that room behind them would be lost.
    """
    batch, q_len, _ = hidden_states.shape
    past_len = plan.past[0].shape[2] if plan.past is not None else 0
    shape = (batch, attn.num_heads, past_len + q_len, attn.head_dim)
    key, value = hidden_states.new_empty(shape), hidden_states.new_empty(shape)
    if plan.past is not None:
        key[:, :, :past_len].copy_(plan.past[0])
        value[:, :, :past_len].copy_(plan.past[1])
    return KVCache(key, value, past_len)


def _cross_plan(layer: Any, arguments: dict[str, Any]) -> CrossPlan | str:
    x, encoder_out = arguments["x"], arguments["encoder_out"]
    attn, incremental_state = layer._modules["encoder_attn"], arguments.get("incremental_state")
    batch, padding = x.shape[1], arguments.get("encoder_padding_mask")
    head_weights = bool(arguments.get("need_head_weights"))
    weights = head_weights or bool(arguments.get("need_attn"))
    weights = weights or (not layer.training and layer.need_attn)
    state = keys = None
    if incremental_state is not None:
        state = attn._get_input_buffer(incremental_state)
    if state is not None and state.get("prev_key") is not None:
        reason = _kept_reason(attn, state, x)
        if reason is not None:
            return reason
        keys = (state["prev_key"], state["prev_value"])
        rows, kv_len = keys[0].shape[0], keys[0].shape[2]
    else:
        if type(encoder_out) is not Tensor or encoder_out.dtype != x.dtype:
            return "encoder_out differs from the input in type or dtype"
        if encoder_out.device != x.device:
            return f"encoder_out is on {encoder_out.device} and the input on {x.device}"
        if encoder_out.dim() != 3 or encoder_out.shape[2] != attn.kdim or not encoder_out.numel():
            return f"encoder_out has shape {tuple(encoder_out.shape)}"
        if attn.beam_size > 1 and batch == encoder_out.shape[1]:
            # One row a sentence is kept: the beams of a sentence see the same encoder.
            if batch % attn.beam_size:
                return f"{batch} rows are not a multiple of the beam size {attn.beam_size}"
            encoder_out = encoder_out[:, :: attn.beam_size]
            padding = padding[:: attn.beam_size] if isinstance(padding, Tensor) else padding
        kv_len, rows = encoder_out.shape[:2]
    if batch % rows:
        return f"encoder_out is of {rows} sequences, and the input of {batch}"
    if state is not None:
        padding = attn._append_prev_key_padding_mask(
            padding, state.get("prev_key_padding_mask"), rows, kv_len, True
        )
    mask = padding_mask(padding, x, (rows, kv_len))
    if isinstance(mask, str):
        return mask
    return CrossPlan(mask, keys, encoder_out, state, padding, weights, head_weights)


def _project(attn: Any, encoder_out: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (batch_size, num_heads, kv_len, head_dim) of an encoder's output (kv_len,
    batch_size, kdim), with the strides that the host's own have, which its layer relies on.
    """
    kv_len, batch, size = encoder_out.shape
    flat = encoder_out.contiguous().view(kv_len * batch, size)
    weights, biases = qkv_of(attn)
    key, value = (
        t.view(kv_len, batch, attn.num_heads, attn.head_dim).permute(1, 2, 0, 3)
        for t in blocks.project_kv(flat, weights[1:], biases[1:], False)
    )
    return key, value


def _cross_attention(
    plan: CrossPlan, layer: Any, hidden_states: Tensor
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """The block's output, the attention weights if they were asked for, and the keys and values."""
    attn = layer._modules["encoder_attn"]
    keys = plan.keys if plan.keys is not None else _project(attn, plan.encoder_out)
    batch, q_len, hidden_size = hidden_states.shape
    rows = keys[0].shape[0]
    # Beams that share a row of the encoder are further queries of that row.
    grouped = hidden_states.view(rows, batch // rows * q_len, hidden_size)
    if plan.weights:
        out, weights = _attention_with_weights(plan, layer, grouped, keys)
        # (rows, heads, beams * q_len, kv_len) to the host's (heads, batch, q_len, kv_len).
        weights = weights.transpose(0, 1).reshape(attn.num_heads, batch, q_len, -1)
        returned = weights if plan.head_weights else weights.mean(dim=0)
        return out.view(hidden_states.shape), returned, keys
    query, projected = attn._modules["q_proj"]._parameters, attn._modules["out_proj"]._parameters
    out = blocks.cross_attention_block(
        grouped,
        (query["weight"],),
        (query["bias"],),
        *keys,
        projected["weight"],
        projected["bias"],
        False,
        attn.num_heads,
        attn.scaling,
        norm_of(layer, "encoder_attn_layer_norm"),
        mask=plan.mask.form,
    )
    return out.view(hidden_states.shape), None, keys


def _attention_with_weights(
    plan: CrossPlan, layer: Any, hidden_states: Tensor, keys: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The cross-attention block where its weights are asked for: they are formed, so torch uses
    them too. Weights are fp32, (rows, num_heads, q_len, kv_len).
    """
    attn = layer._modules["encoder_attn"]
    query_proj, out_proj = (attn._modules[n]._parameters for n in ("q_proj", "out_proj"))
    norm = norm_of(layer, "encoder_attn_layer_norm")
    rows, q_len, hidden_size = hidden_states.shape
    flat = hidden_states.view(rows * q_len, hidden_size)
    (query,) = blocks.project_qkv(
        flat,
        (query_proj["weight"],),
        (query_proj["bias"],),
        False,
        norm if norm.placement == "pre" else NO_NORM,
        parts=1,
    )
    query = query.view(rows, q_len, attn.num_heads, attn.head_dim).transpose(1, 2)
    scores = torch.matmul(query * attn.scaling, keys[0].transpose(2, 3))
    if plan.mask.tensor is not None:
        scores.masked_fill_(plan.mask.tensor[:, None, None], -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32)
    context = torch.matmul(weights.to(scores.dtype), keys[1]).transpose(1, 2)
    out = blocks.project_out(
        context.reshape(rows * q_len, hidden_size),
        out_proj["weight"],
        out_proj["bias"],
        False,
        norm,
        flat,
    )
    return out, weights
