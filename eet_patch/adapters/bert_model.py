"""BertModel and the models that are BertModel under another name, whole: real tokens alone are
embedded and go through the layers. The host's own pooler runs over the result.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from eet_patch import patching
from eet_patch.adapters import bert_encoder
from eet_patch.adapters.encoder import Encoder, Encoders
from eet_patch.adapters.host import (
    dropout_reason,
    is_recording_hook,
    norm_reason,
    other_arguments_reason,
    recorder,
    version_before,
)
from eet_patch.encoding.on_cuda import Ahead, launch_ahead
from eet_patch.encoding.packed import Batch
from eet_patch.gates import (
    Watch,
    is_transformed,
    note_sound,
    parameter_reason,
    submodule_reason,
    watch_of,
)
from eet_patch.ops._extension import NO_MASK
from eet_patch.ops.elementwise import launch_embedding
from eet_patch.ops.packing import Lookup, lookup_tables, padding_mask_form
from eet_patch.patching import Adapter

KNOWN = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "position_ids", "return_dict"}
    | {"output_attentions"}
)
RECORDING = "outputs of the layers are recorded"
RECORDED = ("output_attentions", "output_hidden_states")
TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


class Plan(NamedTuple):
    encoder: Encoder
    tables: tuple[int | float, ...]


class Notes(NamedTuple):
    """What was made of a model's configuration and embeddings, and good until they change."""

    config: Any
    return_dict: bool
    tables: tuple[int | float, ...]  # as `Lookup` has them


class Warm(NamedTuple):
    """A model on CUDA whose last call went through: what the next one may be launched by before it
    is looked at. Nothing is kept alive by it.
    """

    model: weakref.ref[Any]
    embeddings: weakref.ref[Watch]
    stack: weakref.ref[Watch]
    owner: weakref.ref[Any]


_warm: dict[int, Warm] = {}
patching.at_disable(_warm.clear)


def _note_warm(model: Any, encoder: Encoder, like: Tensor) -> None:
    watch, number = watch_of(model._modules["embeddings"], like), id(model)
    if watch is not None and encoder.unconfirmed is not None:
        forget = partial(_forget_warm, number)
        found = (watch, encoder.unconfirmed, encoder.modules[0])
        _warm[number] = Warm(weakref.ref(model, forget), *map(weakref.ref, found))


def _forget_warm(number: int, reference: Any) -> None:
    warm = _warm.get(number)
    if warm is not None and warm.model is reference:
        del _warm[number]


def _word_weight(model: Any, arguments: dict[str, Any]) -> Any:
    return model._modules["embeddings"]._modules["word_embeddings"]._parameters["weight"]


