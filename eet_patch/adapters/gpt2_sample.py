"""GPT2LMHeadModel's greedy search and sampling (`_sample`) of transformers 4.56 to 5.23.

The first token is the host's: its own loop runs the context, in one pass, and chooses. From the
second token on the steps run over fixed buffers; where every logits processor and stopping
criterion is one whose meaning the kernels have, the tokens stay on the device, else the host's own
objects choose from the logits of each step.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
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
from eet_patch.generation import pool
from eet_patch.generation.loop import decode_on_device, decode_with_host
from eet_patch.generation.processors import selection_of, stopping_of
from eet_patch.generation.step import DecoderModel, DecodeStep, Selection
from eet_patch.ops.decode import DecodeLayer
from eet_patch.ops.launch import MAX_SKINNY_ROWS
from eet_patch.patching import Adapter

KNOWN_KWARGS = frozenset(
    {"attention_mask", "past_key_values", "use_cache", "position_ids", "cache_position"}
    | {"inputs_embeds", "logits_to_keep"}
)
OWN_ARGUMENTS = frozenset(
    {"input_ids", "logits_processor", "stopping_criteria", "generation_config"}
    | {"synced_gpus", "streamer"}
)


class Plan(NamedTuple):
    model: DecoderModel
    choice: Selection | None  # None: the host's own objects choose
    max_length: int | None
    kv_len: int  # keys after the context
    starts: Tensor  # (batch_size,) padding on the left
    next_positions: Tensor  # (batch_size,) of the first token that we feed
    may_shrink: bool


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    module = sys.modules[cls.__module__]
    block_cls, model_cls = module.GPT2Block, module.GPT2Model  # type: ignore[attr-defined]

    def weight_of(model: Any, arguments: dict[str, Any]) -> Any:
        head = model._modules.get("lm_head")
        return head._parameters.get("weight") if isinstance(head, nn.Linear) else None

    def plan(model: Any, arguments: dict[str, Any]) -> Plan | str:
        config = arguments["generation_config"]
        reason = _call_reason(model, arguments, config) or _model_reason(
            model, model_cls, block_cls
        )
        if reason is not None:
            return reason
        input_ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        kv_len = _context_length(arguments, config)
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
        stopping = stopping_of(arguments["stopping_criteria"])
        pad = config._pad_token_tensor
        choice: Selection | str = ""
        max_length = None
        if not isinstance(stopping, str):
            max_length = stopping.max_length
            choice = selection_of(
                arguments["logits_processor"],
                stopping,
                bool(config.do_sample),
                None if pad is None else int(pad),
                input_ids.shape[1] + 1,
            )
        shown = config.return_dict_in_generate and (config.output_scores or config.output_logits)
        if isinstance(choice, str) or shown or max_length is None:
            choice = ""
        longest = _longest(arguments["stopping_criteria"], config)
        if longest is None:
            return "no maximum length is set"
        new_tokens = longest - input_ids.shape[1]
        if kv_len + new_tokens - 1 > model.config.n_positions:
            return "the maximum length is beyond the model's positions"
        if new_tokens < 2:
            return "a single token is asked for"
        past = arguments["past_key_values"]
        fresh = past.get_seq_length() == 0 and not getattr(past, "_is_user_defined", False)
        return Plan(
            _describe(model),
            None if isinstance(choice, str) else choice,
            longest,
            kv_len,
            starts.to(torch.int32),
            next_positions,
            fresh and not config.return_dict_in_generate,
        )

    def forward(plan: Plan, model: Any, arguments: dict[str, Any]) -> Any:
        input_ids = arguments["input_ids"]
        batch_size, length = input_ids.shape
        assert plan.max_length is not None
        new_tokens = plan.max_length - length
        # All memory is taken before anything is done: out of it, the original runs.
        step = pool.borrow(model, plan.model, batch_size, plan.kv_len + new_tokens)
        try:
            first = _first_token(original, model, arguments, length)
            sequences, past = first.sequences, first.past_key_values
            _take_cache(step, past, plan.kv_len)
            step.begin(plan.choice, plan.kv_len, sequences[:, -1], plan.starts)
            step.position_ids.copy_(plan.next_positions)
            if plan.choice is not None:
                sequences = _on_device(plan, step, arguments, sequences, new_tokens - 1)
                result = first
                result.sequences = sequences
            else:
                result = _with_host(plan, step, arguments, first)
            _hand_over(step, past, plan.kv_len + result.sequences.shape[1] - length - 1)
        finally:
            pool.give_back(model, plan.model, step)
        if arguments["generation_config"].return_dict_in_generate:
            return result
        return result.sequences

    return Adapter(plan, forward, weight_of)


def _call_reason(model: Any, arguments: dict[str, Any], config: Any) -> str | None:
    """What of the call itself the loop doesn't do."""
    if config.return_dict_in_generate and (
        config.output_attentions or config.output_hidden_states
    ):
        return "attentions or hidden states of each step were asked for"
    for name in arguments.keys() - OWN_ARGUMENTS - KNOWN_KWARGS:
        if arguments[name] is not None and arguments[name] is not False:
            return f"generate() got {name}, which the loop doesn't know"
    past = arguments.get("past_key_values")
    if not arguments.get("use_cache", True) or past is None:
        return "generate() runs without a cache"
    if type(past).__name__ != "DynamicCache" or getattr(past, "offloading", False):
        return f"the cache is a {type(past).__name__}" + (
            " that is offloaded" if getattr(past, "offloading", False) else ""
        )
    if any(type(layer).__name__ != "DynamicLayer" for layer in past.layers):
        return "the cache has layers other than DynamicLayer"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states of each step were asked for"
    if arguments.get("synced_gpus") or getattr(config, "is_assistant", False):
        return "synced_gpus is set, or the model is an assistant"
    mask, input_ids = arguments.get("attention_mask"), arguments["input_ids"]
    batch_size, like = input_ids.shape[0], model._modules["lm_head"]._parameters["weight"]
    length = _context_length(arguments, config)
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


