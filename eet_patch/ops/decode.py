"""All layers of one decode step in one call, and CUDA graphs of such calls."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eet_patch.ops._extension import ACTIVATION_CODES, extension, place
from eet_patch.ops.checks import (
    check_contiguous,
    check_operand,
    check_same_dtype_and_device,
    check_shape,
)
from eet_patch.ops.launch import MAX_SKINNY_ROWS, address, three_addresses
from eet_patch.ops.registration import registered, returns_nothing

_LAYER = struct.Struct("18qd")  # struct DecodeLayer of csrc/ops.h


class DecodeLayer(NamedTuple):
    """Parameters and cache of one pre-norm layer; shapes as `decode_layers` says."""

    norm1_weight: Tensor
    norm1_bias: Tensor | None
    qkv_weights: tuple[Tensor, ...]
    qkv_biases: tuple[Tensor | None, ...]
    out_weight: Tensor
    out_bias: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    key_cache: Tensor
    value_cache: Tensor
    softmax_scale: float


class LayerTable(NamedTuple):
    """The addresses of all layers, where the kernels read them: on the host and on the device."""

    host: Tensor
    device: Tensor
    num_layers: int
    num_qkv_weights: int
    in_out: bool
    intermediate_size: int
    num_heads: int
    head_dim: int
    capacity: int


def pack_layers(layers: Sequence[DecodeLayer], in_out: bool) -> LayerTable:
    """The table that `decode_layers` takes; it holds addresses, and keeps no tensor alive."""
    packed = bytearray()
    for layer in layers:
        packed += _LAYER.pack(
            address(layer.norm1_weight),
            address(layer.norm1_bias),
            *three_addresses(layer.qkv_weights),
            *three_addresses(layer.qkv_biases),
            address(layer.out_weight),
            address(layer.out_bias),
            address(layer.norm2_weight),
            address(layer.norm2_bias),
            address(layer.fc1_weight),
            address(layer.fc1_bias),
            address(layer.fc2_weight),
            address(layer.fc2_bias),
            address(layer.key_cache),
            address(layer.value_cache),
            layer.softmax_scale,
        )
    host = torch.frombuffer(packed, dtype=torch.uint8)
    first = layers[0]
    _, num_heads, capacity, head_dim = first.key_cache.shape
    return LayerTable(
        host,
        host.to(first.key_cache.device),
        len(layers),
        len(first.qkv_weights),
        in_out,
        first.fc1_weight.shape[1 if in_out else 0],
        num_heads,
        head_dim,
        capacity,
    )


class DecodeHead(NamedTuple):
    """The product with the vocabulary behind the last layer, over its layer norm."""

    weight: Tensor  # (vocab_size, hidden_size)
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    logits: Tensor  # (rows, vocab_size), written


def decode_layers_workspace(
    table: LayerTable, like: Tensor, rows: int, max_kv_len: int | None = None
) -> Tensor:
    """Scratch for calls of up to `rows` rows, one call at a time; uint8 on the device of `like`."""
    where = place(like)
    nbytes = max(
        extension().decode_layers_workspace_bytes(
            table.host.data_ptr(),
            table.capacity,
            table.capacity if max_kv_len is None else max_kv_len,
            count,
            table.num_layers,
            table.num_heads,
            table.head_dim,
            table.intermediate_size,
            table.num_qkv_weights,
            table.in_out,
            where[0],
            where[1],
        )
        for count in range(1, rows + 1)
    )
    return torch.zeros(nbytes, dtype=torch.uint8, device=like.device)


def decode_layers(
    hidden_states: Tensor,
    table: LayerTable,
    lengths: Tensor,
    activation: str | None,
    norm_eps: float,
    workspace: Tensor,
    out: Tensor,
    kv_start: Tensor | None = None,
    cache_rows: Tensor | None = None,
    key_rows: Tensor | None = None,
    max_kv_len: int | None = None,
) -> Tensor:
    """Take one new token of every row through all layers of a pre-norm decoder.

    `x += out(attention(LN1(x))); x += fc2(activation(fc1(LN2(x))))` for every layer; the new key
    and value are written to the cache. What changes from step to step is read on the device.
    Weights and caches are reached by address, unseen by torch: a compiled function must not read
    the caches beside this op.

    Args:
        hidden_states: (rows, hidden_size), contiguous; rows <= 64 on CUDA.
        table: of `pack_layers`, over caches (cache_rows, num_heads, capacity, head_dim) and weights
            (in_features, out_features) if its in_out, else (out_features, in_features).
        lengths: (rows,) int32, keys that the row has already; < capacity.
        activation: "gelu", "gelu_tanh", "relu", "silu" or None.
        norm_eps: added to the variances.
        workspace: of `decode_layers_workspace`; one call at a time.
        out: as hidden_states, which it may be.
        kv_start: (rows,) int32, the first key that the row sees (left padding), or None: 0.
        cache_rows: (rows,) int32, the cache row of each row, or None: the row itself.
        key_rows: (rows, capacity) int32, the cache row that holds each position of each row (beams
            that share their past), or None: its own.
        max_kv_len: no length reaches this; None: the capacity.
    Returns:
        `out`.
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: Radford et al. 2019 (GPT-2). Replaces the blocks of `GPT2Model` for one new token.
    """
    _decode_layers(
        hidden_states,
        *table,
        lengths,
        activation,
        norm_eps,
        workspace,
        out,
        kv_start,
        cache_rows,
        key_rows,
        max_kv_len,
    )
    return out


@registered(returns_nothing, mutates=("workspace", "out"), name="decode_layers")
def _decode_layers(
    hidden_states: Tensor,
    table_host: Tensor,
    table_device: Tensor,
    num_layers: int,
    num_qkv_weights: int,
    in_out: bool,
    intermediate_size: int,
    num_heads: int,
    head_dim: int,
    capacity: int,
    lengths: Tensor,
    activation: str | None,
    norm_eps: float,
    workspace: Tensor,
    out: Tensor,
    kv_start: Tensor | None,
    cache_rows: Tensor | None,
    key_rows: Tensor | None,
    max_kv_len: int | None,
) -> None:
    table = LayerTable(
        table_host,
        table_device,
        num_layers,
        num_qkv_weights,
        in_out,
        intermediate_size,
        num_heads,
        head_dim,
        capacity,
    )
    check_operand(hidden_states, "hidden_states")
    check_shape(
        hidden_states, (hidden_states.shape[0], table.num_heads * table.head_dim), "hidden_states"
    )
    check_contiguous(hidden_states, "hidden_states")
    rows = hidden_states.shape[0]
    if hidden_states.device.type == "cuda" and rows > MAX_SKINNY_ROWS:
        raise ValueError(f"hidden_states must have at most {MAX_SKINNY_ROWS} rows, got {rows}")
    check_same_dtype_and_device(out, hidden_states, "out")
    check_shape(out, hidden_states.shape, "out")
    check_contiguous(out, "out")
    for tensor, shape, name in (
        (lengths, (rows,), "lengths"),
        (kv_start, (rows,), "kv_start"),
        (cache_rows, (rows,), "cache_rows"),
        (key_rows, (rows, table.capacity), "key_rows"),
    ):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or tensor.device != hidden_states.device:
            raise TypeError(
                f"{name} must be int32 on {hidden_states.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        check_shape(tensor, shape, name)
        check_contiguous(tensor, name)
    launch_decode_layers(
        hidden_states,
        table,
        lengths,
        activation,
        norm_eps,
        workspace,
        out,
        kv_start,
        cache_rows,
        key_rows,
        max_kv_len,
    )


def launch_decode_layers(
    hidden_states: Tensor,
    table: LayerTable,
    lengths: Tensor,
    activation: str | None,
    norm_eps: float,
    workspace: Tensor,
    out: Tensor,
    kv_start: Tensor | None,
    cache_rows: Tensor | None,
    key_rows: Tensor | None,
    max_kv_len: int | None,
    head: DecodeHead | None = None,
    chained: bool = False,
) -> None:
    """`decode_layers` without its checks, and with the `head` behind it where there is one.
    `chained`: the launch before on the stream is the embedding that makes the hidden states.
    """
    weight, norm_weight, norm_bias, logits = head or (None, None, None, None)
    extension().decode_layers(
        out.data_ptr(),
        hidden_states.data_ptr(),
        table.host.data_ptr(),
        table.device.data_ptr(),
        lengths.data_ptr(),
        address(kv_start),
        address(cache_rows),
        address(key_rows),
        table.capacity,
        table.capacity if max_kv_len is None else max_kv_len,
        hidden_states.shape[0],
        table.num_layers,
        table.num_heads,
        table.head_dim,
        table.intermediate_size,
        table.num_qkv_weights,
        table.in_out,
        norm_eps,
        ACTIVATION_CODES[activation],
        address(weight),
        address(norm_weight),
        address(norm_bias),
        address(logits),
        0 if weight is None else weight.shape[0],
        chained,
        workspace.data_ptr(),
        workspace.numel(),
        *place(hidden_states),
    )


class Graph:
    """A CUDA graph of calls into the extension, which allocate nothing; freed with the object."""

    def __init__(self, device: torch.device) -> None:
        self._device = device.index
        self._stream = torch.cuda.Stream(device)
        self._handle = 0

    def __enter__(self) -> Graph:
        """Calls from here on are captured and not run; no other stream is disturbed."""
        self._scope = torch.cuda.stream(self._stream)
        self._scope.__enter__()
        try:
            extension().graph_begin(self._device, self._stream.cuda_stream)
        except BaseException:
            self._scope.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        try:
            handle = extension().graph_end(self._device, self._stream.cuda_stream)
            self._handle = handle
        except RuntimeError:
            if kind is None:  # else the body's own error says more
                raise
        finally:
            self._scope.__exit__(None, None, None)

    def replay(self) -> None:
        """Runs what was captured, on the current stream."""
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        extension().graph_launch(self._handle, self._device, stream)

    def __del__(self) -> None:
        if self._handle:
            extension().graph_destroy(self._handle, self._device)
            self._handle = 0