def _prefix(cls: type) -> str:
    return cls.__name__.removesuffix("Model")


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    host, before_5 = vars(sys.modules[cls.__module__]), version_before("5.0")
    prefix = _prefix(cls)
    encoder_class = host[f"{prefix}Encoder"]
    embeddings_class = host.get(f"{prefix}Embeddings") or host[f"{prefix}ForTextEmbeddings"]
    encoders = Encoders(bert_encoder.kind(f"{prefix}Layer"), encoder_class)
    make_output = host["BaseModelOutputWithPoolingAndCrossAttentions"]
    # Of the padded ids: where the family counts positions from the padding token on.
    positions_of = getattr(embeddings_class, "create_position_ids_from_input_ids", None)
    positions_of = positions_of or host.get("create_position_ids_from_input_ids")

    def plan(model: Any, arguments: dict[str, Any]) -> Plan | str:
        reason = other_arguments_reason(arguments, KNOWN)
        if reason is not None:
            return reason
        modules, config = model._modules, model.config
        embeddings, stack = modules["embeddings"], modules["encoder"]
        word_weight = embeddings._modules["word_embeddings"]._parameters["weight"]
        reason = submodule_reason(stack, encoder_class, is_recording_hook)
        reason = reason or _ids_reason(embeddings, arguments, word_weight)
        if reason is not None:
            return reason
        watch = watch_of(embeddings, word_weight)
        if watch is not None and watch.notes.config is config and watch.holds(word_weight):
            notes = watch.notes
        else:
            reason = _config_reason(config)
            reason = reason or _embeddings_reason(embeddings, embeddings_class, word_weight)
            if reason is not None:
                return reason
            notes = Notes(config, bool(config.return_dict), _tables(embeddings))
            note_sound(embeddings, word_weight, notes, (config.__dict__,))
        reason = _output_reason(arguments, notes.return_dict)
        if reason is not None:
            return reason
        found = encoders.checked(stack, word_weight)
        if isinstance(found, str):
            return found
        return Plan(found, notes.tables)

    def batch_of(
        model: Any, arguments: dict[str, Any], num_heads: int, tables: tuple[int | float, ...]
    ) -> Batch:
        input_ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        embeddings = model._modules["embeddings"]
        word_weight = _word_weight(model, arguments)
        batch_size, seq_len = input_ids.shape
        form = NO_MASK
        if mask is not None:
            form = padding_mask_form(mask, (batch_size, num_heads, seq_len, seq_len), word_weight)
        positions = arguments.get("position_ids")
        if positions is None and positions_of is not None:
            positions = positions_of(input_ids, embeddings.padding_idx)
        position_count = seq_len if positions is None else positions.numel()
        if positions is None:  # those of the first tokens; slicing them takes longer than all this
            positions = embeddings._buffers["position_ids"]
        ids = (input_ids, positions, arguments.get("token_type_ids"))
        return Batch(
            batch_size,
            seq_len,
            word_weight.shape[1],
            word_weight,
            form,
            partial(_embed, embeddings, ids, position_count),
            lookup=Lookup(ids, position_count, tables),
        )

    def ahead(model: Any, arguments: dict[str, Any]) -> Ahead | None:
        """While the device packs, embeds and runs the first layers, the host looks whether all of
        the model is as it was in its last call; what the device reads until then is looked at here.
        """
        warm = _warm.get(id(model))
        if warm is None or id(warm.model()) != id(model) or is_transformed():
            return None
        embeddings, word_weight = model._modules["embeddings"], _word_weight(model, arguments)
        watch, stack, owner = warm.embeddings(), warm.stack(), warm.owner()
        if watch is None or watch_of(embeddings, word_weight) is not watch:
            return None
        if stack is None or owner is None or _ids_reason(embeddings, arguments, word_weight):
            return None
        if not watch.parameters_stay(0):
            return None
        batch = batch_of(model, arguments, stack.notes[0].num_heads, watch.notes.tables)
        forget = partial(_warm.pop, id(model), None)
        try:
            return launch_ahead(owner, stack.notes, batch, stack.parameters_stay, forget)
        except RuntimeError:
            return None  # the call itself meets it again, and says so

    def forward(
        plan: Plan, model: Any, arguments: dict[str, Any], ahead: Ahead | None = None
    ) -> Any:
        if before_5 and arguments.get("attention_mask") is None:
            model.warn_if_padding_and_no_attention_mask(arguments["input_ids"], None)
        # Not by other tables and layers than the call was found to have.
        used = ahead is not None and ahead.rests_on(plan.tables, plan.encoder.layers)
        if ahead is not None and used:
            hidden_states = encoders.run(plan.encoder, ahead.batch, None, ahead)
        else:
            if ahead is not None:
                ahead.release()
            batch = batch_of(model, arguments, plan.encoder.layers[0].num_heads, plan.tables)
            hidden_states = encoders.run(plan.encoder, batch)
            _note_warm(model, plan.encoder, batch.like)
        pooler = model.pooler  # no module where there is none
        pooled = pooler(hidden_states) if pooler is not None else None
        return make_output(last_hidden_state=hidden_states, pooler_output=pooled)

    return Adapter(plan, forward, operand=_word_weight, ahead=ahead)


