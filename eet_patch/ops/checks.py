"""Argument checks of the public ops: one line each, naming the argument, what was wanted and what
came.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from eet_patch.ops._extension import DTYPE_CODES, HAS_CUDA


def check_tensor(value: object, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_operand(tensor: Tensor, name: str) -> None:
    """A tensor that kernels read as rows: supported dtype and device, last dimension contiguous."""
    check_tensor(tensor, name)
    if tensor.dtype not in DTYPE_CODES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on a CPU or CUDA device, got {tensor.device}")
    if tensor.device.type == "cuda" and not HAS_CUDA:
        raise ValueError(
            f"{name} is on {tensor.device}, but eet_patch was built without CUDA; "
            "rebuild it where nvcc is found"
        )


def check_contiguous(tensor: Tensor, name: str) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, got strides {tuple(tensor.stride())} "
            f"for shape {tuple(tensor.shape)}; call .contiguous() on it"
        )


def check_shape(tensor: Tensor, shape: Sequence[int], name: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_dim(tensor: Tensor, dim: int, name: str) -> None:
    if tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, got shape {tuple(tensor.shape)}")


def check_same_dtype_and_device(tensor: Tensor, like: Tensor, name: str) -> None:
    check_tensor(tensor, name)
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have dtype {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")


def check_vector(tensor: Tensor | None, size: int, like: Tensor, name: str) -> None:
    """A contiguous (size,) parameter that may be left out."""
    if tensor is None:
        return
    check_same_dtype_and_device(tensor, like, name)
    check_shape(tensor, (size,), name)
    check_contiguous(tensor, name)


def check_index(tensor: Tensor, like: Tensor, name: str) -> None:
    check_tensor(tensor, name)
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    check_contiguous(tensor, name)


def check_choice(value: object, choices: Collection[object], name: str) -> None:
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")


def check_rows_contiguous(tensor: Tensor, name: str) -> None:
    if tensor.stride(1) != 1 and tensor.shape[1] > 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {tuple(tensor.stride())}")


def check_buffer(
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    like: Tensor,
    name: str,
    shape: tuple[int, ...] | None = None,
) -> None:
    check_tensor(tensor, name)
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {wanted}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {tensor.device}")
    if shape is not None:
        check_shape(tensor, shape, name)
        check_contiguous(tensor, name)


def check_positive(number: float, name: str) -> None:
    if not number > 0:
        raise ValueError(f"{name} must be above 0, got {number}")
