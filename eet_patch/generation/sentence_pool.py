"""Lends out `SentenceStep`s, and keeps one a model for the next call: bounded, reported, freed with
the model and by `disable()`.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from eet_patch import patching, reporting
from eet_patch.generation.sentence_decoder import SentenceDecoder
from eet_patch.generation.sentence_step import SentenceStep, in_blocks
from eet_patch.ops._extension import place

# What the idle step of a model may hold between two batches: the host's own caches of a batch, and
# their copies, are more.
IDLE_BYTES = 2 * 2**30

_lock = threading.Lock()
_idle: weakref.WeakKeyDictionary[Any, SentenceStep] = weakref.WeakKeyDictionary()
_lent: weakref.WeakSet[SentenceStep] = weakref.WeakSet()


def borrow(
    owner: Any, model: SentenceDecoder, sentences: int, rows: int, capacity: int, cross_len: int
) -> SentenceStep:
    """A step of `owner` for at least so much; nobody else's until it is given back."""
    capacity, cross_len = in_blocks(capacity), in_blocks(cross_len)
    with _lock:
        step = _idle.pop(owner, None)
    if step is not None:
        fits = step.rows >= rows and step.sentences >= sentences
        fits = fits and step.capacity >= capacity and step.cross_len >= cross_len
        # On another stream its last call may still be under way.
        same = step.addresses == model.addresses() and step.stream == place(model.word_weight)[2]
        if not (fits and same and bool(step.cross_len) == bool(cross_len)):
            step = None  # gone before another one is made
    if step is None:
        try:
            step = SentenceStep(model, sentences, rows, capacity, cross_len)
        except torch.OutOfMemoryError:
            with _lock:
                if not _idle:
                    raise
        if step is None:  # out of the handler, whose exception holds what was allocated
            release()
            step = SentenceStep(model, sentences, rows, capacity, cross_len)
    with _lock:
        _lent.add(step)
    return step


def give_back(owner: Any, step: SentenceStep) -> None:
    """Keeps the step for the next call if it is small enough."""
    with _lock:
        _lent.discard(step)
        if step.addresses and step.nbytes() <= IDLE_BYTES:
            _idle[owner] = step


def release() -> None:
    """Frees all idle steps."""
    with _lock:
        _idle.clear()


def held_bytes() -> int:
    with _lock:
        steps = {id(step): step for step in (*_idle.values(), *_lent)}
        return sum(step.nbytes() for step in steps.values())


reporting.MEMORY["decode steps of fairseq (KV buffers, logits, scratch)"] = held_bytes
patching.at_disable(release)
