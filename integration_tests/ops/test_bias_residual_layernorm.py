"""bias_residual_layernorm: whatever may be missing, and whatever may be written in place."""

import itertools

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

SHAPES = [(1,), (1, 1, 64), (3, 7, 1023), (8, 128, 768), (2, 4097)]


def check(out=None, sum_out=None, **given):
    expected = {name: None if t is None else t.clone() for name, t in given.items()}
    written = ops.bias_residual_layernorm(**given, out=out, sum_out=sum_out)
    assert out is None or written is out
    assert_as_accurate_as_torch(written, reference.bias_residual_layernorm, **expected)
    if sum_out is not None:
        terms = [expected[name] for name in ("hidden_states", "bias", "residual")]
        assert_as_accurate_as_torch(sum_out, reference.residual_sum, *terms)


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_residual_layernorm(device, dtype, shape):
    check(**inputs.bias_residual_layernorm_inputs(shape, dtype, device))


@pytest.mark.sanitize
@pytest.mark.parametrize("hidden_size", [7, 48])
@pytest.mark.parametrize("with_sum", [True, False])
def test_bias_residual_layernorm_without_some(device, dtype, hidden_size, with_sum):
    given = inputs.bias_residual_layernorm_inputs((4, hidden_size), dtype, device)
    optional = ("bias", "residual", "weight", "norm_bias")
    for kept in itertools.product([True, False], repeat=len(optional)):
        some = given | {name: None for name, keep in zip(optional, kept, strict=True) if not keep}
        check(**some, sum_out=torch.empty_like(given["hidden_states"]) if with_sum else None)


@pytest.mark.parametrize("shape", [(3, 7), (5, 768), (2, 3, 1023)])
@pytest.mark.parametrize(
    ("out", "sum_out"),
    [
        ("hidden_states", None),
        ("residual", None),
        (None, "hidden_states"),
        (None, "residual"),
        ("hidden_states", "residual"),
        ("residual", "hidden_states"),
    ],
)
def test_bias_residual_layernorm_in_place(device, dtype, shape, out, sum_out):
    given = inputs.bias_residual_layernorm_inputs(shape, dtype, device)
    check(**given, out=given.get(out), sum_out=given.get(sum_out))


def test_bias_residual_layernorm_leaves_its_inputs(device, dtype):
    given = inputs.bias_residual_layernorm_inputs((3, 65), dtype, device)
    before = {name: t.clone() for name, t in given.items()}
    sum_out = torch.empty_like(given["residual"])
    ops.bias_residual_layernorm(**given, sum_out=sum_out)
    assert all(torch.equal(given[name], before[name]) for name in given)


@pytest.mark.parametrize("eps", [1e-12, 1.0])
def test_bias_residual_layernorm_eps(device, dtype, eps):
    given = inputs.bias_residual_layernorm_inputs((3, 65), dtype, device)
    out = ops.bias_residual_layernorm(**given, eps=eps)
    assert_as_accurate_as_torch(out, reference.bias_residual_layernorm, **given, eps=eps)


@pytest.mark.parametrize("hidden_size", [7, 64, 768])
def test_bias_residual_layernorm_misaligned(device, dtype, hidden_size):
    given = inputs.bias_residual_layernorm_inputs((3, hidden_size), dtype, device)
    given = inputs.all_misaligned(given)
    buffers = (inputs.misaligned(torch.zeros_like(given["residual"])) for _ in range(2))
    check(**given, out=next(buffers), sum_out=next(buffers))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_bias_residual_layernorm_of_nothing(device, dtype, shape):
    given = inputs.bias_residual_layernorm_inputs(shape, dtype, device)
    assert ops.bias_residual_layernorm(**given).shape == shape


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("hidden_states", torch.zeros(2, 8).double(), TypeError, "hidden_states must be float32"),
        ("hidden_states", torch.zeros(8, 2).t(), ValueError, "hidden_states must be contiguous"),
        (
            "hidden_states",
            torch.tensor(1.0),
            ValueError,
            "hidden_states must have at least one dimension",
        ),
        ("bias", torch.zeros(7), ValueError, r"bias must have shape \(8,\)"),
        ("bias", torch.zeros(8).half(), TypeError, "bias must have dtype"),
        ("weight", torch.zeros(2, 8), ValueError, r"weight must have shape \(8,\)"),
        ("weight", torch.zeros(16)[::2], ValueError, "weight must be contiguous"),
        ("norm_bias", torch.zeros(9), ValueError, r"norm_bias must have shape \(8,\)"),
        ("norm_bias", torch.zeros(8, device="meta"), ValueError, "norm_bias must be on cpu"),
        ("residual", torch.zeros(1, 8), ValueError, r"residual must have shape \(2, 8\)"),
        ("residual", torch.zeros(2, 8).half(), TypeError, "residual must have dtype"),
        ("residual", torch.zeros(8, 2).t(), ValueError, "residual must be contiguous"),
        ("residual", 0, TypeError, "residual must be a torch.Tensor, got int"),
        ("sum_out", torch.zeros(16), ValueError, r"sum_out must have shape \(2, 8\)"),
        ("sum_out", torch.zeros(2, 8).half(), TypeError, "sum_out must have dtype"),
        ("sum_out", torch.zeros(8, 2).t(), ValueError, "sum_out must be contiguous"),
        ("out", torch.zeros(16), ValueError, r"out must have shape \(2, 8\)"),
        ("out", torch.zeros(2, 8).half(), TypeError, "out must have dtype"),
        ("out", torch.zeros(8, 2).t(), ValueError, "out must be contiguous"),
    ],
)
def test_bias_residual_layernorm_refuses(name, value, error, message):
    given = inputs.bias_residual_layernorm_inputs((2, 8), torch.float32, "cpu") | {name: value}
    with pytest.raises(error, match=message):
        ops.bias_residual_layernorm(**given)
