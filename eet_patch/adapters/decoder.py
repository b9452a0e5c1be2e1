"""What the loops over decoders with a language model head share: whether a call of generate() and a
model are ones that they know, and where the model's parameters lie. What differs from model to
model is a `DecoderKind`, which stands beside the adapter of the model's layer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eet_patch.adapters.host import is_recording_hook, linear_reason, norm_reason
from eet_patch.gates import parameter_reason, submodule_reason
from eet_patch.generation import pool
from eet_patch.generation.context import context_logits
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


class Parts(NamedTuple):
    """A model's modules by their roles in a step, which skips all of them."""

    between: tuple[tuple[Any, type], ...]  # from beside the head down to what holds the layers
    words: Any
    positions: tuple[Any, type]
    first_position: int  # the row of the table that stands for position 0
    norm: Any  # the last one
    layers: Iterable[Any]
    layer_cls: type


class Layer(NamedTuple):
    """A layer in the terms of a step."""

    parameters: DecodeLayer  # the caches are a step's own
    num_heads: int
    activation: str | None
    eps: tuple[float, float]
    in_out: bool
    window: int | None = None  # keys that it sees at most, the token itself among them


class DecoderKind(NamedTuple):
    """What the loops have to be told of a class of models.

    Attributes:
        parts: (model) -> its modules, or the reason, as text, why the loops can't take it.
        layer: (layer, like) -> the layer, or a reason; its type and hooks are checked before.
    """

    parts: Callable[[Any], Parts | str]
    layer: Callable[[Any, Tensor], Layer | str]


class Decoder(NamedTuple):
    """A model that the loops can take."""

    model: DecoderModel
    positions: int
    window: int | None  # the narrowest of the layers'


NO_CACHE_YET = torch.empty(0)  # in a layer's parameters: a step fills in its own


class Context(NamedTuple):
    """The context of a call: its keys, the padding on its left, and where positions go on."""

    kv_len: int
    starts: Tensor  # (batch_size,) int32
    next_positions: Tensor  # (batch_size,) int64, of the first new token
    new_tokens: int  # that are asked for at most
    max_length: int  # of a sequence
    fresh: bool  # the cache was empty and is not the user's
    own_pass: bool  # `own_context` may run it
    padding: tuple[int, ...] | None  # `starts` on the host; None: there is none


def head_weight_of(model: Any, arguments: dict[str, Any]) -> Any:
    """The operand by which the engine checks dtype and device."""
    head = model._modules.get("lm_head")
    return head._parameters.get("weight") if isinstance(head, nn.Linear) else None


def context_of(decoder: Decoder, arguments: dict[str, Any]) -> Context | str:
    """The context of a call that passed `call_reason`, or why the loops can't take it."""
    config = arguments["generation_config"]
    input_ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    kv_len = context_length(arguments, config)
    assert kv_len is not None
    starts = torch.zeros(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)
    padding: tuple[int, ...] | None = None
    if mask is not None:
        starts = kv_len - mask.sum(dim=1)
        # Padding must stand on the left alone.
        in_order = (mask[:, 1:] >= mask[:, :-1]).all()
        *counts, ordered = torch.cat([starts, in_order.to(starts.dtype)[None]]).tolist()
        if not ordered:
            return "the attention mask has zeros behind ones"
        padding = tuple(counts) if any(counts) else None
    position_ids = arguments.get("position_ids")
    next_positions = kv_len - starts
    if position_ids is not None:
        next_positions = position_ids[:, -1].expand(input_ids.shape[0]) + 1
    max_length = longest(arguments["stopping_criteria"])
    if max_length is None:
        return "no maximum length is set"
    new_tokens = max_length - input_ids.shape[1]
    if kv_len + new_tokens - 1 > decoder.positions:
        return "the maximum length is beyond the model's positions"
    if decoder.window is not None and kv_len + new_tokens - 1 > decoder.window:
        return "the maximum length is beyond the window of a local layer"
    if new_tokens < 2:
        return "a single token is asked for"
    fresh = past_length(arguments) == 0
    fresh = fresh and not getattr(arguments.get("past_key_values"), "_is_user_defined", False)
    # All of it must be in input_ids. It leaves zeros where padding stood, for which a cache that
    # the user gets to see has keys.
    unseen = fresh and not config.return_dict_in_generate
    own_pass = (
        past_length(arguments) == 0
        and arguments.get("inputs_embeds") is None
        and kv_len == input_ids.shape[1]
        and (padding is None or (unseen and max(padding) < kv_len))
    )
    return Context(
        kv_len,
        starts.to(torch.int32),
        next_positions,
        new_tokens,
        max_length,
        fresh,
        own_pass,
        padding,
    )