def _config_reason(config: Any) -> str | None:
    if config.is_decoder:
        return "the model is a decoder"
    if any(getattr(config, name) for name in RECORDED):
        return RECORDING
    return None


def _output_reason(arguments: dict[str, Any], return_dict_by_default: bool) -> str | None:
    if any(arguments.get(name) for name in RECORDED) or recorder():
        return RECORDING
    return_dict = arguments.get("return_dict")
    if not (return_dict_by_default if return_dict is None else return_dict):
        return "a tuple is to be returned"
    return None


def _ids_reason(embeddings: Any, arguments: dict[str, Any], like: Tensor) -> str | None:
    input_ids = arguments.get("input_ids")
    if type(input_ids) is not Tensor:
        return f"input_ids is a {type(input_ids).__name__}"
    if input_ids.dim() != 2 or not input_ids.numel():
        return f"input_ids have shape {tuple(input_ids.shape)}"
    shape = input_ids.shape
    if shape[1] > embeddings._buffers["position_ids"].shape[1]:
        return "the sequence is longer than the table of positions"
    ids = ("input_ids", "token_type_ids", "position_ids")
    for name in (*ids, "attention_mask"):
        given = arguments.get(name)
        if given is None:
            continue
        if type(given) is not Tensor or given.device != like.device:
            return f"{name} is not a tensor on {like.device}"
        if given.dtype != torch.int64 and (name in ids or given.dtype != torch.bool):
            return f"{name} is {given.dtype}"
        if given.shape != shape and (name != "position_ids" or given.shape != (1, shape[1])):
            return f"{name} has shape {tuple(given.shape)}"
        if name in ids and not given.is_contiguous():
            return f"{name} is not contiguous"
    return None


def _embeddings_reason(embeddings: Any, cls: type, like: Tensor) -> str | None:
    reason = submodule_reason(embeddings, cls)
    if reason is not None:
        return reason
    if getattr(embeddings, "position_embedding_type", "absolute") != "absolute":
        return f"positions are {embeddings.position_embedding_type}"
    modules, hidden_size = embeddings._modules, like.shape[1]
    for name in TABLES:
        table = modules[name]
        reason = submodule_reason(table, nn.Embedding)
        if reason is None and table.max_norm is not None:
            reason = "an embedding has a max_norm"
        weight = table._parameters.get("weight")
        rows = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else 0
        reason = reason or parameter_reason(weight, like, (rows, hidden_size))
        if reason is not None:
            return reason
    norm, dropout = modules["LayerNorm"], modules["dropout"]
    return (
        submodule_reason(norm, nn.LayerNorm)
        or norm_reason(norm, like, hidden_size)
        or submodule_reason(dropout, nn.Dropout)
        or dropout_reason(embeddings, dropout)
    )


def _tables(embeddings: Any) -> tuple[int | float, ...]:
    modules = embeddings._modules
    norm = modules["LayerNorm"]
    return lookup_tables(
        [modules[name]._parameters["weight"] for name in TABLES],
        norm._parameters["weight"],
        norm._parameters["bias"],
        norm.eps,
    )


def _embed(
    embeddings: Any,
    ids: tuple[Tensor, Tensor, Tensor | None],
    position_count: int,
    tokens: Tensor,
    out: Tensor,
) -> None:
    modules = embeddings._modules
    word, position, token_type = (modules[name]._parameters["weight"] for name in TABLES)
    input_ids, positions, token_type_ids = ids
    norm = modules["LayerNorm"]
    launch_embedding(
        out,
        input_ids,
        word,
        positions.view(-1)[:position_count],
        position,
        token_type_ids,
        token_type,
        norm._parameters["weight"],
        norm._parameters["bias"],
        norm.eps,
        tokens=tokens,
    )
