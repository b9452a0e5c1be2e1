"""The one error bound: at most 1.5 times as far from a float64 run as PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAX_ERROR_RATIO = 1.5
# What fp32 rounding in another order may cost where PyTorch's own result happens to be exact.
ERROR_SLACK = 1e-6


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error `|out - expected| / |expected|`, computed in float64.

    Elements where both are the same infinity, or both NaN, count as equal; any other NaN or
    infinity makes the error infinite. If `expected` is all zeros, the error is 0 for an equal `out`
    and infinite for any other.
    """
    if out.shape != expected.shape:
        raise ValueError(f"out must have shape {tuple(expected.shape)}, got {tuple(out.shape)}")
    out, expected = out.detach().double(), expected.detach().double()
    same = (out == expected) | (out.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, out - expected).norm().item()
    size = torch.where(expected.isfinite(), expected, 0.0).norm().item()
    if difference == 0:
        return 0.0
    error = difference / size if size else float("inf")
    return error if error == error else float("inf")


def upcast(value: Any) -> Any:
    """Floating tensors in float64, also inside tuples, lists and dicts; others are copied.

    The lowest finite value of a dtype, which masks use for "excluded", becomes the lowest of
    float64.
    """
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        lowest = torch.finfo(value.dtype).min
        wide = value.detach().to(torch.float64)
        return wide.masked_fill_(value == lowest, torch.finfo(torch.float64).min)
    return _map_tensors(upcast, value)


def copied(value: Any) -> Any:
    """Tensors copied, also in tuples, lists and dicts: a reference may write into its caches."""
    return _map_tensors(copied, value)


def _map_tensors(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: function(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, tuple | list):
        return type(value)(map(function, value))
    return value


def assert_as_accurate_as_torch(
    out: Tensor | tuple[Tensor, ...] | list[Tensor],
    reference_fn: Callable[..., Any],
    /,
    *inputs: Any,
    **kwargs: Any,
) -> None:
    """Assert that `out` is as near to the truth as PyTorch is in the same dtype.

    The truth is `reference_fn` on the inputs in float64; PyTorch's own error is that of
    `reference_fn` on the inputs as they are. `out` may err 1.5 times as much, plus 1e-6, in the
    relative Frobenius norm. A NaN or infinity in `out` passes only where the float64 reference has
    the same.

    Args:
        out: what is tested: a tensor, or several, each compared with its own counterpart.
        reference_fn: returns what `out` should be. It runs twice, on copies: in float64 and in the
            inputs' dtypes.
        inputs, kwargs: its arguments; tensors in tuples, lists and dicts are upcast too.
    Raises:
        AssertionError: with both errors, when the bound is broken or a shape or dtype differs.
    """
    with torch.no_grad():
        truth = reference_fn(*upcast(inputs), **upcast(kwargs))
        own = reference_fn(*copied(inputs), **copied(kwargs))
    if isinstance(out, Tensor):
        _assert_within_bound(out, own, truth, "out")
        return
    assert len(out) == len(truth), f"{len(out)} outputs, but the reference has {len(truth)}"
    for index, (item, own_item, true_item) in enumerate(zip(out, own, truth, strict=True)):
        _assert_within_bound(item, own_item, true_item, f"out[{index}]")


def _assert_within_bound(out: Tensor, own: Tensor, truth: Tensor, name: str) -> None:
    assert out.shape == truth.shape, (
        f"{name} has shape {tuple(out.shape)}, the reference {tuple(truth.shape)}"
    )
    assert out.dtype == own.dtype, f"{name} has dtype {out.dtype}, the reference {own.dtype}"
    assert out.device == own.device, f"{name} is on {out.device}, the reference on {own.device}"
    truth = truth.double()
    wide = out.detach().double()
    wrong = ~wide.isfinite() & ~((wide == truth) | (wide.isnan() & truth.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name} is {wide[at].item()} at {at} and not finite at {int(wrong.sum())} of "
            f"{wide.numel()} places where the float64 reference is (there: {truth[at].item():.6g})"
        )
    # Where PyTorch itself overflows it sets no standard.
    overflowed = ~own.isfinite() & truth.isfinite()
    error = relative_error(out, truth)
    own_error = relative_error(torch.where(overflowed, truth, own.double()), truth)
    bound = MAX_ERROR_RATIO * own_error + ERROR_SLACK
    if error > bound:
        difference = torch.where(wide == truth, 0.0, wide - truth).abs().nan_to_num(float("inf"))
        worst = tuple(
            int(i) for i in torch.unravel_index(difference.argmax().cpu(), difference.shape)
        )
        raise AssertionError(
            f"{name} {tuple(out.shape)} {out.dtype} on {out.device}: relative error {error:.3e} "
            f"against float64, PyTorch's own {own_error:.3e}, bound {bound:.3e} "
            f"({MAX_ERROR_RATIO} * own + {ERROR_SLACK}); worst at {worst}: "
            f"{wide[worst].item():.8g} instead of "
            f"{truth[worst].item():.8g}, PyTorch {own[worst].item():.8g}"
        )
