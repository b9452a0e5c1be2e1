"""Products of one input with several weights in one launch, by the cuBLASLt that torch has loaded.

cuBLASLt takes matrices that lie equally far apart as one batch, and adds each one's bias behind the
sum; torch has no function for that. A model's query, key and value weights mostly lie so, since
they were allocated one after the other. Where they don't, or cuBLASLt has no kernel, the caller
goes through torch, weight by weight.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORKSPACE_BYTES = 8 * 2**20
MAX_PLANS = 512

# Of cublasLt.h and library_types.h, the same since CUDA 11.3.
_CUDA_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_CUDA_R_32F, _COMPUTE_32F = 0, 68
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER, _BIAS_BATCH_STRIDE = 3, 7, 8, 10
_OP_T, _EPILOGUE_BIAS = 1, 4
_BATCH_COUNT, _BATCH_STRIDE = 5, 6
_MAX_WORKSPACE, _REDUCTIONS = 1, 3
_REDUCTION_IN_FLOAT = 2  # of split sums: in one order, and never rounded on the way


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


class _Unsupported(Exception):
    pass


def _check(status: int) -> None:
    if status != 0:
        raise _Unsupported(f"cuBLASLt status {status}")


@functools.cache
def _library() -> Any:
    major = (torch.version.cuda or "0").partition(".")[0]
    try:
        return ctypes.CDLL(f"libcublasLt.so.{major}")
    except OSError:
        return None


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        _check(_library().cublasLtCreate(ctypes.byref(handle)))
    return handle


class _Plan:
    """Descriptions of one shape of product and the algorithm for it. Column by column, as cuBLAS
    counts: out^T (N, rows) = weight (K, N)^T @ input^T (K, rows), all three densely packed.
    """

    def __init__(self, device: int, key: tuple[Any, ...]) -> None:
        dtype, count, rows, out_features, in_features, weight_step, bias_step = key
        self._lib, self._handle = _library(), _handle(device)
        kind = _CUDA_TYPES[dtype]
        self._operation = ctypes.c_void_p()
        _check(
            self._lib.cublasLtMatmulDescCreate(
                ctypes.byref(self._operation), _COMPUTE_32F, _CUDA_R_32F
            )
        )
        self._set(_TRANSPOSE_A, ctypes.c_int32(_OP_T))
        self._has_bias = bias_step is not None
        if bias_step is not None:
            self._set(_EPILOGUE, ctypes.c_uint32(_EPILOGUE_BIAS))
            self._set(_BIAS_BATCH_STRIDE, ctypes.c_int64(bias_step))
            self._set(_BIAS_POINTER, ctypes.c_void_p(256))  # its alignment counts
        self._weight = self._layout(kind, in_features, out_features, count, weight_step)
        self._input = self._layout(kind, in_features, rows, count, 0)
        self._out = self._layout(kind, out_features, rows, count, rows * out_features)
        self._algorithm = self._choose()

    def _set(self, attribute: int, value: Any) -> None:
        set_attribute = self._lib.cublasLtMatmulDescSetAttribute
        size = ctypes.c_size_t(ctypes.sizeof(value))
        _check(set_attribute(self._operation, attribute, ctypes.byref(value), size))

    def _layout(self, kind: int, rows: int, columns: int, count: int, step: int) -> Any:
        layout = ctypes.c_void_p()
        _check(
            self._lib.cublasLtMatrixLayoutCreate(
                ctypes.byref(layout),
                kind,
                ctypes.c_uint64(rows),
                ctypes.c_uint64(columns),
                ctypes.c_int64(rows),
            )
        )
        for attribute, value in (
            (_BATCH_COUNT, ctypes.c_int32(count)),
            (_BATCH_STRIDE, ctypes.c_int64(step)),
        ):
            size = ctypes.c_size_t(ctypes.sizeof(value))
            set_attribute = self._lib.cublasLtMatrixLayoutSetAttribute
            _check(set_attribute(layout, attribute, ctypes.byref(value), size))
        return layout

    def _choose(self) -> Any:
        preference, found = ctypes.c_void_p(), ctypes.c_int()
        _check(self._lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
        for attribute, value in (
            (_MAX_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES)),
            (_REDUCTIONS, ctypes.c_uint32(_REDUCTION_IN_FLOAT)),
        ):
            size = ctypes.c_size_t(ctypes.sizeof(value))
            set_attribute = self._lib.cublasLtMatmulPreferenceSetAttribute
            _check(set_attribute(preference, attribute, ctypes.byref(value), size))
        result = _Heuristic()
        status = self._lib.cublasLtMatmulAlgoGetHeuristic(
            self._handle,
            self._operation,
            self._weight,
            self._input,
            self._out,
            self._out,
            preference,
            1,
            ctypes.byref(result),
            ctypes.byref(found),
        )
        self._lib.cublasLtMatmulPreferenceDestroy(preference)
        _check(status)
        if found.value == 0 or result.state != 0:
            raise _Unsupported("cuBLASLt has no algorithm")
        return result.algorithm

    def run(self, out: Tensor, flat: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if bias is not None:
            self._set(_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=flat.device)
        one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        stream = torch._C._cuda_getCurrentRawStream(flat.device.index)
        pointer = ctypes.c_void_p
        _check(
            self._lib.cublasLtMatmul(
                self._handle,
                self._operation,
                ctypes.byref(one),
                pointer(weight.data_ptr()),
                self._weight,
                pointer(flat.data_ptr()),
                self._input,
                ctypes.byref(zero),
                pointer(out.data_ptr()),
                self._out,
                pointer(out.data_ptr()),
                self._out,
                ctypes.byref(self._algorithm),
                pointer(workspace.data_ptr()),
                ctypes.c_size_t(WORKSPACE_BYTES),
                pointer(stream),
            )
        )

    def __del__(self) -> None:
        # Nothing here may be bound yet, if making it failed.
        operation = getattr(self, "_operation", None)
        if operation is not None and operation.value:
            self._lib.cublasLtMatmulDescDestroy(operation)
        for name in ("_weight", "_input", "_out"):
            layout = getattr(self, name, None)
            if layout is not None:
                self._lib.cublasLtMatrixLayoutDestroy(layout)


_lock = threading.Lock()  # a plan's bias pointer is set before each launch
_plans: dict[tuple[Any, ...], _Plan | None] = {}  # None: there is no such kernel


def _step(tensors: Sequence[Tensor]) -> int | None:
    """How many elements each tensor lies behind the one before it, or None."""
    addresses = [tensor.data_ptr() for tensor in tensors]
    steps = {after - before for before, after in zip(addresses, addresses[1:], strict=False)}
    step = steps.pop()
    if steps or step <= 0 or step % 16 or addresses[0] % 16:
        return None
    return step // tensors[0].itemsize


def _order(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Any:
    """The weights' places as they lie in memory, with the steps between them and between their
    biases (None: no biases); None where the steps are not equal.
    """
    order = sorted(range(len(weights)), key=lambda i: weights[i].data_ptr())
    weight_step, bias_step = _step([weights[i] for i in order]), None
    if weight_step is None:
        return None
    given = [bias for bias in (biases[i] for i in order) if bias is not None]
    if given:
        bias_step = _step(given) if len(given) == len(order) else None
        if bias_step is None:
            return None
    return order, weight_step, bias_step


def in_one_launch(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether `stacked_linear` would read all weights by one launch."""
    return _order(weights, biases) is not None


