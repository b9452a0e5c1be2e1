"""Keys and values that a decoder keeps between calls, in buffers that grow by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 64  # tokens that a buffer has room for beyond what it must hold, or half as many again


class LayerCache:
    """Keys and values of one layer.

    Attributes:
        key, value: (batch_size, num_heads, capacity, head_dim), or None before the first call.
        length: tokens that they hold.
        cross: keys and values of an encoder, each (batch_size, num_heads, kv_len, head_dim), or
            None.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.length = 0
        self.cross: tuple[Tensor, Tensor] | None = None

    def reserve(self, like: Tensor, num_heads: int, count: int) -> tuple[Tensor, Tensor]:
        """Buffers with room for `count` more tokens of hidden states such as `like`."""
        batch_size, _, hidden_size = like.shape
        needed = self.length + count
        if self.key is not None and self.value is not None:
            if self.key.shape[0] != batch_size:
                raise ValueError(
                    f"the cache holds {self.key.shape[0]} sequences, and the input is of "
                    f"{batch_size}; call reorder() when the batch changes"
                )
            if self.key.shape[2] >= needed:
                return self.key, self.value
        capacity = needed + max(ROOM, self.length // 2)
        shape = (batch_size, num_heads, capacity, hidden_size // num_heads)
        key, value = like.new_empty(shape), like.new_empty(shape)
        if self.key is not None and self.value is not None:
            key[:, :, : self.length] = self.key[:, :, : self.length]
            value[:, :, : self.length] = self.value[:, :, : self.length]
        self.key, self.value = key, value
        return key, value

    def reorder(self, index: Tensor) -> None:
        """See `KVCache.reorder`."""
        if self.key is not None and self.value is not None:
            self.key, self.value = (
                self.key.index_select(0, index),
                self.value.index_select(0, index),
            )
        if self.cross is not None:
            key, value = self.cross
            self.cross = key.index_select(0, index), value.index_select(0, index)


class KVCache:
    """What `use_cache` returns as `past_key_values`, and fairseq's `incremental_state` holds: pass
    it to the next call. It is written in place.
    """

    def __init__(self) -> None:
        self._layers: dict[int, LayerCache] = {}

    def layer(self, layer_idx: int) -> LayerCache:
        """The part of one layer, made when it is first asked for."""
        return self._layers.setdefault(layer_idx, LayerCache())

    def get_seq_length(self) -> int:
        """Tokens that the cache holds."""
        first = next(iter(self._layers.values()), None)
        return 0 if first is None else first.length

    def reorder(self, index: Tensor) -> None:
        """Go on with these rows: beams that change their order, or a batch of which rows have
        ended.

        Args:
            index: (new_batch_size,), int64, on the cache's device: the old row of each new one; a
                row may come twice, or not at all.
        Raises:
            TypeError: on another dtype.
        """
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"index must be an int64 tensor, got {getattr(index, 'dtype', index)}")
        for layer in self._layers.values():
            layer.reorder(index)

    reorder_cache = reorder  # transformers' name