def own_context(
    model: DecoderModel,
    context: Context,
    arguments: dict[str, Any],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    repeats: int = 1,
) -> Tensor:
    """Logits (rows, vocab_size) behind the context of every `repeats`-th row, run without the host;
    its keys and values go to `keys` and `values`, a buffer (rows, num_heads, capacity, head_dim)
    for each layer.
    """
    input_ids = arguments["input_ids"][::repeats].contiguous()
    position_ids = arguments.get("position_ids")
    if position_ids is not None:
        if position_ids.shape[0] > 1:
            position_ids = position_ids[::repeats]
        position_ids = position_ids.to(torch.int64).contiguous()
    else:
        position_ids = torch.arange(context.kv_len, device=input_ids.device)[None]
        if context.padding is not None:
            position_ids = (position_ids - context.starts[::repeats, None]).clamp(min=0)
    padding = None if context.padding is None else context.padding[::repeats]
    return context_logits(model, keys, values, input_ids, position_ids, padding)


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
    if input_ids.dtype != torch.int64:
        return f"input_ids is {input_ids.dtype}"
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


def empty_cache(model: Any) -> Any:
    """What transformers makes for a call that brings no cache."""
    return sys.modules["transformers.cache_utils"].DynamicCache(config=model.config)  # type: ignore[attr-defined]


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


def decoder_of(model: Any, kind: DecoderKind) -> Decoder | str:
    """The model in the terms of a step, or what of it the loops would skip or can't read in
    place.
    """
    if getattr(model, "model_parallel", False):
        return "model.parallelize() is in force"
    for name in HOOK_METHODS:
        method = getattr(type(model), name)
        if name in vars(model) or not method.__module__.startswith("transformers."):
            return f"{name} was replaced"
    parts = kind.parts(model)
    if isinstance(parts, str):
        return parts
    head: Any = model._modules["lm_head"]
    reason = _parts_reason(model, head, parts)
    if reason is not None:
        return reason
    like = head._parameters["weight"]
    layers: list[Layer] = []
    for module in parts.layers:
        reason = submodule_reason(module, parts.layer_cls, is_recording_hook)
        if reason is not None:
            return reason
        layer = kind.layer(module, like)
        if isinstance(layer, str):
            return layer
        layers.append(layer)
    if not layers:
        return "the model has no layers"
    first = layers[0]
    widths = {layer.parameters.fc1_weight.shape for layer in layers}
    alike = {(layer.num_heads, layer.activation, *layer.eps, layer.in_out) for layer in layers}
    if len(alike) != 1 or len(widths) != 1:
        return "the layers differ in their sizes"
    if first.activation is None:
        return "there is no kernel for the activation"
    if {*first.eps, parts.norm.eps} != {first.eps[0]}:
        return "the layer norms differ in eps"
    positions, _ = parts.positions
    table, norm = positions._parameters["weight"], parts.norm._parameters
    windows = [layer.window for layer in layers if layer.window is not None]
    described = DecoderModel(
        tuple(layer.parameters for layer in layers),
        parts.words._parameters["weight"],
        table[parts.first_position :] if parts.first_position else table,
        norm["weight"],
        norm["bias"],
        like,
        first.num_heads,
        first.activation,
        parts.norm.eps,
        first.in_out,
    )
    most = min(model.config.max_position_embeddings, table.shape[0] - parts.first_position)
    return Decoder(described, most, min(windows) if windows else None)


def _parts_reason(model: Any, head: Any, parts: Parts) -> str | None:
    """What of the modules around the layers a step would skip, or can't read in place."""
    like = head._parameters["weight"]
    vocab_size, hidden_size = like.shape
    for module, cls in parts.between:
        if type(module) is not cls:
            return f"the model is a {type(module).__name__}"
    positions, position_cls = parts.positions
    reason = (
        submodule_reason(model, type(model))
        or submodule_reason(head, nn.Linear)
        or linear_reason(head, like, hidden_size, vocab_size)
        or ("the output embedding has a bias" if head._parameters["bias"] is not None else None)
        or submodule_reason(parts.words, nn.Embedding)
        or submodule_reason(positions, position_cls)
        or submodule_reason(parts.norm, nn.LayerNorm)
        or norm_reason(parts.norm, like, hidden_size)
    )
    for module, cls in parts.between:
        reason = reason or submodule_reason(module, cls)
    for embedding in (parts.words, positions):
        weight = embedding._parameters.get("weight")
        reason = reason or parameter_reason(weight, like, (embedding.num_embeddings, hidden_size))
        if reason is None and embedding.max_norm is not None:
            reason = "an embedding renormalises its rows"
    return reason


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
        pool.release()  # the call's own step is among the idle ones by now
        if not getattr(error, "eet_patch_committed", False):
            if past is not None:
                past.layers[:] = layers
            for layer, state in zip(layers, states, strict=True):
                vars(layer).clear()
                vars(layer).update(state)
            if generator is not None:
                generator.set_state(drawn)
        raise