def stacked_linear(
    flat: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...] | None:
    """`flat @ weight.T + bias` for every weight, (rows, out_features) each, in one launch, or in
    two where only a pair of three lies so that one launch can read it; None where that can't be.
    All weights (out, in) of one shape.
    """
    if flat.dtype not in _CUDA_TYPES or flat.device.type != "cuda" or _library() is None:
        return None
    if flat.shape[1] % 8 or weights[0].shape[0] % 8 or flat.data_ptr() % 16:
        return None
    placed = _order(weights, biases)
    if placed is not None:
        return _launch(flat, weights, biases, placed)
    if len(weights) != 3:
        return None
    for alone in range(3):
        pair = [i for i in range(3) if i != alone]
        pair_weights = tuple(weights[i] for i in pair)
        pair_biases = tuple(biases[i] for i in pair)
        placed = _order(pair_weights, pair_biases)
        products = placed and _launch(flat, pair_weights, pair_biases, placed)
        if products:
            single = F.linear(flat, weights[alone], biases[alone])
            return tuple(single if i == alone else products[pair.index(i)] for i in range(3))
    return None


def _launch(
    flat: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], placed: Any
) -> tuple[Tensor, ...] | None:
    order, weight_step, bias_step = placed
    rows, in_features = flat.shape
    out_features = weights[0].shape[0]
    shape = (len(weights), rows, out_features, in_features, weight_step, bias_step)
    device = flat.device.index
    key = (device, flat.dtype, *shape)
    out = flat.new_empty(len(weights), rows, out_features)
    with _lock, torch.cuda.device(device):
        try:
            if key not in _plans:
                if len(_plans) >= MAX_PLANS:
                    _plans.clear()
                _plans[key] = None
                _plans[key] = _Plan(device, (flat.dtype, *shape))
            plan = _plans[key]
            if plan is None:
                return None
            plan.run(out, flat, weights[order[0]], biases[order[0]])
        except _Unsupported:
            _plans[key] = None
            return None
    products: list[Any] = [None] * len(weights)
    for place, i in enumerate(order):
        products[i] = out[place]
    return tuple(products)
