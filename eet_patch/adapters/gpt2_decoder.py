"""What the loops over GPT2LMHeadModel share: whether a call of generate() and a model are ones that
they know, and where the model's parameters lie.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eet_patch.adapters import gpt2
from eet_patch.adapters.host import (
    activation_of,
    attention_implementation,
    is_recording_hook,
    linear_reason,
    norm_reason,
)
from eet_patch.gates import parameter_reason, submodule_reason
from eet_patch.generation.step import DecoderModel
from eet_patch.ops.decode import DecodeLayer
from eet_patch.ops.launch import MAX_SKINNY_ROWS

KNOWN_KWARGS = frozenset(
    {"attention_mask", "past_key_values", "use_cache", "position_ids", "cache_position"}
    | {"inputs_embeds", "logits_to_keep"}
)
OWN_ARGUMENTS = frozenset(
    {"input_ids", "logits_processor", "stopping_criteria", "generation_config"}
    | {"synced_gpus", "streamer"}
)
# What transformers' loop calls between two tokens, and ours does not.
HOOK_METHODS = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")


class Context(NamedTuple):
    """The context of a call: its keys, the padding on its left, and where positions go on."""

    kv_len: int
    starts: Tensor  # (batch_size,) int32
    next_positions: Tensor  # (batch_size,) int64, of the first new token
    new_tokens: int  # that are asked for at most
    max_length: int  # of a sequence
    fresh: bool  # the cache was empty and is not the user's


def head_weight_of(model: Any, arguments: dict[str, Any]) -> Any:
    """The operand by which the engine checks dtype and device."""
    head = model._modules.get("lm_head")
    return head._parameters.get("weight") if isinstance(head, nn.Linear) else None


def context_of(model: Any, arguments: dict[str, Any]) -> Context | str:
    """The context of a call that passed `call_reason`, or why the loops can't take it."""
    config = arguments["generation_config"]
    input_ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    kv_len = context_length(arguments, config)
    assert kv_len is not None
    starts = torch.zeros(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)
    if mask is not None:
        starts = kv_len - mask.sum(dim=1)
        # Padding must stand on the left alone.
        if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
            return "the attention mask has zeros behind ones"
    position_ids = arguments.get("position_ids")
    next_positions = kv_len - starts
    if position_ids is not None:
        next_positions = position_ids[:, -1].expand(input_ids.shape[0]) + 1
    max_length = longest(arguments["stopping_criteria"])
    if max_length is None:
        return "no maximum length is set"
    new_tokens = max_length - input_ids.shape[1]
    if kv_len + new_tokens - 1 > model.config.n_positions:
        return "the maximum length is beyond the model's positions"
    if new_tokens < 2:
        return "a single token is asked for"
    fresh = past_length(arguments) == 0
    fresh = fresh and not getattr(arguments.get("past_key_values"), "_is_user_defined", False)
    return Context(kv_len, starts.to(torch.int32), next_positions, new_tokens, max_length, fresh)


