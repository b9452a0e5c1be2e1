"""transformers' logits processors and stopping criteria in our terms, where their exact types are
ones whose meaning we have.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from eet_patch.generation.step import Selection

_PROCESSORS = "transformers.generation.logits_process"
_CRITERIA = "transformers.generation.stopping_criteria"
# In the order in which `generate` builds them and our kernel applies them. The suppressing ones
# commute with each other.
_ORDER = {
    "RepetitionPenaltyLogitsProcessor": 0,
    "MinLengthLogitsProcessor": 1,
    "MinNewTokensLengthLogitsProcessor": 1,
    "SuppressTokensLogitsProcessor": 1,
    "TemperatureLogitsWarper": 2,
    "TopKLogitsWarper": 3,
    "TopPLogitsWarper": 4,
    "MinPLogitsWarper": 5,
}


class Stopping(NamedTuple):
    """Where a row ends: at a length, or at one of these tokens."""

    max_length: int | None
    eos_token_ids: tuple[int, ...]


def _known(value: Any, module: str) -> str | None:
    kind = type(value)
    return kind.__name__ if kind.__module__ == module else None


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        return tuple(value.flatten().tolist())
    return (value,) if isinstance(value, int) else tuple(value)


def stopping_of(criteria: Any) -> Stopping | str:
    """What a StoppingCriteriaList means, or why a kernel can't tell."""
    max_length: int | None = None
    eos: tuple[int, ...] = ()
    for criterion in criteria:
        name = _known(criterion, _CRITERIA)
        if name == "MaxLengthCriteria":
            length = criterion.max_length
            max_length = length if max_length is None else min(max_length, length)
        elif name == "EosTokenCriteria":
            eos += _token_ids(criterion.eos_token_id)
        else:
            return f"the stopping criterion {type(criterion).__name__}"
    return Stopping(max_length, eos)


def unpenalised_tokens(processors: Any) -> Tensor | None:
    """How many tokens at the start of each row the repetition penalty leaves out (padding, from
    transformers 5.23 on), or None.
    """
    for processor in processors:
        if _known(processor, _PROCESSORS) == "RepetitionPenaltyLogitsProcessor":
            return getattr(processor, "prompt_ignore_length", None)
    return None


def selection_of(
    processors: Any, stopping: Stopping, sample: bool, pad_token_id: int | None, length: int
) -> Selection | str:
    """What a LogitsProcessorList means from the sequence length `length` on, or why a kernel can't
    tell.
    """
    penalty, temperature, top_p, min_p, top_k, min_new_tokens = 1.0, 1.0, 1.0, 0.0, 0, 0
    suppressed: tuple[int, ...] = ()
    reached = -1
    for processor in processors:
        name = _known(processor, _PROCESSORS)
        if name is None or name not in _ORDER or "__call__" in vars(processor):
            return f"the logits processor {type(processor).__name__}"
        rank = _ORDER[name]
        if rank < reached or (rank == reached and rank != 1):
            return f"the logits processor {name} stands in an unusual place"
        reached = rank
        if rank >= 2 and not sample:
            # Greedy search with a warper given by hand: what it removes may be its own ties.
            return f"the logits processor {name} in greedy search"
        if getattr(processor, "filter_value", -math.inf) != -math.inf:
            return f"the filter value of {name}"
        if rank >= 4 and processor.min_tokens_to_keep != 1:
            return f"min_tokens_to_keep of {name}"
        if name == "RepetitionPenaltyLogitsProcessor":
            ignored = getattr(processor, "prompt_ignore_length", None)
            if ignored is not None and not isinstance(ignored, Tensor):
                return f"prompt_ignore_length of {name}"
            penalty = float(processor.penalty)
        elif name == "SuppressTokensLogitsProcessor":
            suppressed += _token_ids(processor.suppress_tokens)
        elif name == "TemperatureLogitsWarper":
            temperature = float(processor.temperature)
        elif name == "TopKLogitsWarper":
            top_k = int(processor.top_k)
        elif name == "TopPLogitsWarper":
            top_p = float(processor.top_p)
        elif name == "MinPLogitsWarper":
            min_p = float(processor.min_p)
        else:
            least = (
                processor.min_length
                if name == "MinLengthLogitsProcessor"
                else processor.prompt_length_to_skip + processor.min_new_tokens
            )
            if least > length:
                if set(_token_ids(processor.eos_token_id)) != set(stopping.eos_token_ids):
                    return f"{name} over tokens that don't end a row"
                min_new_tokens = max(min_new_tokens, least - length)
    if stopping.eos_token_ids and pad_token_id is None:
        return "rows end at a token, and there is none to pad them with"
    return Selection(
        sample,
        penalty,
        suppressed,
        stopping.eos_token_ids,
        min_new_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        pad_token_id if pad_token_id is not None else 0,
    )
