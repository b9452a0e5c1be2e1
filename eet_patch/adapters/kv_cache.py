"""transformers' caches: written in place where they allow it, through their own `update` everywhere
else.

A DynamicCache concatenates: every step copies all keys and values of every layer. We give its
layers tensors that are views of a buffer with room behind them and write the new tokens there. A
`_Room` remembers how much of the buffer is taken: a second sequence that continues from the same
past finds the room taken and gets a copy, as concatenation gives. `lend` makes somebody else's
buffers such a room, so that what is computed lands there at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eet_patch import reporting
from eet_patch.ops.launch import KVCache, UpdateKV

BLOCK = 64  # tokens by which a buffer grows at least
_lock = threading.RLock()  # a reference may die, and call back, while it is held
# id of a layer's keys -> a weak reference to them, and their room. Not an attribute of the tensor,
# which copies and pickles of a cache would carry along.
_rooms: dict[int, tuple[weakref.ref[Tensor], _Room]] = {}


class _Room:
    """A pair of buffers (batch, num_heads, capacity, head_dim) and how many of their tokens are
    taken. Those that are `lent` are in their owner's account.
    """

    __slots__ = ("key", "lent", "taken", "value")

    def __init__(self, key: Tensor, value: Tensor, taken: int, lent: bool = False) -> None:
        self.key, self.value, self.taken, self.lent = key, value, taken, lent

    def fits(self, past_len: int, end: int, shape: tuple[int, ...], like: Tensor) -> bool:
        """Whether tokens `past_len` to `end` of (batch, num_heads, _, head_dim) may be written."""
        return (
            self.taken == past_len
            and (self.key.shape[:2], self.key.shape[3]) == (shape[:2], shape[3])
            and end <= self.key.shape[2]
            and self.key.dtype == like.dtype
            and self.key.device == like.device
            # Out of inference mode nobody may write to what was made in it.
            and (torch.is_inference_mode_enabled() or not self.key.is_inference())
        )

    def spare_bytes(self) -> int:
        if self.lent:
            return 0
        batch, heads, capacity, head_dim = self.key.shape
        return 2 * batch * heads * (capacity - self.taken) * head_dim * self.key.element_size()


def _room_of(keys: Tensor) -> _Room | None:
    entry = _rooms.get(id(keys))
    return entry[1] if entry is not None and entry[0]() is keys else None


def _remember(keys: Tensor, room: _Room) -> None:
    number = id(keys)

    def forget(reference: Any) -> None:
        with _lock:
            entry = _rooms.get(number)
            if entry is not None and entry[0] is reference:
                del _rooms[number]

    with _lock:
        _rooms[number] = (weakref.ref(keys, forget), room)


def spare_bytes() -> int:
    """Bytes of all buffers behind caches that hold no token yet."""
    with _lock:
        rooms = {id(room): room for _, room in _rooms.values()}
        return sum(room.spare_bytes() for room in rooms.values())


reporting.MEMORY["room behind KV caches"] = spare_bytes


def self_attention_cache(past_key_values: Any) -> Any:
    """The part of a cache that holds the decoder's own keys and values."""
    if type(past_key_values).__name__ == "EncoderDecoderCache":
        return past_key_values.self_attention_cache
    return past_key_values


def dynamic_layer(cache: Any, layer_idx: int) -> Any:
    """The DynamicLayer that `update` would concatenate to, or None where `update` does something
    else.
    """
    if (
        type(cache).__name__ != "DynamicCache"
        or type(cache).__module__ != "transformers.cache_utils"
    ):
        return None
    layers = cache.layers
    if cache.offloading or layer_idx is None:
        return None
    if layer_idx >= len(layers):
        made = cache.layer_class_to_replicate
        if getattr(made, "__name__", None) != "DynamicLayer":
            return None
        while len(layers) <= layer_idx:  # as `update` does
            layers.append(made())
    layer = layers[layer_idx]
    if type(layer).__name__ != "DynamicLayer" or "update" in vars(layer):
        return None
    return layer