def call_reason(model: Any, arguments: dict[str, Any], config: Any) -> str | None:
    """What of the call itself the loop doesn't do."""
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states of each step were asked for"
    for name in arguments.keys() - OWN_ARGUMENTS - KNOWN_KWARGS:
        if arguments[name] is not None and arguments[name] is not False:
            return f"generate() got {name}, which the loop doesn't know"
    past = arguments.get("past_key_values")
    if not arguments.get("use_cache", True):
        return "generate() runs without a cache"
    if past is not None:
        kind = type(past)
        if (kind.__module__, kind.__name__) != ("transformers.cache_utils", "DynamicCache"):
            return f"the cache is a {kind.__name__}"
        if getattr(past, "offloading", False):
            return "the cache is a DynamicCache that is offloaded"
    if past is not None and any(type(layer).__name__ != "DynamicLayer" for layer in past.layers):
        return "the cache has layers other than DynamicLayer"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states of each step were asked for"
    if arguments.get("synced_gpus") or getattr(config, "is_assistant", False):
        return "synced_gpus is set, or the model is an assistant"
    mask, input_ids = arguments.get("attention_mask"), arguments["input_ids"]
    batch_size, like = input_ids.shape[0], model._modules["lm_head"]._parameters["weight"]
    length = context_length(arguments, config)
    if length is None:
        return "the context's length is not known (a cache is continued without an attention mask)"
    if mask is not None and (type(mask) is not Tensor or mask.shape != (batch_size, length)):
        return "the attention mask is not (batch_size, length)"
    position_ids = arguments.get("position_ids")
    if position_ids is not None and (
        type(position_ids) is not Tensor
        or position_ids.dim() != 2
        or position_ids.shape[1] != length
        or position_ids.shape[0] not in (1, batch_size)
    ):
        return "position_ids are not (batch_size, length)"
    for tensor in (mask, input_ids):
        if tensor is not None and tensor.device != like.device:
            return "the input is on another device than the model"
    if batch_size == 0 or length == 0:
        return "the batch is empty"
    if like.device.type == "cuda" and batch_size > MAX_SKINNY_ROWS:
        return f"the batch has more than {MAX_SKINNY_ROWS} rows"
    return None


def past_length(arguments: dict[str, Any]) -> int:
    """Tokens in the cache before the call. transformers 5.0 leaves it to the model to make one."""
    past = arguments.get("past_key_values")
    return 0 if past is None else past.get_seq_length()


def context_length(arguments: dict[str, Any], config: Any) -> int | None:
    """How many keys there will be after the context; None where only the host could tell."""
    mask = arguments.get("attention_mask")
    if mask is not None:
        return mask.shape[-1]
    told = getattr(config, "_mask_length", None)  # from 5.23 on a mask of ones is dropped
    if isinstance(told, int) and told > 0:
        return told
    if past_length(arguments) > 0:
        return None
    embeds = arguments.get("inputs_embeds")
    return (arguments["input_ids"] if embeds is None else embeds).shape[1]


def model_reason(model: Any, model_cls: type, block_cls: type) -> str | None:
    """What of the model the loop would skip, or can't read in place."""
    if getattr(model, "model_parallel", False):
        return "model.parallelize() is in force"
    for name in HOOK_METHODS:
        method = getattr(type(model), name)
        if name in vars(model) or not method.__module__.startswith("transformers."):
            return f"{name} was replaced"
    head: Any = model._modules["lm_head"]
    beneath: Any = model._modules["transformer"]
    kind = type(beneath)
    if kind is not model_cls:
        return f"the model is a {kind.__name__}"
    like = head._parameters["weight"]
    vocab_size, hidden_size = like.shape
    parts = beneath._modules
    reason = (
        submodule_reason(model, type(model))
        or submodule_reason(head, nn.Linear)
        or linear_reason(head, like, hidden_size, vocab_size)
        or ("the output embedding has a bias" if head._parameters["bias"] is not None else None)
        or submodule_reason(beneath, model_cls)
        or submodule_reason(parts["wte"], nn.Embedding)
        or submodule_reason(parts["wpe"], nn.Embedding)
        or submodule_reason(parts["ln_f"], nn.LayerNorm)
        or norm_reason(parts["ln_f"], like, hidden_size)
        or (
            "dropout is active (the model is in training mode); call model.eval() for inference"
            if beneath.training and parts["drop"].p
            else None
        )
    )
    for name in ("wte", "wpe"):
        embedding: Any = parts[name]
        weight = embedding._parameters.get("weight")
        reason = reason or parameter_reason(weight, like, (embedding.num_embeddings, hidden_size))
        if reason is None and embedding.max_norm is not None:
            reason = "an embedding renormalises its rows"
    if reason is not None:
        return reason
    sizes = set()
    blocks: Any = parts["h"]
    for layer in blocks:
        reason = submodule_reason(layer, block_cls, is_recording_hook) or gpt2.layer_reason(
            layer, like
        )
        if reason is not None:
            return reason
        if "crossattention" in layer._modules:
            return "the model has cross-attention"
        attn, mlp = layer._modules["attn"], layer._modules["mlp"]
        implementation = attention_implementation(attn.config)
        if " " in implementation:
            return implementation
        if implementation == "eager" and attn.reorder_and_upcast_attn:
            return "reorder_and_upcast_attn is set"
        norms = layer._modules["ln_1"], layer._modules["ln_2"]
        sizes.add(
            (attn.num_heads, activation_of(mlp.act), mlp._modules["c_fc"].nf)
            + tuple(norm.eps for norm in norms)
        )
    if len(sizes) != 1:
        return "the layers differ in their sizes"
    activation, eps = next(iter(sizes))[1], next(iter(sizes))[3:]
    if activation is None:
        return "there is no kernel for the activation"
    if {*eps, parts["ln_f"].eps} != {eps[0]}:
        return "the layer norms differ in eps"
    return None


