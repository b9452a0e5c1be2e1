"""linear: both weight layouts, every option, and the row counts where torch takes over."""

import itertools

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu", None]
layouts = pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])


def check(**given):
    assert_as_accurate_as_torch(ops.linear(**given), reference.linear, **given)


# least, odd, real; the last is 1 token of 8 sequences through GPT-2's feed-forward
@layouts
@pytest.mark.parametrize(
    ("shape", "out_features"),
    [
        ((1,), 1),
        ((1, 1, 1), 7),
        ((3, 7, 33), 65),
        ((1, 1023), 5),
        ((5, 127), 129),
        ((8, 1, 768), 3072),
    ],
)
def test_linear(device, dtype, shape, out_features, weight_layout):
    check(**inputs.linear_inputs(shape, out_features, dtype, device, weight_layout=weight_layout))


@layouts
@pytest.mark.parametrize("rows", [4, 16, 40])
@pytest.mark.parametrize("in_features", [520, 1608, 5128])
def test_linear_over_parts_of_the_input(device, rows, in_features, weight_layout):
    """On CUDA a block keeps a few hundred columns of the input at a time."""
    given = inputs.linear_inputs(
        (rows, in_features), 200, torch.float16, device, weight_layout=weight_layout, norm=True
    )
    check(**given, activation="gelu_tanh")


@pytest.mark.parametrize("rows", [8, 16])
def test_linear_with_more_tiles_than_blocks(device, rows):
    """A block goes on to another tile, and over the parts of its input again."""
    given = inputs.linear_inputs(
        (rows, 1608), 64 * 400 + 8, torch.float16, device, weight_layout="in_out", norm=True
    )
    check(**given)


@layouts
@pytest.mark.parametrize("rows", [4, 16, 30])
@pytest.mark.parametrize(("in_features", "out_features"), [(2560, 10240), (3072, 9216)])
def test_linear_with_two_tiles_a_cluster(device, rows, in_features, out_features, weight_layout):
    """Sizes at which, on 132 multiprocessors, clusters of three blocks walk two tiles each."""
    given = inputs.linear_inputs(
        (rows, in_features),
        out_features,
        torch.float16,
        device,
        weight_layout=weight_layout,
        norm=True,
    )
    check(**given, activation="gelu_tanh")


@layouts
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", ["norm", "no norm bias", "no norm"])
@pytest.mark.parametrize("rows", [3, 70])
def test_linear_options(device, dtype, rows, norm, residual, bias, weight_layout):
    given = inputs.linear_inputs(
        (rows, 48), 72, dtype, device,
        weight_layout=weight_layout, bias=bias, residual=residual, norm=norm != "no norm",
    )  # fmt: skip
    if norm == "no norm bias":
        given["norm_bias"] = None
    for activation in ACTIVATIONS:
        check(**given, activation=activation, norm_eps=0.1)


@pytest.mark.sanitize
@layouts
@pytest.mark.parametrize("activation", ["gelu", None])
def test_linear_sizes(device, dtype, activation, weight_layout):
    sizes = [
        (1, 1, 1),
        (2, 7, 3),
        (3, 8, 16),
        (4, 33, 31),
        (9, 64, 65),
        (17, 129, 40),
        (65, 72, 24),
    ]
    for rows, in_features, out_features in sizes:
        given = inputs.linear_inputs(
            (rows, in_features), out_features, dtype, device,
            weight_layout=weight_layout, residual=True, norm=True,
        )  # fmt: skip
        check(**given, activation=activation)


@layouts
@pytest.mark.parametrize("in_features", [64, 100])
def test_linear_every_number_of_rows(device, dtype, in_features, weight_layout):
    """Across MAX_SKINNY_ROWS (64), and across 8, after which torch multiplies halves on a CPU."""
    given = inputs.linear_inputs(
        (70, in_features), 96, dtype, device,
        weight_layout=weight_layout, residual=True, norm=True,
    )  # fmt: skip
    for rows in range(1, 71):
        some = given | {name: given[name][:rows] for name in ("hidden_states", "residual")}
        check(**some, activation="gelu")


@layouts
def test_linear_every_small_size(device, dtype, weight_layout):
    """Tails of every length in both dimensions. Never one dot product alone: where it cancels, its
    relative error is a matter of luck.
    """
    for rows, size in itertools.product((1, 6), range(1, 36)):
        check(**inputs.linear_inputs((rows, size), 20, dtype, device, weight_layout=weight_layout))
        if rows * size >= 4:
            check(
                **inputs.linear_inputs((rows, 40), size, dtype, device, weight_layout=weight_layout)
            )