def kv_length(cache: Any, layer_idx: int, q_len: int) -> int | str:
    """How many keys `update` will return for q_len new tokens, or why that can't be told."""
    kind = type(cache)
    if kind.__module__ != "transformers.cache_utils" or "update" in vars(cache):
        return f"the cache is a {kind.__name__}, which is not one of transformers' own"
    if layer_idx is None:
        return "the layer has no index in the cache"
    layers = cache.layers
    if layer_idx >= len(layers):
        replicated = getattr(cache.layer_class_to_replicate, "__name__", None)
        return q_len if replicated == "DynamicLayer" else f"the cache has no layer {layer_idx}"
    layer = layers[layer_idx]
    name = type(layer).__name__
    if name == "DynamicLayer":
        return (layer.keys.shape[-2] if filled(layer) else 0) + q_len
    if name == "StaticLayer":
        return layer.max_cache_len
    if any(
        base.__name__ in ("QuantizedLayer", "BaseQuantizedLayer") for base in type(layer).__mro__
    ):
        return layer.get_seq_length() + q_len
    return f"the cache layer is a {name}"


def filled(layer: Any) -> bool:
    return layer.keys is not None and layer.keys.numel() > 0


def _initialise(layer: Any, like: Tensor, batch: int, num_heads: int, head_dim: int) -> None:
    """What `update` does first to a DynamicLayer that nothing was written to."""
    if layer.keys is not None:
        return
    empty = like.new_empty(batch, num_heads, 0, head_dim)
    try:
        layer.lazy_initialization(empty, empty)
    except TypeError:  # before 5.0 it took the keys alone
        layer.lazy_initialization(empty)


def _holds(layer: Any, like: Tensor, shape: tuple[int, int, int, int]) -> bool:
    """Whether a filled layer's keys and values are plain tensors of this shape, and of the dtype
    and device of `like`.
    """
    return all(
        type(tensor) is Tensor
        and tensor.shape == shape
        and tensor.dtype == like.dtype
        and tensor.device == like.device
        for tensor in (layer.keys, layer.values)
    )