def describe(model: Any) -> DecoderModel:
    beneath = model._modules["transformer"]
    parts = beneath._modules
    nothing = torch.empty(0)
    layers = []
    for layer in parts["h"]:
        modules = layer._modules
        attn, mlp = modules["attn"], modules["mlp"]
        ln_1, ln_2 = modules["ln_1"]._parameters, modules["ln_2"]._parameters
        c_attn, c_proj = attn._modules["c_attn"]._parameters, attn._modules["c_proj"]._parameters
        fc, proj = mlp._modules["c_fc"]._parameters, mlp._modules["c_proj"]._parameters
        layers.append(
            DecodeLayer(
                ln_1["weight"],
                ln_1["bias"],
                (c_attn["weight"],),
                (c_attn["bias"],),
                c_proj["weight"],
                c_proj["bias"],
                ln_2["weight"],
                ln_2["bias"],
                fc["weight"],
                fc["bias"],
                proj["weight"],
                proj["bias"],
                nothing,
                nothing,
                gpt2.softmax_scale(attn, attention_implementation(attn.config)),
            )
        )
    first = parts["h"][0]._modules
    ln_f = parts["ln_f"]
    return DecoderModel(
        tuple(layers),
        parts["wte"]._parameters["weight"],
        parts["wpe"]._parameters["weight"],
        ln_f._parameters["weight"],
        ln_f._parameters["bias"],
        model._modules["lm_head"]._parameters["weight"],
        first["attn"].num_heads,
        activation_of(first["mlp"].act),
        ln_f.eps,
        True,
    )


def longest(criteria: Any) -> int | None:
    """The length of a sequence that no row passes."""
    lengths = [c.max_length for c in criteria if type(c).__name__ == "MaxLengthCriteria"]
    return min(lengths) if lengths else None


@contextlib.contextmanager
def restored_out_of_memory(arguments: dict[str, Any]) -> Iterator[None]:
    """An out-of-memory that leaves the scope leaves the cache and the generator of the call as they
    were, so that the original can run all of it; one marked with `eet_patch_committed` is let go.
    """
    past, device = arguments.get("past_key_values"), arguments["input_ids"].device
    layers = [] if past is None else list(past.layers)
    # What a layer holds is appended to behind its end, or replaced: never written over.
    states = [dict(vars(layer)) for layer in layers]
    generator: torch.Generator | None = None
    if arguments["generation_config"].do_sample:
        on_gpu = device.type == "cuda"
        generator = (
            torch.cuda.default_generators[device.index] if on_gpu else torch.default_generator
        )
    drawn = torch.empty(0) if generator is None else generator.get_state()
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not getattr(error, "eet_patch_committed", False):
            if past is not None:
                past.layers[:] = layers
            for layer, state in zip(layers, states, strict=True):
                vars(layer).clear()
                vars(layer).update(state)
            if generator is not None:
                generator.set_state(drawn)
        raise
