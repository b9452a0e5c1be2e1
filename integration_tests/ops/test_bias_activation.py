"""bias_activation: every activation over its whole range, in place and not."""

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu", None]
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


def check(*given):
    assert_as_accurate_as_torch(ops.bias_activation(*given), reference.bias_activation, *given)


@activations
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 7, 1023), (8, 64, 3072), (2, 1), (1, 4097)])
def test_bias_activation(device, dtype, shape, with_bias, activation):
    x = inputs.randn(*shape, dtype=dtype, device=device, std=2)
    bias = inputs.randn(shape[-1], dtype=dtype, device=device) if with_bias else None
    check(x, bias, activation)


@pytest.mark.sanitize
@activations
def test_bias_activation_sizes(device, dtype, activation):
    for size in (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 257):
        x = inputs.randn(3, size, dtype=dtype, device=device, std=2)
        check(x, inputs.randn(size, dtype=dtype, device=device), activation)


@activations
@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 0.5, 4.0, 7.0, 20.0, 1e3, 6e4])
def test_bias_activation_at_every_magnitude(device, dtype, magnitude, activation):
    """Each magnitude by itself, since the norm of a mixture sees the largest alone."""
    x = torch.linspace(-magnitude, magnitude, 4001).to(device=device, dtype=dtype)
    check(x, None, activation)


@activations
def test_bias_activation_tail(device, activation):
    """Between -6 and -4 gelu and silu are small differences of near-equal numbers."""
    x = torch.linspace(-6, -4, 2001, device=device)
    check(x, None, activation)


@activations
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, -3e38])
def test_bias_activation_of_special_values(device, activation, value):
    x = torch.randn(3, 33, device=device)
    x[1, 5] = value
    x[2, 32] = value
    check(x, None, activation)
    check(x, torch.randn(33, device=device), activation)


@pytest.mark.parametrize("activation", ["relu", None])
def test_bias_activation_of_minus_infinity(device, dtype, activation):
    x = inputs.randn(3, 33, dtype=dtype, device=device)
    x[1, 5] = float("-inf")
    check(x, None, activation)


@activations
def test_bias_activation_out(device, dtype, activation):
    x = inputs.randn(3, 5, 129, dtype=dtype, device=device)
    bias = inputs.randn(129, dtype=dtype, device=device)
    expected = ops.bias_activation(x, bias, activation)
    out = torch.full_like(x, float("nan"))
    assert ops.bias_activation(x, bias, activation, out=out) is out
    assert torch.equal(out, expected)
    assert ops.bias_activation(x, bias, activation, out=x) is x
    assert torch.equal(x, expected)


def test_bias_activation_default_is_gelu(device, dtype):
    x = inputs.randn(3, 64, dtype=dtype, device=device)
    assert torch.equal(ops.bias_activation(x, None), ops.bias_activation(x, None, "gelu"))


@pytest.mark.parametrize("size", [7, 64, 1024])
def test_bias_activation_misaligned(device, dtype, size):
    x = inputs.misaligned(inputs.randn(3, size, dtype=dtype, device=device))
    check(x, inputs.misaligned(inputs.randn(size, dtype=dtype, device=device)), "gelu")


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_bias_activation_of_nothing(device, dtype, shape):
    x = inputs.randn(*shape, dtype=dtype, device=device)
    assert ops.bias_activation(x, None).shape == shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": torch.zeros(2, 8).double()}, TypeError, "hidden_states must be float32"),
        ({"hidden_states": torch.zeros(8, 2).t()}, ValueError, "hidden_states must be contiguous"),
        (
            {"hidden_states": torch.tensor(1.0)},
            ValueError,
            "hidden_states must have at least one dimension",
        ),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must have shape \(8,\)"),
        ({"bias": torch.zeros(8).half()}, TypeError, "bias must have dtype"),
        ({"bias": torch.zeros(16)[::2]}, ValueError, "bias must be contiguous"),
        (
            {"activation": "tanh"},
            ValueError,
            "activation must be one of None, 'gelu', .*got 'tanh'",
        ),
        ({"activation": ""}, ValueError, "activation must be one of"),
        ({"out": torch.zeros(8)}, ValueError, r"out must have shape \(2, 8\)"),
        ({"out": torch.zeros(2, 8).half()}, TypeError, "out must have dtype"),
        ({"out": torch.zeros(8, 2).t()}, ValueError, "out must be contiguous"),
    ],
)
def test_bias_activation_refuses(change, error, message):
    given = {"hidden_states": torch.zeros(2, 8), "bias": torch.zeros(8)} | change
    with pytest.raises(error, match=message):
        ops.bias_activation(**given)
