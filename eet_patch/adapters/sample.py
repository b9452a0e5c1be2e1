"""Greedy search and sampling (`_sample`) of decoders with a language model head, of transformers
4.56 to 5.23.

The context runs in one parallel pass, by `generation/context.py` where all of it is in the call,
else by the host's own loop. From the second token on the steps run over fixed buffers; where every
logits processor and stopping criterion is one whose meaning the kernels have, the tokens stay on
the device, else the host's own objects choose from the logits of each step.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eet_patch.adapters import kv_cache
from eet_patch.adapters.decoder import (
    Context,
    DecoderKind,
    call_reason,
    context_of,
    decoder_of,
    empty_cache,
    head_weight_of,
    own_context,
    restored_out_of_memory,
)
from eet_patch.generation import pool
from eet_patch.generation.loop import decode_on_device, decode_with_host
from eet_patch.generation.processors import selection_of, stopping_of, unpenalised_tokens
from eet_patch.generation.step import DecoderModel, DecodeStep, Selection
from eet_patch.patching import Adapter


class Plan(NamedTuple):
    model: DecoderModel
    context: Context
    choice: Selection | None  # None: the host's own objects choose


def adapter(kind: DecoderKind, cls: type, original: Callable[..., Any]) -> Adapter:
    def plan(model: Any, arguments: dict[str, Any]) -> Plan | str:
        config = arguments["generation_config"]
        reason = call_reason(model, arguments, config)
        if reason is not None:
            return reason
        decoder = decoder_of(model, kind)
        if isinstance(decoder, str):
            return decoder
        context = context_of(decoder, arguments)
        if isinstance(context, str):
            return context
        stopping = stopping_of(arguments["stopping_criteria"])
        pad = config._pad_token_tensor
        choice: Selection | str = ""
        shown = config.return_dict_in_generate and (config.output_scores or config.output_logits)
        if not isinstance(stopping, str) and not shown:
            choice = selection_of(
                arguments["logits_processor"],
                stopping,
                bool(config.do_sample),
                None if pad is None else int(pad),
                arguments["input_ids"].shape[1] + 1,
            )
        return Plan(decoder.model, context, None if isinstance(choice, str) else choice)

    def forward(plan: Plan, model: Any, arguments: dict[str, Any]) -> Any:
        with restored_out_of_memory(arguments):
            return run(plan, model, arguments)

    def run(plan: Plan, model: Any, arguments: dict[str, Any]) -> Any:
        input_ids, kv_len = arguments["input_ids"], plan.context.kv_len
        batch_size, length = input_ids.shape
        # Most memory is taken before anything is done: out of it, the original runs.
        new_tokens = plan.context.new_tokens
        first, most = kv_len + min(new_tokens, pool.GROWTH), kv_len + new_tokens
        step = pool.borrow(model, plan.model, batch_size, first, most)
        try:
            past = arguments.get("past_key_values")
            if past is None:
                past = empty_cache(model)
            kv_cache.lend(past, step.keys, step.values)
            if plan.choice is not None and plan.context.own_pass:
                result = _own_first_token(plan, step, arguments, past)
            else:
                given = arguments | {"past_key_values": past}
                result = _first_token(original, model, given, length)
                past = result.past_key_values
                _take_cache(step, past, kv_len)
            step.begin(
                plan.choice,
                kv_len,
                result.sequences[:, -1],
                plan.context.starts,
                plan.context.next_positions,
            )

            def moved(layer_idx: int) -> None:
                _show(step, past, layer_idx, kv_len)

            def make_room(tokens: int) -> None:
                pool.make_room(model, plan.model, step, tokens, most, moved)

            if plan.choice is not None:
                result.sequences = _on_device(plan, step, arguments, result.sequences, make_room)
            else:
                result = _with_host(plan, step, arguments, result, make_room)
            _hand_over(step, past, kv_len + result.sequences.shape[1] - length - 1)
        except torch.OutOfMemoryError as error:
            if arguments.get("streamer") is not None:
                error.eet_patch_committed = True  # type: ignore[attr-defined]  # it has tokens
            raise
        finally:
            pool.give_back(model, plan.model, step)
        if arguments["generation_config"].return_dict_in_generate:
            return result
        return result.sequences

    return Adapter(plan, forward, head_weight_of)


def _own_first_token(plan: Plan, step: DecodeStep, arguments: dict[str, Any], past: Any) -> Any:
    """The context by our own pass, and one token that the host's processors choose from; returns
    its output object.
    """
    input_ids = arguments["input_ids"]
    raw = own_context(plan.model, plan.context, arguments, step.keys, step.values)
    tokens = _chosen(arguments["logits_processor"](input_ids, raw.float()), arguments)
    _hand_over(step, past, plan.context.kv_len)
    output = sys.modules["transformers.generation.utils"].GenerateDecoderOnlyOutput  # type: ignore[attr-defined]
    sequences = torch.cat([input_ids, tokens[:, None]], dim=-1)
    return output(sequences=sequences, past_key_values=past)


def _chosen(scores: Tensor, arguments: dict[str, Any]) -> Tensor:
    """(batch_size,) as the host chooses from scores (batch_size, vocab_size)."""
    if not arguments["generation_config"].do_sample:
        return torch.argmax(scores, dim=-1)
    return torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)


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
    """Sees that the context's keys and values stand in the step's buffers, and frees the host's
    copy where there is one.
    """
    if past.get_seq_length() != kv_len:
        raise RuntimeError(
            f"eet_patch: the cache holds {past.get_seq_length()} tokens after the context, "
            f"and its attention mask {kv_len}"
        )
    for layer_idx, layer in enumerate(past.layers):
        keys, values = step.keys[layer_idx], step.values[layer_idx]
        kv_cache.move_in(layer, keys[:, :, :kv_len], values[:, :, :kv_len])
    # New views: nobody but the step appends to these buffers from now on.
    _hand_over(step, past, kv_len)


def _hand_over(step: DecodeStep, past: Any, kv_len: int) -> None:
    """Gives the host's cache all that was computed, as views; `pool` lends nobody the buffers for
    as long as they live.
    """
    for layer_idx in range(len(step.keys)):
        _show(step, past, layer_idx, kv_len)


def _show(step: DecodeStep, past: Any, layer_idx: int, kv_len: int) -> None:
    layer = past.layers[layer_idx]
    layer.keys = step.keys[layer_idx][:, :, :kv_len]
    layer.values = step.values[layer_idx][:, :, :kv_len]


def _on_device(
    plan: Plan,
    step: DecodeStep,
    arguments: dict[str, Any],
    sequences: Tensor,
    make_room: Callable[[int], None],
) -> Tensor:
    choice, streamer = plan.choice, arguments.get("streamer")
    assert choice is not None
    if choice.repetition_penalty != 1.0:
        step.note_seen(sequences, unpenalised_tokens(arguments["logits_processor"]))
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
            plan.context.kv_len,
            plan.context.new_tokens - 1,
            ended,
            # A dropped row's later keys are missing from the cache.
            plan.context.fresh and not arguments["generation_config"].return_dict_in_generate,
            streamer.put if streamer is not None else None,
            make_room,
        )
    if streamer is not None:
        streamer.end()
    return torch.cat([sequences, new], dim=1)


def _with_host(
    plan: Plan,
    step: DecodeStep,
    arguments: dict[str, Any],
    first: Any,
    make_room: Callable[[int], None],
) -> Any:
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
        tokens = _chosen(processed, arguments)
        if has_eos:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        sequences = torch.cat([sequences, tokens[:, None]], dim=-1)
        return tokens if put(tokens) else None

    if put(sequences[:, -1]):
        decode_with_host(step, plan.model, plan.context.kv_len, choose, make_room)
    if streamer is not None:
        streamer.end()
    first.sequences, first.scores, first.logits = sequences, scores, logits
    return first
