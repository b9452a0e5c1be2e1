"""SequenceGenerator of fairseq 0.12: encoder once, then steps over fixed buffers.

The encoder, and scores that are not plain beam search, stay the host's own objects.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eet_patch.adapters.fairseq_model import decoder_of, model_reason
from eet_patch.generation.sentence_decoder import SentenceDecoder, Sentences
from eet_patch.generation.sentence_pool import borrow, give_back
from eet_patch.generation.sentence_search import (
    Ended,
    HostSearch,
    SearchOptions,
    filled_up,
    search,
)
from eet_patch.generation.sentence_step import BLOCK
from eet_patch.ops.beam_state import MAX_BEAMS, MAX_CANDIDATES
from eet_patch.patching import Adapter

# Weights of a sentence's attention are formed by a kernel that keeps them on chip.
MAX_SOURCE_LEN = 8192
# Its searches that read nothing of a step but scores, and change nothing outside themselves.
_SEARCHES = (
    "BeamSearch",
    "Sampling",
    "DiverseBeamSearch",
    "DiverseSiblingsSearch",
    "LengthConstrainedBeamSearch",
)
_GENERATOR_METHODS = ("_prefix_tokens", "replicate_first_beam", "finalize_hypos", "is_finished")
_ENSEMBLE_METHODS = (
    "forward_decoder",
    "reorder_encoder_out",
    "reorder_incremental_state",
)
_SEARCH_METHODS = ("step", "set_src_lengths", "init_constraints", "prune_sentences",
                   "update_constraints")  # fmt: skip


class Plan(NamedTuple):
    model: SentenceDecoder
    options: SearchOptions
    batch: int
    source_lengths: Tensor


def adapter(cls: type, original: Callable[..., Any]) -> Adapter:
    module = sys.modules[cls.__module__]
    ensembles = (module.EnsembleModel, module.EnsembleModelWithAlignment)  # type: ignore[attr-defined]
    searches = {getattr(module.search, name) for name in _SEARCHES}  # type: ignore[attr-defined]
    plain = module.search.BeamSearch  # type: ignore[attr-defined]
    blocker = module.NGramRepeatBlock  # type: ignore[attr-defined]
    # As they stood when the patch was installed.
    own = {(owner, name): getattr(owner, name) for owner, names in (
        (cls, _GENERATOR_METHODS), (ensembles[0], _ENSEMBLE_METHODS),
        *((owner, _SEARCH_METHODS) for owner in searches)) for name in names}  # fmt: skip

    def generator_reason(generator: Any) -> str | None:
        """Why the generator's parts are not those that we know, or None."""
        ensemble, strategy = generator.model, generator.search
        if type(ensemble) not in ensembles:
            return f"the models are in a {type(ensemble).__name__}"
        if ensemble.models_size != 1:
            return f"an ensemble of {ensemble.models_size} models is searched"
        if generator.lm_model is not None:
            return "a language model is fused"
        if type(strategy) not in searches:
            return f"the search is a {type(strategy).__name__}"
        for owner, names in ((generator, _GENERATOR_METHODS), (ensemble, _ENSEMBLE_METHODS),
                             (strategy, _SEARCH_METHODS)):  # fmt: skip
            for name in names:
                if name in owner.__dict__:
                    return f"{name} of {type(owner).__name__} was replaced"
        for (owner, name), method in own.items():
            if getattr(owner, name) is not method:
                return f"{name} of {owner.__name__} was replaced"
        if generator.repeat_ngram_blocker is not None and (
            type(generator.repeat_ngram_blocker) is not blocker
        ):
            return f"n-grams are blocked by a {type(generator.repeat_ngram_blocker).__name__}"
        return None

    def plan(generator: Any, arguments: dict[str, Any]) -> Plan | str:
        reason = generator_reason(generator)
        if reason is not None:
            return reason
        if arguments.get("constraints") is not None:
            return "constraints are given"
        net_input = arguments["sample"].get("net_input", {})
        source = net_input.get("src_tokens")
        if type(source) is not Tensor or source.dim() != 2 or not source.numel():
            return "the source is no batch of tokens"
        host = generator.model.single_model
        reason = model_reason(host)
        if reason is not None:
            return reason
        has_encoder = generator.model.has_encoder()
        model = decoder_of(host.decoder, has_encoder)
        if isinstance(model, str):
            return model
        if source.device != model.word_weight.device:
            return f"the source is on {source.device} and the model on {model.word_weight.device}"
        if model.layers[0].cross is not None and source.shape[1] > MAX_SOURCE_LEN:
            return f"a source has {source.shape[1]} tokens"
        padding = source.eq(generator.pad)
        if model.layers[0].cross is not None and source.shape[1] > 2:
            # What is seen of a sentence is told by where it begins and ends.
            if int((padding[:, 1:] != padding[:, :-1]).sum(1).max()) > 1:
                return "a source has padding within it, or on both sides"
        if generator.vocab_size != model.head_weight.shape[0]:
            return "the dictionary and the output projection differ in size"
        lengths = net_input.get("src_lengths")
        if lengths is None:
            lengths = (source.ne(generator.eos) & source.ne(generator.pad)).long().sum(dim=1)
        options = options_of(generator, arguments, source, lengths)
        if options.min_len > options.max_len:
            return "min_len is larger than max_len"
        positions = model.position_weight
        if positions is not None and model.first_position + options.max_len >= len(positions):
            return f"hypotheses may have more tokens than the {len(positions)} positions"
        prefix = arguments.get("prefix_tokens")
        if prefix is not None:
            if type(prefix) is not Tensor or prefix.dim() != 2 or prefix.dtype != torch.int64:
                return "the prefix is no batch of tokens"
            if len(prefix) != len(source) or prefix.device != source.device:
                return "prefix and source differ in size or device"
        return Plan(model, options, len(source), lengths)

    def options_of(
        generator: Any, arguments: dict[str, Any], source: Tensor, lengths: Tensor
    ) -> SearchOptions:
        beams, bos = generator.beam_size, arguments.get("bos_token")
        if generator.match_source_len:
            max_len = int(lengths.max())
        else:
            max_len = int(generator.max_len_a * source.shape[1] + generator.max_len_b)
            max_len = min(max_len, generator.max_len - 1)
        suppressed = generator.token_indices_to_suppress
        is_plain = (
            type(generator.search) is plain
            and generator.repeat_ngram_blocker is None
            and not generator.unk_penalty
            and beams <= min(MAX_BEAMS, MAX_CANDIDATES // 2)
            and 2 * beams < generator.vocab_size
            and (suppressed is None or generator.eos not in suppressed.tolist())
        )
        return SearchOptions(
            beams,
            max_len,
            generator.min_len,
            generator.eos if bos is None else bos,
            generator.eos,
            generator.pad,
            generator.unk,
            float(generator.unk_penalty),
            float(generator.temperature),
            () if suppressed is None else tuple(suppressed.tolist()),
            is_plain,
        )

    def forward(plan: Plan, generator: Any, arguments: dict[str, Any]) -> Any:
        options, model, batch = plan.options, plan.model, plan.batch
        sample, beams = arguments["sample"], plan.options.beams
        generator.search.init_constraints(None, beams)
        seen = None
        encoder_outs = generator.model.forward_encoder(sample["net_input"])
        if model.layers[0].cross is not None:
            seen = sentences_of(encoder_outs[0])
        ids = sample.get("id")
        ids = ids if isinstance(ids, Tensor) else torch.arange(batch)

        def choose(number: int, scores: Tensor, sums: Tensor, order: Tensor) -> Any:
            if generator.should_set_src_lengths:
                generator.search.set_src_lengths(plan.source_lengths[order])
            which = ids.to(order.device)[order]
            return generator.search.step(number, scores, sums, None, which)

        block = None
        if generator.repeat_ngram_blocker is not None:

            def block(tokens: Tensor, scores: Tensor, count: int, number: int) -> Tensor:
                return generator.repeat_ngram_blocker(tokens, scores, count, beams, number)

        source_len = 0 if seen is None else seen.states.shape[1]
        prefix = arguments.get("prefix_tokens")
        likely = max(source_len, 0 if prefix is None else prefix.shape[1])
        capacity = min(options.max_len + 2, likely + likely // 4 + BLOCK // 2)
        owner = generator.model.single_model.decoder
        sentences = filled_up(batch, model.word_weight.device)
        step = borrow(owner, model, sentences, sentences * beams, capacity, source_len)
        try:
            ended = search(step, model, options, HostSearch(choose, block), batch, seen, prefix)
        except torch.OutOfMemoryError:
            step.addresses = ()  # not to be kept beside the original
            raise
        finally:
            give_back(owner, step)
        return hypotheses(generator, ended, plan.source_lengths, source_len)

    def operand(generator: Any, arguments: dict[str, Any]) -> Any:
        return next((p for p in generator.parameters()), None)

    known = frozenset({module.SequenceGeneratorWithAlignment})  # type: ignore[attr-defined]
    return Adapter(plan, forward, operand, known)


def sentences_of(encoder_out: dict[str, Any]) -> Sentences:
    """The encoder's output by sentence, and where its padding on one side ends."""
    states = encoder_out["encoder_out"][0].transpose(0, 1)
    batch, length = states.shape[:2]
    masks = encoder_out["encoder_padding_mask"]
    if not masks or masks[0] is None:
        start = torch.zeros(batch, dtype=torch.int32, device=states.device)
        return Sentences(states, start, start + length)
    keep = ~masks[0].bool()
    at = torch.arange(length, device=states.device)
    start = keep.int().argmax(1).int()
    end = (keep * (at + 1)).amax(1).int()
    return Sentences(states, torch.minimum(start, end), end)


def hypotheses(
    generator: Any, ended: Ended, source_lengths: Tensor, source_len: int
) -> list[list[dict[str, Tensor]]]:
    """What the generator returns: dictionaries, those of a sentence by score."""
    scores, device = ended.scores, ended.scores.device
    lengths = torch.tensor(ended.lengths, device=device)
    if generator.normalize_scores:
        scores = scores / lengths.double().pow(generator.len_penalty).float()
    if generator.match_source_len:
        counts = torch.tensor(ended.counts, device=device)
        longer = lengths - 1 > source_lengths.repeat_interleave(counts)
        scores = scores.masked_fill(longer, -torch.inf)
    # Views of all at once: one by one they would take longer than some steps.
    tokens = ended.tokens.split(ended.lengths)
    positional = ended.positional_scores.split(ended.lengths)
    attention: Any = [torch.empty(0)] * len(ended.lengths)
    if ended.weights is not None:
        attention = ended.weights[:source_len].split(ended.lengths, 1)
    single = scores.unbind()
    alignment = torch.empty(len(ended.lengths), 0).unbind()
    on_host = scores.tolist()
    found, first = [], 0
    for count in ended.counts:
        order = sorted(range(first, first + count), key=on_host.__getitem__, reverse=True)
        found.append(
            [
                {
                    "tokens": tokens[index],
                    "score": single[index],
                    "attention": attention[index],
                    "alignment": alignment[index],
                    "positional_scores": positional[index],
                }
                for index in order
            ]
        )
        first += count
    return found