@pytest.mark.parametrize("rows", [1, 6, 64, 65])
@layouts
def test_linear_large(device, dtype, rows, weight_layout):
    check(**inputs.linear_inputs((rows, 1024), 1536, dtype, device, weight_layout=weight_layout))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 64])
@layouts
def test_linear_heavy(device, dtype, rows, weight_layout):
    given = inputs.linear_inputs((rows, 4096), 1536, dtype, device, weight_layout=weight_layout)
    check(**given)


@layouts
@pytest.mark.parametrize("rows", [1, 9, 65])
def test_linear_misaligned(device, dtype, rows, weight_layout):
    given = inputs.linear_inputs(
        (rows, 64), 96, dtype, device, weight_layout=weight_layout, residual=True, norm=True
    )
    check(**inputs.all_misaligned(given))


@layouts
@pytest.mark.parametrize("rows", [2, 70])
def test_linear_keeps_a_nan_to_its_row(device, dtype, rows, weight_layout):
    given = inputs.linear_inputs((rows, 40), 24, dtype, device, weight_layout=weight_layout)
    given["hidden_states"][1, 39] = float("nan")
    check(**given)
    given["hidden_states"][1, 39] = 1.0
    given["weight"].view(-1)[0] = float("inf")  # one column of every row
    given["hidden_states"][:, 0].abs_().add_(1)
    check(**given)


@pytest.mark.parametrize("rows", [3, 70])
@layouts
def test_linear_leaves_its_inputs(device, dtype, rows, weight_layout):
    given = inputs.linear_inputs(
        (rows, 40), 24, dtype, device, weight_layout=weight_layout, residual=True, norm=True
    )
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    ops.linear(**given, activation="relu")
    assert all(torch.equal(given[name], before[name]) for name in before)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_linear_of_nothing(device, dtype, shape):
    out = ops.linear(**inputs.linear_inputs(shape, 5, dtype, device))
    assert out.shape == (*shape[:-1], 5) and out.dtype == dtype
    assert ops.linear(**inputs.linear_inputs((3, 8), 0, dtype, device)).shape == (3, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": torch.zeros(2, 8).double()}, TypeError, "hidden_states must be float32"),
        ({"hidden_states": None}, TypeError, "hidden_states must be a torch.Tensor, got NoneType"),
        (
            {"hidden_states": torch.zeros(2, 16)[:, ::2]},
            ValueError,
            "hidden_states must be contiguous",
        ),
        (
            {"hidden_states": torch.tensor(1.0)},
            ValueError,
            "hidden_states must have a last dimension",
        ),
        (
            {"hidden_states": torch.zeros(2, 0)},
            ValueError,
            "hidden_states must have a last dimension",
        ),
        (
            {"hidden_states": torch.zeros(2, 7)},
            ValueError,
            r"weight must have shape \(5, 7\), got \(5, 8\)",
        ),
        ({"weight": torch.zeros(5, 8).half()}, TypeError, "weight must have dtype torch.float32"),
        ({"weight": torch.zeros(40)}, ValueError, "weight must have 2 dimensions"),
        ({"weight": torch.zeros(8, 5).t()}, ValueError, "weight must be contiguous"),
        ({"weight": torch.zeros(5, 8, device="meta")}, ValueError, "weight must be on cpu"),
        ({"weight_layout": "in_out"}, ValueError, r"weight must have shape \(8, 8\), got \(5, 8\)"),
        (
            {"weight_layout": "oi"},
            ValueError,
            "weight_layout must be one of 'out_in', 'in_out', got 'oi'",
        ),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \(5,\)"),
        ({"bias": torch.zeros(5).half()}, TypeError, "bias must have dtype"),
        ({"activation": "swish"}, ValueError, "activation must be one of"),
        ({"residual": torch.zeros(2, 8)}, ValueError, r"residual must have shape \(2, 5\)"),
        ({"residual": torch.zeros(2, 5).half()}, TypeError, "residual must have dtype"),
        ({"residual": torch.zeros(5, 2).t()}, ValueError, "residual must be contiguous"),
        ({"norm_weight": torch.zeros(5)}, ValueError, r"norm_weight must have shape \(8,\)"),
        (
            {"norm_weight": torch.zeros(8), "norm_bias": torch.zeros(5)},
            ValueError,
            "norm_bias must have shape",
        ),
    ],
)
def test_linear_refuses(changes, error, message):
    given = inputs.linear_inputs((2, 8), 5, torch.float32, "cpu") | changes
    with pytest.raises(error, match=message):
        ops.linear(**given)
