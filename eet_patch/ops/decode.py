"""All layers of one decode step in one call, and CUDA graphs of such calls."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eet_patch.ops._extension import ACTIVATION_CODES, extension, place
from eet_patch.ops.checks import (
    check_buffer,
    check_contiguous,
    check_operand,
    check_same_dtype_and_device,
    check_shape,
)
from eet_patch.ops.launch import (
    MAX_BFLOAT16_ROWS_ON_CPU,
    MAX_SKINNY_ROWS,
    address,
    three_addresses,
    uses_our_products,
)
from eet_patch.ops.registration import registered, returns_nothing

_LAYER = struct.Struct("26qd")  # struct DecodeLayer of csrc/ops.h


class CrossLayer(NamedTuple):
    """Cross-attention of one layer; shapes as `decode_layers` says."""

    norm_weight: Tensor
    norm_bias: Tensor | None
    query_weight: Tensor
    query_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    keys: Tensor
    values: Tensor


class CrossView(NamedTuple):
    """What each row sees of the cross keys and values, (rows,) int32 each: the sentence, the first
    position of it (None: 0) and the one behind the last.
    """

    rows: Tensor
    start: Tensor | None
    lengths: Tensor
    # (cache rows, capacity, cross length) float32, or None: gets the mean over the heads of the
    # last layer's weights, for the cache row and position of each row's new token.
    weights: Tensor | None = None


class DecodeLayer(NamedTuple):
    """Parameters and cache of one layer; shapes as `decode_layers` says."""

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
    cross: CrossLayer | None = None


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
    post_norm: bool = False
    cross_strides: tuple[int, int, int] = (0, 0, 0)
    cross_len: int = 0  # 0: the layers have no cross-attention


def pack_layers(layers: Sequence[DecodeLayer], in_out: bool, post_norm: bool = False) -> LayerTable:
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
            *((0,) * 8 if layer.cross is None else map(address, layer.cross)),
            layer.softmax_scale,
        )
    host = torch.frombuffer(packed, dtype=torch.uint8)
    first = layers[0]
    cross = None if first.cross is None else first.cross.keys
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
        post_norm,
        (0, 0, 0) if cross is None else (cross.stride(0), cross.stride(1), cross.stride(2)),
        0 if cross is None else cross.shape[2],
    )


class DecodeHead(NamedTuple):
    """The product with the vocabulary behind the last layer, over its layer norm."""

    weight: Tensor  # (vocab_size, hidden_size)
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    logits: Tensor  # (rows, vocab_size), written


def best_rows(like: Tensor) -> int:
    """Up to how many rows `decode_layers` is the way to go; more go through torch's products. Of
    160 rows a product of 1024 x 1024 took 20 us in a kernel of ours, and 6 in cuBLAS (H100).
    """
    counts = (MAX_BFLOAT16_ROWS_ON_CPU, MAX_SKINNY_ROWS, 2**31)
    return max(count for count in counts if uses_our_products(like, count))


def decode_layers_workspace(
    table: LayerTable, like: Tensor, rows: int, max_kv_len: int | None = None
) -> Tensor:
    """Scratch for calls of up to `rows` rows, one call at a time; uint8 on the device of `like`."""
    where = place(like)
    nbytes = extension().decode_layers_workspace_bytes(
        table.host.data_ptr(),
        table.capacity,
        table.capacity if max_kv_len is None else max_kv_len,
        rows,
        table.num_layers,
        table.num_heads,
        table.head_dim,
        table.intermediate_size,
        table.num_qkv_weights,
        table.in_out,
        where[0],
        where[1],
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
    cross: CrossView | None = None,
) -> Tensor:
    """Take one new token of every row through all layers of a decoder.

    `x += out(attention(LN1(x))); x += fc2(activation(fc1(LN2(x))))` for every layer, or post-norm
    `x = LN1(x + out(attention(x))); x = LN2(x + fc2(activation(fc1(x))))`; with cross-attention
    and a norm of its own between the two where the layers have it. The new key and value are
    written to the cache. What changes from step to step is read on the device.
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
        cross: what the rows see of the layers' cross keys and values (sentences, num_heads,
            cross length, head_dim), which all layers keep by the same strides; required if there
            are any.
    Returns:
        `out`.
    Raises:
        ValueError, TypeError: on a shape, dtype, device or layout other than these.
    Source: Radford et al. 2019 (GPT-2); Vaswani et al. 2017, arXiv:1706.03762. Replaces the blocks
        of `GPT2Model` and the layers of fairseq's `TransformerDecoder` for one new token.
    """
    _decode_layers(
        hidden_states,
        *table[:10],
        *table.cross_strides,
        table.cross_len,
        lengths,
        activation,
        norm_eps,
        workspace,
        out,
        kv_start,
        cache_rows,
        key_rows,
        max_kv_len,
        *(cross or (None, None, None, None)),
    )
    return out


@registered(returns_nothing, mutates=("workspace", "out", "cross_weights"), name="decode_layers")
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
    post_norm: bool,
    cross_batch_stride: int,
    cross_head_stride: int,
    cross_token_stride: int,
    cross_len: int,
    lengths: Tensor,
    activation: str | None,
    norm_eps: float,
    workspace: Tensor,
    out: Tensor,
    kv_start: Tensor | None,
    cache_rows: Tensor | None,
    key_rows: Tensor | None,
    max_kv_len: int | None,
    cross_rows: Tensor | None,
    cross_start: Tensor | None,
    cross_lengths: Tensor | None,
    cross_weights: Tensor | None,
) -> None:
    cross: CrossView | None = None
    if cross_rows is not None and cross_lengths is not None:
        cross = CrossView(cross_rows, cross_start, cross_lengths, cross_weights)
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
        post_norm,
        (cross_batch_stride, cross_head_stride, cross_token_stride),
        cross_len,
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
        (None if cross is None else cross.rows, (rows,), "cross.rows"),
        (None if cross is None else cross.start, (rows,), "cross.start"),
        (None if cross is None else cross.lengths, (rows,), "cross.lengths"),
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
    if (cross is not None) != (table.cross_len > 0):
        raise ValueError("cross must be given if, and only if, the layers have cross-attention")
    if cross is not None and cross.weights is not None:
        check_buffer(cross.weights, (torch.float32,), hidden_states, "cross.weights")
        check_shape(
            cross.weights,
            (cross.weights.shape[0], cross.weights.shape[1], table.cross_len),
            "cross.weights",
        )
        check_contiguous(cross.weights, "cross.weights")
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
        cross=cross,
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
    cross: CrossView | None = None,
) -> None:
    """`decode_layers` without its checks, and with the `head` behind it where there is one.
    `chained`: the launch before on the stream is the embedding that makes the hidden states.
    """
    weight, norm_weight, norm_bias, logits = head or (None, None, None, None)
    weights = None if cross is None else cross.weights
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
        table.post_norm,
        0 if cross is None else address(cross.start),
        0 if cross is None else cross.lengths.data_ptr(),
        0 if cross is None else cross.rows.data_ptr(),
        table.cross_strides,
        table.cross_len,
        address(weights),
        0 if weights is None else weights.stride(0),
        0 if weights is None else weights.stride(1),
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


def launch_step_attention(
    out: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    softmax_scale: float,
    lengths: Tensor,
    *,
    new: tuple[Tensor, Tensor] | None = None,
    shared_rows: int = 1,
    kv_start: Tensor | None = None,
    cache_rows: Tensor | None = None,
    key_rows: Tensor | None = None,
    weights: Tensor | None = None,
    weight_rows: Tensor | None = None,
    weight_positions: Tensor | None = None,
) -> None:
    """The attention of a decode step by itself, for rows that are too many for `decode_layers`;
    nothing is checked.

    Args:
        out: (rows, num_heads * head_dim), contiguous.
        query: (rows, num_heads * head_dim), each row contiguous.
        keys, values: (cache rows, num_heads, capacity, head_dim), of the same strides.
        lengths, kv_start, cache_rows, key_rows: as of `decode_layers`. A row sees the positions
            below its length, and the new one.
        shared_rows: so many rows behind each other have one length and one start, and mostly the
            same keys, which may be read once then.
        new: key and value of the new token, of the query's strides: they are written to the cache
            and seen. None: there is none.
        weights: as of `CrossView`, at cache row `weight_rows` and position `weight_positions`.
    """
    at, item_size = query.data_ptr(), query.itemsize
    key, value = new or (query, query)
    extension().step_attention(
        out.data_ptr(),
        at,
        query.stride(0),
        (key.data_ptr() - at) // item_size,
        (value.data_ptr() - at) // item_size,
        keys.data_ptr(),
        values.data_ptr(),
        keys.stride()[:3],
        lengths.data_ptr(),
        address(kv_start),
        address(cache_rows),
        address(key_rows),
        keys.shape[2],
        keys.shape[2],
        out.shape[0],
        num_heads,
        keys.shape[3],
        shared_rows,
        new is not None,
        softmax_scale,
        address(weights),
        address(weight_rows),
        address(weight_positions),
        0 if weights is None else weights.stride(0),
        0 if weights is None else weights.stride(1),
        0 if weights is None else weights.shape[2],
        *place(out),
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
