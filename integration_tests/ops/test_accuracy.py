"""The bound itself: what passes, what fails, and what the message says. Needs no kernel."""

import pytest
import torch

from eet_patch.testing import accuracy, assert_as_accurate_as_torch, relative_error


def double_it(x):
    return x * 3 / 1.5


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected.half(), expected) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_error(torch.empty(0), torch.empty(0)) == 0
    with pytest.raises(ValueError, match=r"out must have shape \(2,\)"):
        relative_error(torch.zeros(3), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_relative_error_of_non_finite_values(value):
    bad = torch.tensor([1.0, value])
    assert relative_error(bad, torch.tensor([1.0, 2.0])) == float("inf")
    assert relative_error(torch.tensor([1.0, 2.0]), bad) == float("inf")
    assert relative_error(bad, bad.clone()) == 0


def test_own_result_passes(dtype):
    x = torch.randn(100).to(dtype)
    assert_as_accurate_as_torch(double_it(x), double_it, x)
    assert_as_accurate_as_torch((x * 2).contiguous(), double_it, x=x)


def test_larger_error_fails_with_both_errors():
    x = torch.randn(100)
    with pytest.raises(AssertionError, match=r"relative error .*PyTorch's own .*bound .*worst at"):
        assert_as_accurate_as_torch(double_it(x) * (1 + 1e-5), double_it, x)


def test_rounding_once_more_fails():
    x = torch.randn(1000)
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_accurate_as_torch((x * 2).bfloat16().float(), double_it, x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_never_passes_unless_it_is_right(value):
    x = torch.randn(100)
    out = double_it(x)
    out[7] = value
    with pytest.raises(AssertionError, match=r"at \(7,\) and not finite at 1 of 100"):
        assert_as_accurate_as_torch(out, double_it, x)
    x[7] = value
    assert_as_accurate_as_torch(out, double_it, x)
    out[7] = 0
    with pytest.raises(AssertionError):
        assert_as_accurate_as_torch(out, double_it, x)


def test_an_overflow_of_torch_is_no_excuse():
    x = torch.tensor(
        [60000.0, 1.0], dtype=torch.float16
    )  # x * 3 is infinite in fp16, the result is not
    right = torch.tensor([60000.0, 1.0], dtype=torch.float16)

    def reference(x):
        return x * 3 / 3

    assert reference(x).isinf().any()
    assert_as_accurate_as_torch(right, reference, x)
    with pytest.raises(AssertionError, match="not finite"):
        assert_as_accurate_as_torch(reference(x), reference, x)


def test_shape_and_dtype_must_agree():
    x = torch.randn(4, 5)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate_as_torch(double_it(x).view(5, 4), double_it, x)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate_as_torch(double_it(x).double(), double_it, x)


def test_several_outputs():
    x = torch.randn(100)

    def reference(x):
        return x * 2, x * 3

    assert_as_accurate_as_torch((x * 2, x * 3), reference, x)
    with pytest.raises(AssertionError, match=r"out\[1\]"):
        assert_as_accurate_as_torch((x * 2, x * 3.1), reference, x)
    with pytest.raises(AssertionError, match="1 outputs"):
        assert_as_accurate_as_torch((x * 2,), reference, x)


def test_what_is_upcast():
    half, ids, keep = torch.ones(2).half(), torch.tensor([1]), torch.tensor([True])
    up = accuracy.upcast({"a": (half, [ids, keep]), "eps": 1e-5, "name": "pre", "none": None})
    assert up["a"][0].dtype == torch.float64
    assert up["a"][1][0].dtype == torch.int64 and up["a"][1][1].dtype == torch.bool
    assert (up["eps"], up["name"], up["none"]) == (1e-5, "pre", None)


def test_the_lowest_value_of_a_mask_stays_the_lowest(dtype):
    mask = torch.tensor([0.0, torch.finfo(dtype).min, float("-inf")], dtype=dtype)
    lowest = torch.finfo(torch.float64).min
    expected = torch.tensor([0.0, lowest, float("-inf")], dtype=torch.float64)
    assert torch.equal(accuracy.upcast(mask), expected)


def test_references_may_write_into_their_arguments():
    x = torch.ones(3)

    def reference(x):
        return x.add_(1)

    assert_as_accurate_as_torch(torch.full((3,), 2.0), reference, x)
    assert torch.equal(x, torch.ones(3))
