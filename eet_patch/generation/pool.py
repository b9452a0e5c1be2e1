"""Lends out decode steps, and keeps idle ones for the next call: bounded, reported, freed with the
model and by `disable()`.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from eet_patch import patching, reporting
from eet_patch.generation.step import DecoderModel, DecodeStep
from eet_patch.ops._extension import place

MAX_IDLE = 2  # steps a model keeps
# What idle steps of a model may hold: this many bytes, or this share of the weights, if more.
IDLE_BYTES = 256 * 2**20
IDLE_SHARE = 0.05
BLOCK = 64  # tokens; capacities are multiples of it, so that calls of like lengths share buffers

_lock = threading.Lock()
_idle: weakref.WeakKeyDictionary[Any, list[DecodeStep]] = weakref.WeakKeyDictionary()
_lent: weakref.WeakSet[DecodeStep] = weakref.WeakSet()


def _uses(step: DecodeStep) -> list[int]:
    return [_use_count(tensor) for tensor in (*step.keys, *step.values)]


def _use_count(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


def borrow(owner: Any, model: DecoderModel, batch_size: int, kv_len: int) -> DecodeStep:
    """A step of `owner` for `batch_size` rows of up to `kv_len` tokens, nobody else's until it is
    given back.
    """
    addresses = model.addresses()
    stream = place(model.word_weight)[2]
    with _lock:
        idle = _idle.get(owner, [])
        for step in idle:
            if step.batch_size != batch_size or not kv_len <= step.capacity <= 2 * kv_len + BLOCK:
                continue
            idle.remove(step)
            # On another stream its last call may still be under way.
            same = step.addresses == addresses and step.stream == stream
            # Somebody may still hold the cache that the last call handed over.
            if same and _uses(step) == step.unshared_uses:
                _lent.add(step)
                return step
            break
    step = DecodeStep(model, batch_size, (kv_len + BLOCK - 1) // BLOCK * BLOCK)
    step.unshared_uses, step.stream = _uses(step), stream
    with _lock:
        _lent.add(step)
    return step


def give_back(owner: Any, model: DecoderModel, step: DecodeStep) -> None:
    """Keeps the step for the next call if it is small enough. The host's cache may go on holding
    views of its buffers: then nobody will be lent them again.
    """
    weights = sum(t.nbytes for layer in model.layers for t in layer if isinstance(t, Tensor))
    limit = max(IDLE_BYTES, int(IDLE_SHARE * (weights + model.head_weight.nbytes)))
    with _lock:
        _lent.discard(step)
        idle = _idle.setdefault(owner, [])
        idle.append(step)
        while idle and (len(idle) > MAX_IDLE or sum(s.nbytes() for s in idle) > limit):
            idle.pop(0)


def release() -> None:
    """Frees all idle steps."""
    with _lock:
        _idle.clear()


def held_bytes() -> int:
    with _lock:
        steps = {id(step): step for idle in _idle.values() for step in idle}
        steps.update((id(step), step) for step in _lent)
        return sum(step.nbytes() for step in steps.values())


reporting.MEMORY["decode steps (KV buffers, logits, scratch)"] = held_bytes
patching.at_disable(release)
