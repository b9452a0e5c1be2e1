"""Lends out decode steps, and keeps idle ones for the next call: bounded, reported, freed with the
model and by `disable()`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eet_patch import patching, reporting
from eet_patch.generation.step import DecoderModel, DecodeStep
from eet_patch.ops._extension import place

MAX_IDLE = 2  # steps a model keeps
# What idle steps of a model may hold: this many bytes, or this share of the weights, if more. A
# call that a step is made for takes its KV buffers out of that at once; they are more than its
# context takes for a while. So all that is held beside the model and the KV cache in use stays
# below 300 MB, or 5 % of the weights, with cuBLAS' workspace (32 MiB on the newest GPUs).
IDLE_BYTES = 224 * 2**20
IDLE_SHARE = 0.04
BLOCK = 64  # tokens; capacities are multiples of it, so that calls of like lengths share buffers
# New tokens that a call has room for at first, and at least so many more whenever they are used up:
# many that may go on for long end soon. A block of fewer would cost the others a graph.
GROWTH = 512

_lock = threading.Lock()
_idle: weakref.WeakKeyDictionary[Any, list[DecodeStep]] = weakref.WeakKeyDictionary()
_lent: weakref.WeakSet[DecodeStep] = weakref.WeakSet()


def _uses(step: DecodeStep) -> list[int]:
    return [_use_count(tensor) for tensor in (*step.keys, *step.values)]


def _use_count(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


def _limit(model: DecoderModel) -> int:
    weights = model.head_weight.nbytes
    for layer in model.layers:
        for value in layer:
            parts = value if isinstance(value, tuple) else (value,)
            weights += sum(part.nbytes for part in parts if isinstance(part, Tensor))
    return max(IDLE_BYTES, int(IDLE_SHARE * weights))


def _trim(idle: list[DecodeStep], limit: int) -> None:
    """Lets go of the idle steps that have waited longest, until the others hold no more."""
    while idle and sum(step.nbytes() for step in idle) > limit:
        idle.pop(0)


def _in_blocks(tokens: int) -> int:
    return (tokens + BLOCK - 1) // BLOCK * BLOCK


def borrow(owner: Any, model: DecoderModel, batch_size: int, kv_len: int, most: int) -> DecodeStep:
    """A step of `owner` for `batch_size` rows of at least `kv_len` tokens, and of about `most` in
    the end (`make_room`); nobody else's until it is given back.
    """
    stream = place(model.word_weight)[2]
    step = _take_idle(owner, model, batch_size, kv_len, most, stream)
    if step is None:
        capacity = _in_blocks(kv_len)
        with _lock:  # before anything is allocated: at no time both are there
            _make_way(owner, model, batch_size, capacity)
        step = _made(model, batch_size, capacity)
        step.unshared_uses, step.stream = _uses(step), stream
    with _lock:
        _lent.add(step)
    return step


def _make_way(owner: Any, model: DecoderModel, batch_size: int, capacity: int) -> None:
    _trim(_idle.get(owner, []), _limit(model) - model.cache_bytes(batch_size, capacity))


def make_room(
    owner: Any,
    model: DecoderModel,
    step: DecodeStep,
    kv_len: int,
    most: int,
    moved: Callable[[int], None],
) -> None:
    """Lets a lent step grow by a block if it is too small for `kv_len` tokens; by half of what it
    has at least, so that a call that goes on to `most` grows a few times only. `moved` is told what
    `DecodeStep.grow` says.
    """
    if kv_len <= step.capacity:
        return
    further = step.capacity + max(GROWTH, step.capacity // 2)
    capacity = _in_blocks(max(kv_len, min(most, further)))
    with _lock:
        _make_way(owner, model, step.batch_size, capacity)
    step.grow(model, capacity, moved)


def _take_idle(
    owner: Any, model: DecoderModel, batch_size: int, kv_len: int, most: int, stream: int
) -> DecodeStep | None:
    """The smallest idle step that needn't grow, or the largest; those that nobody could use any
    more are let go.
    """
    addresses = model.addresses()

    def preference(step: DecodeStep) -> tuple[bool, int]:
        return step.capacity < most, abs(step.capacity - most)

    with _lock:
        idle = _idle.get(owner, [])
        for step in sorted(idle, key=preference):
            if step.batch_size != batch_size or not kv_len <= step.capacity <= 2 * most + BLOCK:
                continue
            idle.remove(step)
            # On another stream its last call may still be under way.
            same = step.addresses == addresses and step.stream == stream
            # Somebody may still hold the cache that the last call handed over.
            if same and _uses(step) == step.unshared_uses:
                return step
    return None


def _made(model: DecoderModel, batch_size: int, capacity: int) -> DecodeStep:
    try:
        return DecodeStep(model, batch_size, capacity)
    except torch.OutOfMemoryError:
        with _lock:
            if not any(_idle.values()):
                raise
    release()  # out of the handler, whose exception holds what was allocated
    return DecodeStep(model, batch_size, capacity)


def give_back(owner: Any, model: DecoderModel, step: DecodeStep) -> None:
    """Keeps the step for the next call if it is small enough. The host's cache may go on holding
    views of its buffers: then nobody will be lent them again.
    """
    limit = _limit(model)
    with _lock:
        _lent.discard(step)
        idle = _idle.setdefault(owner, [])
        idle.append(step)
        if len(idle) > MAX_IDLE:
            idle.pop(0)
        _trim(idle, limit)


def release() -> None:
    """Frees all idle steps."""
    with _lock:
        captured = any(step.by_products for steps in _idle.values() for step in steps)
        _idle.clear()
    if captured and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what was a graph's goes nowhere else by itself


def held_bytes() -> int:
    with _lock:
        steps = {id(step): step for idle in _idle.values() for step in idle}
        steps.update((id(step), step) for step in _lent)
        return sum(step.nbytes() for step in steps.values())


reporting.MEMORY["decode steps (KV buffers, logits, scratch)"] = held_bytes
patching.at_disable(release)