def _context_length(arguments: dict[str, Any], config: Any) -> int | None:
    """How many keys there will be after the context; None where only the host could tell."""
    mask = arguments.get("attention_mask")
    if mask is not None:
        return mask.shape[-1]
    told = getattr(config, "_mask_length", None)  # from 5.23 on a mask of ones is dropped
    if isinstance(told, int) and told > 0:
        return told
    if arguments["past_key_values"].get_seq_length() > 0:
        return None
    embeds = arguments.get("inputs_embeds")
    return (arguments["input_ids"] if embeds is None else embeds).shape[1]


def _model_reason(model: Any, model_cls: type, block_cls: type) -> str | None:
    """What of the model the loop would skip, or can't read in place."""
    if getattr(model, "model_parallel", False):
        return "model.parallelize() is in force"
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


def _describe(model: Any) -> DecoderModel:
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


def _longest(criteria: Any, config: Any) -> int | None:
    """The length of a sequence that no row passes."""
    lengths = [c.max_length for c in criteria if type(c).__name__ == "MaxLengthCriteria"]
    return min(lengths) if lengths else None


def _first_token(
    original: Callable[..., Any], model: Any, arguments: dict[str, Any], length: int
) -> Any:
    """The host's own loop for the context and one token; returns its output object."""
    generation = sys.modules["transformers.generation.stopping_criteria"]
    criteria = generation.StoppingCriteriaList(  # type: ignore[attr-defined]
        [generation.MaxLengthCriteria(max_length=length + 1)]  # type: ignore[attr-defined]
    )
    config = copy.copy(arguments["generation_config"])
    config.return_dict_in_generate = True
    given = dict(arguments, stopping_criteria=criteria, generation_config=config, streamer=None)
    return original(model, **given)


def _take_cache(step: DecodeStep, past: Any, kv_len: int) -> None:
    """Copies the context's keys and values into the step's buffers, and frees the host's copy."""
    if past.get_seq_length() != kv_len:
        raise RuntimeError(
            f"eet_patch: the cache holds {past.get_seq_length()} tokens after the context, "
            f"and its attention mask {kv_len}"
        )
    for layer, keys, values in zip(past.layers, step.keys, step.values, strict=True):
        keys[:, :, :kv_len].copy_(layer.keys)
        values[:, :, :kv_len].copy_(layer.values)
        layer.keys, layer.values = keys[:, :, :kv_len], values[:, :, :kv_len]


def _hand_over(step: DecodeStep, past: Any, kv_len: int) -> None:
    """Gives the host's cache all that was computed, as views; `pool` lends nobody the buffers for
    as long as they live.
    """
    for layer, keys, values in zip(past.layers, step.keys, step.values, strict=True):
        layer.keys, layer.values = keys[:, :, :kv_len], values[:, :, :kv_len]


def _on_device(
    plan: Plan, step: DecodeStep, arguments: dict[str, Any], sequences: Tensor, steps: int
) -> Tensor:
    choice, streamer = plan.choice, arguments.get("streamer")
    assert choice is not None
    if choice.repetition_penalty != 1.0:
        step.note_seen(sequences)
    if streamer is not None:
        streamer.put(sequences[:, -1].cpu())
    ended = None
    if choice.eos_token_ids:
        eos = torch.tensor(choice.eos_token_ids, device=sequences.device)
        ended = torch.isin(sequences[:, -1], eos)
    new = sequences[:, :0]
    if ended is None or not bool(ended.all()):
        new = decode_on_device(
            step,
            plan.model,
            choice,
            plan.kv_len,
            steps,
            ended,
            plan.may_shrink,
            streamer.put if streamer is not None else None,
        )
    if streamer is not None:
        streamer.end()
    return torch.cat([sequences, new], dim=1)


def _with_host(plan: Plan, step: DecodeStep, arguments: dict[str, Any], first: Any) -> Any:
    """The host's loop over tokens with its own processors, criteria and streamer; only the model
    beneath it is ours.
    """
    config, streamer = arguments["generation_config"], arguments.get("streamer")
    processors, criteria = arguments["logits_processor"], arguments["stopping_criteria"]
    pad = config._pad_token_tensor
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    sequences = first.sequences
    unfinished = torch.ones(sequences.shape[0], dtype=torch.long, device=sequences.device)
    scores, logits = first.scores, first.logits

    def put(tokens: Tensor) -> bool:
        """Whether the loop goes on with the token just added to `sequences`."""
        nonlocal unfinished
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~criteria(sequences, scores)
        return bool(unfinished.max() != 0)

    def choose(step_logits: Tensor) -> Tensor | None:
        nonlocal sequences, scores, logits
        raw = step_logits.to(copy=True, dtype=torch.float32)
        processed = processors(sequences, raw)
        if scores is not None:
            scores += (processed,)
        if logits is not None:
            logits += (raw,)
        if config.do_sample:
            probabilities = nn.functional.softmax(processed, dim=-1)
            tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)
        else:
            tokens = torch.argmax(processed, dim=-1)
        if has_eos:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        sequences = torch.cat([sequences, tokens[:, None]], dim=-1)
        return tokens if put(tokens) else None

    if put(sequences[:, -1]):
        decode_with_host(step, plan.model, choose)
    if streamer is not None:
        streamer.end()
    first.sequences, first.scores, first.logits = sequences, scores, logits
    return first
