"""Beam search (`_beam_search`) of decoders with a language model head, of transformers 4.56 to
5.23: the context once for all beams of a prompt, then steps over fixed buffers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
from eet_patch.generation.beam import BeamOptions, search
from eet_patch.generation.processors import selection_of, stopping_of, unpenalised_tokens
from eet_patch.generation.step import DecoderModel, DecodeStep, Selection
from eet_patch.ops.beam_state import MAX_CANDIDATES
from eet_patch.patching import Adapter


class Plan(NamedTuple):
    model: DecoderModel
    context: Context
    choice: Selection
    options: BeamOptions


def adapter(kind: DecoderKind, cls: type, original: Callable[..., Any]) -> Adapter:
    def plan(model: Any, arguments: dict[str, Any]) -> Plan | str:
        config = arguments["generation_config"]
        reason = call_reason(model, arguments, config)
        if reason is not None:
            return reason
        decoder = decoder_of(model, kind)
        if isinstance(decoder, str):
            return decoder
        if config.do_sample:
            return "beam search draws samples"
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            return "scores or logits of each step of a beam search were asked for"
        if getattr(config, "low_memory", None) or config.num_beams < 2:
            return "the beam search is of another kind"
        context = context_of(decoder, arguments)
        if isinstance(context, str):
            return context
        stopping = stopping_of(arguments["stopping_criteria"])
        if isinstance(stopping, str):
            return stopping
        if context.max_length != config.max_length:
            return "the stopping criteria and max_length differ"
        if not context.fresh or arguments.get("inputs_embeds") is not None:
            return "a beam search goes on from a cache or from embeddings"
        input_ids = arguments["input_ids"]
        eos = _tokens(config._eos_token_tensor)
        if set(eos) != set(stopping.eos_token_ids):
            return "the stopping criteria end rows at other tokens than the configuration"
        pad = _tokens(config._pad_token_tensor)
        choice = selection_of(
            arguments["logits_processor"],
            stopping,
            False,
            pad[0] if pad else 0,
            input_ids.shape[1],
        )
        if isinstance(choice, str):
            return choice
        num_beams, kept = config.num_beams, max(2, 1 + len(eos)) * config.num_beams
        if kept > MAX_CANDIDATES or kept > decoder.model.vocab_size:
            return f"{kept} continuations are kept in each step"
        try:
            _ = context.new_tokens ** float(config.length_penalty)
        except OverflowError:
            return "the length penalty is beyond what a float holds"
        prompts = input_ids.view(-1, num_beams, input_ids.shape[1])
        if not bool((prompts == prompts[:, :1]).all()):
            return "the beams of a prompt differ"
        # As transformers fills: a padding token of 0 counts as none.
        fill = (pad[0] if pad and pad[0] else eos[0]) if eos else -1
        options = BeamOptions(
            num_beams,
            kept,
            float(config.length_penalty),
            config.early_stopping,
            fill,
            input_ids.shape[1],
            context.max_length,
        )
        return Plan(decoder.model, context, choice, options)

    def forward(plan: Plan, model: Any, arguments: dict[str, Any]) -> Any:
        with restored_out_of_memory(arguments):
            return run(plan, model, arguments)

    def run(plan: Plan, model: Any, arguments: dict[str, Any]) -> Any:
        config, context, beams = (
            arguments["generation_config"],
            plan.context,
            plan.options.num_beams,
        )
        input_ids, past = arguments["input_ids"], arguments.get("past_key_values")
        if past is None:
            past = empty_cache(model)
        rows = input_ids.shape[0]
        # Most memory is taken before anything is done: out of it, the original runs.
        most = context.kv_len + context.new_tokens
        step = pool.borrow(model, plan.model, rows, most, most)
        try:
            prompts = input_ids[::beams]
            first_rows = _first_rows(step, beams)
            kv_cache.lend(past, *first_rows)
            if context.own_pass:
                logits = own_context(plan.model, context, arguments, *first_rows, beams)
            else:
                logits = _context_logits(model, arguments, prompts, context.starts[::beams], past)
            _take_context(past, *first_rows, context.kv_len, context.own_pass)
            found = search(
                step,
                plan.model,
                plan.choice,
                plan.options,
                prompts,
                logits,
                context.kv_len,
                context.starts[::beams],
                context.next_positions[::beams],
                unpenalised_tokens(arguments["logits_processor"]),
            )
            if config.return_dict_in_generate:
                _hand_over(step, past, found.key_rows, context.kv_len + found.generated - 1)
            else:
                past.layers.clear()
        finally:
            pool.give_back(model, plan.model, step)
        count = config.num_return_sequences
        sequences, indices = (t[:, :count].flatten(0, 1) for t in (found.sequences, found.indices))
        longest = int((indices >= 0).sum(1).max())
        sequences = sequences[:, : plan.options.first + longest]
        if not config.return_dict_in_generate:
            return sequences
        output = sys.modules["transformers.generation.utils"].GenerateBeamDecoderOnlyOutput  # type: ignore[attr-defined]
        return output(
            sequences=sequences,
            sequences_scores=None,
            scores=None,
            logits=None,
            beam_indices=indices[:, :longest],
            attentions=None,
            hidden_states=None,
            past_key_values=past,
        )

    return Adapter(plan, forward, head_weight_of)


def _tokens(value: Any) -> list[int]:
    return [] if value is None else value.flatten().tolist()


def _context_logits(
    model: Any, arguments: dict[str, Any], prompts: Tensor, starts: Tensor, past: Any
) -> Tensor:
    """(batch, vocab_size) after the context, run once for each prompt; fills the host's cache."""
    positions = torch.arange(prompts.shape[1], device=prompts.device) - starts[:, None]
    mask = arguments.get("attention_mask")
    num_beams = arguments["input_ids"].shape[0] // prompts.shape[0]
    # Not every model could be asked for the last logits alone before 5.0.
    can = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    last_alone = {"logits_to_keep": 1} if can else {}
    outputs = model(
        input_ids=prompts,
        attention_mask=None if mask is None else mask[::num_beams],
        position_ids=positions.clamp(min=0),
        past_key_values=past,
        use_cache=True,
        return_dict=True,
        **last_alone,
    )
    return outputs.logits[:, -1].contiguous()


def _first_rows(step: DecodeStep, num_beams: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of the step's buffers the rows in which a prompt's context stands, for all its beams."""
    keys, values = ([t[::num_beams] for t in buffers] for buffers in (step.keys, step.values))
    return keys, values


def _take_context(
    past: Any, keys: list[Tensor], values: list[Tensor], kv_len: int, written: bool
) -> None:
    """Sees that the context's keys and values stand in those rows, and takes them from the host's
    cache. `written`: they were put there, and never were in the cache.
    """
    for layer, key, value in zip(past.layers, keys, values, strict=True):
        if not written:
            kv_cache.move_in(layer, key[:, :, :kv_len], value[:, :, :kv_len])
        layer.keys = layer.values = key.new_empty(0)


def _hand_over(step: DecodeStep, past: Any, key_rows: Tensor, kv_len: int) -> None:
    """Gives the host's cache the past of each running beam, gathered from where it stands."""
    source = key_rows[:, :kv_len].long()
    at = torch.arange(kv_len, device=source.device)
    for layer, keys, values in zip(past.layers, step.keys, step.values, strict=True):
        layer.keys = keys[source, :, at].transpose(1, 2).contiguous()
        layer.values = values[source, :, at].transpose(1, 2).contiguous()
