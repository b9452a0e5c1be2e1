"""layernorm: row sizes, missing parameters, outputs in place, values hard on the statistics."""

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

SHAPES = [(1,), (1, 1, 64), (3, 7, 1023), (8, 512, 768), (5, 1), (2, 4097), (1, 16384)]
SIZES = [2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1024]


@pytest.mark.parametrize("shape", SHAPES)
def test_layernorm(device, dtype, shape):
    given = inputs.layernorm_inputs(shape, dtype, device)
    out = ops.layernorm(*given, eps=1e-5)
    assert_as_accurate_as_torch(out, reference.layernorm, *given, eps=1e-5)


@pytest.mark.sanitize
@pytest.mark.parametrize("hidden_size", SIZES)
def test_layernorm_hidden_sizes(device, dtype, hidden_size):
    given = inputs.layernorm_inputs((5, hidden_size), dtype, device)
    assert_as_accurate_as_torch(ops.layernorm(*given), reference.layernorm, *given)


@pytest.mark.parametrize("hidden_size", [33, 768])
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_layernorm_without_parameters(device, dtype, hidden_size, with_weight, with_bias):
    x, weight, bias = inputs.layernorm_inputs((4, hidden_size), dtype, device)
    given = (x, weight if with_weight else None, bias if with_bias else None)
    assert_as_accurate_as_torch(ops.layernorm(*given), reference.layernorm, *given)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
def test_layernorm_eps_and_magnitude(device, dtype, eps, std):
    x, weight, bias = inputs.layernorm_inputs((4, 768), dtype, device)
    given = (x * std, weight, bias)
    assert_as_accurate_as_torch(ops.layernorm(*given, eps), reference.layernorm, *given, eps)


@pytest.mark.parametrize("mean", [10.0, 300.0])
def test_layernorm_far_from_zero(device, dtype, mean):
    """The variance is taken about the mean: E[x^2] - E[x]^2 would lose it here."""
    x, weight, bias = inputs.layernorm_inputs((16, 768), dtype, device)
    given = (x + mean, weight, bias)
    assert_as_accurate_as_torch(ops.layernorm(*given), reference.layernorm, *given)


@pytest.mark.parametrize("value", [0.0, 2.0, -512.0])
def test_layernorm_of_a_constant_is_the_bias(device, dtype, value):
    x, weight, bias = inputs.layernorm_inputs((3, 64), dtype, device)
    out = ops.layernorm(torch.full_like(x, value), weight, bias, eps=1e-12)
    assert torch.equal(out, bias.expand(3, 64))


def test_layernorm_of_the_largest_halves(device):
    """Sums and squares leave the range of fp16; the result is well inside it."""
    x, weight, bias = inputs.layernorm_inputs((3, 768), torch.float16, device)
    given = (x.sign() * 65504, weight, bias)
    assert_as_accurate_as_torch(ops.layernorm(*given), reference.layernorm, *given)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_layernorm_keeps_a_nan_to_its_row(device, dtype, value):
    x, weight, bias = inputs.layernorm_inputs((5, 33), dtype, device)
    x[2, 17] = value
    out = ops.layernorm(x, weight, bias)
    assert out[2].isnan().all()
    assert_as_accurate_as_torch(out, reference.layernorm, x, weight, bias)


@pytest.mark.parametrize("shape", [(3, 7), (5, 768), (2, 3, 1023)])
def test_layernorm_out(device, dtype, shape):
    given = inputs.layernorm_inputs(shape, dtype, device)
    expected = ops.layernorm(*given)
    out = torch.full_like(given[0], float("nan"))
    assert ops.layernorm(*given, out=out) is out
    assert torch.equal(out, expected)
    assert ops.layernorm(*given, out=given[0]) is given[0]
    assert torch.equal(given[0], expected)


def test_layernorm_writes_nothing_else(device, dtype):
    x, weight, bias = inputs.layernorm_inputs((3, 33), dtype, device)
    buffer = torch.full((5, 33), 7.0, dtype=dtype, device=device)
    ops.layernorm(x, weight, bias, out=buffer[1:4])
    assert (buffer[[0, 4]] == 7).all() and not (buffer[1:4] == 7).any()


@pytest.mark.parametrize("hidden_size", [7, 64, 768])
def test_layernorm_misaligned(device, dtype, hidden_size):
    given = inputs.layernorm_inputs((3, hidden_size), dtype, device)
    expected = ops.layernorm(*given)
    out = inputs.misaligned(torch.empty_like(given[0]))
    ops.layernorm(*map(inputs.misaligned, given), out=out)
    torch.testing.assert_close(out, expected)
    assert_as_accurate_as_torch(out, reference.layernorm, *given)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_layernorm_of_nothing(device, dtype, shape):
    out = ops.layernorm(*inputs.layernorm_inputs(shape, dtype, device))
    assert out.shape == shape and out.dtype == dtype


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_states": [1.0]}, TypeError, "hidden_states must be a torch.Tensor"),
        ({"hidden_states": torch.zeros(2, 8).double()}, TypeError, "hidden_states must be float32"),
        ({"hidden_states": torch.zeros(2, 8).int()}, TypeError, "hidden_states must be float32"),
        (
            {"hidden_states": torch.zeros(2, 8, device="meta")},
            ValueError,
            "hidden_states must be on a CPU",
        ),
        (
            {"hidden_states": torch.zeros(8, 2).t()},
            ValueError,
            r"hidden_states must be contiguous.*contiguous\(\)",
        ),
        (
            {"hidden_states": torch.tensor(1.0)},
            ValueError,
            "hidden_states must have at least one dimension",
        ),
        (
            {"hidden_states": torch.zeros(2, 0)},
            ValueError,
            "hidden_states must have at least one dimension",
        ),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \(8,\), got \(4,\)"),
        (
            {"weight": torch.zeros(8).half()},
            TypeError,
            "weight must have dtype torch.float32, got torch.float16",
        ),
        ({"weight": torch.zeros(16)[::2]}, ValueError, "weight must be contiguous"),
        ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor"),
        ({"weight": torch.zeros(8, device="meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"bias": torch.zeros(8, 1)}, ValueError, r"bias must have shape \(8,\)"),
        ({"bias": torch.zeros(8).bfloat16()}, TypeError, "bias must have dtype"),
        ({"out": torch.zeros(3, 8)}, ValueError, r"out must have shape \(2, 8\)"),
        ({"out": torch.zeros(2, 8).half()}, TypeError, "out must have dtype"),
        ({"out": torch.zeros(8, 2).t()}, ValueError, "out must be contiguous"),
        ({"out": "x"}, TypeError, "out must be a torch.Tensor"),
    ],
)
def test_layernorm_refuses(change, error, message):
    given = {"hidden_states": torch.zeros(2, 8), "weight": None, "bias": None} | change
    with pytest.raises(error, match=message):
        ops.layernorm(**given)


def test_layernorm_refuses_cuda_without_a_cuda_build(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    from eet_patch.ops import checks

    monkeypatch.setattr(checks, "HAS_CUDA", False)
    with pytest.raises(
        ValueError, match="hidden_states is on cuda:0, but eet_patch was built without"
    ):
        ops.layernorm(torch.zeros(2, 8, device="cuda"), None, None)