def lend(cache: Any, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Makes buffers, each (batch, num_heads, capacity, head_dim), the room of a DynamicCache's
    layers: the tokens that a layer holds are copied there, and those that are appended in place are
    written there. A layer that can't take them is left alone, for `move_in` at the end.
    """
    for layer_idx, (key, value) in enumerate(zip(keys, values, strict=True)):
        layer = dynamic_layer(cache, layer_idx)
        if layer is None:
            continue
        batch, num_heads, capacity, head_dim = key.shape
        past_len = layer.keys.shape[-2] if filled(layer) else 0
        if past_len:
            if past_len > capacity or not _holds(
                layer, key, (batch, num_heads, past_len, head_dim)
            ):
                continue
            key[:, :, :past_len].copy_(layer.keys)
            value[:, :, :past_len].copy_(layer.values)
        else:
            _initialise(layer, key, batch, num_heads, head_dim)
        layer.keys, layer.values = key[:, :, :past_len], value[:, :, :past_len]
        _remember(layer.keys, _Room(key, value, past_len, lent=True))


def move_in(layer: Any, key: Tensor, value: Tensor) -> None:
    """Copies what a filled layer holds to buffers of the same shape, unless it was written there
    (`lend`): a layer that ran unpatched makes tensors of its own.
    """
    for held, buffer in ((layer.keys, key), (layer.values, value)):
        there = held.data_ptr() == buffer.data_ptr() and held.stride() == buffer.stride()
        if not there or held.shape != buffer.shape:
            buffer.copy_(held)


def append_in_place(layer: Any, like: Tensor, shape: tuple[int, int, int, int]) -> KVCache | None:
    """Gives a DynamicLayer room for q_len more tokens and makes them part of it; the caller writes
    them at past_len.

    Args:
        layer: from `dynamic_layer`.
        like: the layer's input, for dtype and device.
        shape: (batch, num_heads, q_len, head_dim) of the new keys.
    Returns:
        What to write to, or None if the cache holds something of another shape, dtype or device.
    """
    batch, num_heads, q_len, head_dim = shape
    past_len = 0
    if filled(layer):
        past_len = layer.keys.shape[-2]
        if not _holds(layer, like, (batch, num_heads, past_len, head_dim)):
            return None
    else:
        _initialise(layer, like, batch, num_heads, head_dim)
    keys, values = layer.keys, layer.values
    end = past_len + q_len
    room: Any = _room_of(keys)
    with _lock:
        free = (
            room is not None
            and room.fits(past_len, end, shape, like)
            # An empty tensor has no address, and nothing in it that could stand elsewhere.
            and (past_len == 0 or room.key.data_ptr() == keys.data_ptr())
            and (past_len == 0 or room.value.data_ptr() == values.data_ptr())
        )
        if free:
            room.taken = end
    if not free:
        capacity = -(-max(end + 1, end + end // 8) // BLOCK) * BLOCK
        key = torch.empty(
            (batch, num_heads, capacity, head_dim), dtype=like.dtype, device=like.device
        )
        value = torch.empty_like(key)
        if past_len:
            key[:, :, :past_len].copy_(keys)
            value[:, :, :past_len].copy_(values)
        room = _Room(key, value, end)
    layer.keys, layer.values = room.key[:, :, :end], room.value[:, :, :end]
    _remember(layer.keys, room)
    return KVCache(room.key, room.value, past_len)


def kept_reason(past: Any, layer_idx: int, like: Tensor, kv_len: int, head_dim: int) -> str | None:
    """Why the cross-attention keys and values that an EncoderDecoderCache keeps can't be read, or
    None.
    """
    layer = past.cross_attention_cache.layers[layer_idx]
    for tensor in (layer.keys, layer.values):
        if type(tensor) is not Tensor or tensor.dtype != like.dtype or tensor.device != like.device:
            return "the kept cross-attention keys differ from the input in type, dtype or device"
        shape = (like.shape[0], like.shape[2] // head_dim, kv_len, head_dim)
        if tensor.shape != shape or tensor.stride(3) != 1:
            return f"the kept cross-attention keys have shape {tuple(tensor.shape)}, not {shape}"
    return None


class NoCache:
    """Stands for a SelfAttentionCache where the layer has none."""

    buffers = update_kv = None

    def __enter__(self) -> NoCache:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        pass


NO_CACHE = NoCache()


class SelfAttentionCache:
    """A layer's part of a host's cache while the layer runs: `buffers` to write to, or `update_kv`.

    Leaving it by an exception takes tokens that were appended in place out again, so that the
    original can run; after the host's own `update` that is not possible, and the exception is
    marked with `eet_patch_committed`.
    """

    __slots__ = ("_before", "_layer", "_updated", "buffers", "update_kv")

    def __init__(
        self,
        past_key_values: Any,
        layer_idx: int,
        like: Tensor,
        num_heads: int,
        arguments: dict[str, Any],
        kv_len: int,
        crop: bool,
        head_dim: int | None = None,
    ) -> None:
        """`num_heads` are those of the keys, `head_dim` their size if they don't make up the
        hidden size. `kv_len` and `crop`: how many keys the mask was read for, and whether only the
        first q_len of them count.
        """
        self.buffers: KVCache | None = None
        self.update_kv: UpdateKV | None = None
        self._layer = None
        self._updated = False
        cache = self_attention_cache(past_key_values)
        layer = dynamic_layer(cache, layer_idx)
        batch, q_len, hidden_size = like.shape
        if layer is not None and not (crop and filled(layer)):
            before = {name: vars(layer).get(name) for name in ("keys", "values", "is_initialized")}
            shape = (batch, num_heads, q_len, head_dim or hidden_size // num_heads)
            self.buffers = append_in_place(layer, like, shape)
            if self.buffers is not None:
                self._layer, self._before = layer, before
                return
        extra: tuple[Any, ...] = ()
        if "cache_position" in arguments:
            extra = ({"cache_position": arguments["cache_position"]},)

        def update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            self._updated = True
            key, value = cache.update(key, value, layer_idx, *extra)
            if key.shape[2] != kv_len or value.shape[2] != kv_len:
                raise RuntimeError(
                    f"{type(cache).__name__}.update returned {key.shape[2]} keys and not {kv_len}"
                )
            if crop:
                return key[:, :, :q_len], value[:, :, :q_len]
            return key, value

        self.update_kv = update

    def __enter__(self) -> SelfAttentionCache:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is None:
            return
        if self._layer is not None:
            vars(self._layer).update(self._before)
        elif self._updated:
            error.eet_patch_committed = True
