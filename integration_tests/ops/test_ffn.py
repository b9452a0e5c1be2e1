"""ffn: activations, norm placement, weight layouts, and the row counts where torch takes over."""

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu", None]
layouts = pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
norms = pytest.mark.parametrize("norm", ["pre", "post", None])


def check(**given):
    out = ops.ffn(**given)
    assert out.is_contiguous()
    assert_as_accurate_as_torch(out, reference.ffn, **given)
    return out


SHAPES = [((1, 4), 1), ((3, 7, 33), 65), ((2, 3, 1023), 5), ((3, 127), 129), ((2, 64, 768), 3072)]


@layouts
@pytest.mark.parametrize(("shape", "intermediate_size"), SHAPES)
def test_ffn(device, dtype, shape, intermediate_size, weight_layout):
    check(**inputs.ffn_inputs(shape, intermediate_size, dtype, device, weight_layout=weight_layout))


@layouts
@norms
@pytest.mark.parametrize("add_residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 70])
def test_ffn_options(device, dtype, rows, bias, add_residual, norm, weight_layout):
    given = inputs.ffn_inputs(
        (rows, 48), 100, dtype, device, weight_layout=weight_layout, norm=norm, bias=bias
    )
    for activation in ACTIVATIONS:
        check(**given, add_residual=add_residual, activation=activation, norm_eps=0.1)


@pytest.mark.sanitize
@norms
def test_ffn_small(device, dtype, norm):
    for rows, layout in ((1, "out_in"), (5, "in_out"), (33, "out_in"), (65, "in_out")):
        check(**inputs.ffn_inputs((rows, 42), 90, dtype, device, weight_layout=layout, norm=norm))


@pytest.mark.parametrize("missing", ["fc1_bias", "fc2_bias", "norm_bias"])
@pytest.mark.parametrize("rows", [2, 70])
def test_ffn_without_one_bias(device, dtype, rows, missing):
    check(**inputs.ffn_inputs((rows, 48), 100, dtype, device) | {missing: None})


@layouts
@norms
def test_ffn_every_number_of_rows(device, dtype, norm, weight_layout):
    given = inputs.ffn_inputs((70, 40), 72, dtype, device, weight_layout=weight_layout, norm=norm)
    for rows in [*range(1, 18), 24, 31, 32, 33, 48, 49, *range(62, 71)]:
        check(**given | {"hidden_states": given["hidden_states"][:rows]})


@pytest.mark.parametrize("intermediate_size", [1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 255, 257])
@pytest.mark.parametrize("rows", [1, 5])
def test_ffn_intermediate_sizes(device, dtype, rows, intermediate_size):
    for layout in ("out_in", "in_out"):
        check(
            **inputs.ffn_inputs((rows, 100), intermediate_size, dtype, device, weight_layout=layout)
        )


@layouts
@pytest.mark.parametrize("rows", [1, 9, 65])
def test_ffn_misaligned(device, dtype, rows, weight_layout):
    given = inputs.ffn_inputs((rows, 64), 96, dtype, device, weight_layout=weight_layout)
    check(**inputs.all_misaligned(given))


@norms
@pytest.mark.parametrize("rows", [3, 70])
def test_ffn_keeps_a_nan_to_its_row(device, dtype, rows, norm):
    given = inputs.ffn_inputs((rows, 40), 72, dtype, device, norm=norm)
    given["hidden_states"][1, 39] = float("nan")
    out = check(**given)
    assert out[1].isnan().all() and not out[0].isnan().any()


@pytest.mark.parametrize("rows", [3, 70])
def test_ffn_leaves_its_inputs(device, dtype, rows):
    given = inputs.ffn_inputs((rows, 40), 72, dtype, device)
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    ops.ffn(**given)
    assert all(torch.equal(given[name], before[name]) for name in before)


@pytest.mark.slow
@layouts
@pytest.mark.parametrize(("rows", "hidden_size"), [(1, 2048), (64, 1024), (100, 1024)])
def test_ffn_heavy(device, dtype, rows, hidden_size, weight_layout):
    given = inputs.ffn_inputs(
        (rows, hidden_size), 4 * hidden_size, dtype, device, weight_layout=weight_layout
    )
    check(**given)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_ffn_of_nothing(device, dtype, shape):
    assert ops.ffn(**inputs.ffn_inputs(shape, 16, dtype, device)).shape == shape


@pytest.mark.parametrize("rows", [3, 70])
def test_ffn_without_an_intermediate_row(device, dtype, rows):
    """intermediate_size 0: the products give zero, what is left is the bias and the residual."""
    given = inputs.ffn_inputs((rows, 8), 1, dtype, device, norm=None)
    given["fc1_weight"], given["fc1_bias"] = given["fc1_weight"][:0], given["fc1_bias"][:0]
    given["fc2_weight"] = given["fc2_weight"][:, :0].contiguous()
    out = ops.ffn(**given)
    torch.testing.assert_close(out, given["hidden_states"] + given["fc2_bias"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": torch.zeros(2, 8).double()}, TypeError, "hidden_states must be float32"),
        ({"hidden_states": torch.zeros(8, 2).t()}, ValueError, "hidden_states must be contiguous"),
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
        ({"hidden_states": torch.zeros(2, 7)}, ValueError, r"fc1_weight must have shape \(16, 7\)"),
        ({"fc1_weight": torch.zeros(16, 8).half()}, TypeError, "fc1_weight must have dtype"),
        ({"fc1_weight": torch.zeros(16)}, ValueError, "fc1_weight must have 2 dimensions"),
        ({"fc1_weight": torch.zeros(8, 16).t()}, ValueError, "fc1_weight must be contiguous"),
        ({"fc2_weight": torch.zeros(16, 8)}, ValueError, r"fc2_weight must have shape \(8, 16\)"),
        (
            {"fc2_weight": torch.zeros(8, 16, device="meta")},
            ValueError,
            "fc2_weight must be on cpu",
        ),
        ({"weight_layout": "in_out"}, ValueError, r"fc1_weight must have shape \(8, 8\)"),
        ({"weight_layout": "x"}, ValueError, "weight_layout must be one of"),
        ({"activation": "GELU"}, ValueError, "activation must be one of"),
        ({"norm": True}, ValueError, "norm must be one of"),
        ({"fc1_bias": torch.zeros(8)}, ValueError, r"fc1_bias must have shape \(16,\)"),
        ({"fc1_bias": torch.zeros(16).half()}, TypeError, "fc1_bias must have dtype"),
        ({"fc2_bias": torch.zeros(16)}, ValueError, r"fc2_bias must have shape \(8,\)"),
        ({"norm_weight": None}, ValueError, "norm_weight must be given with norm='post'"),
        ({"norm_weight": torch.zeros(16)}, ValueError, r"norm_weight must have shape \(8,\)"),
        ({"norm_bias": torch.zeros(16)[::2]}, ValueError, "norm_bias must be contiguous"),
    ],
)
def test_ffn_refuses(changes, error, message):
    given = inputs.ffn_inputs((2, 8), 16, torch.float32, "cpu") | changes
    with pytest.raises(error, match=message):
        ops.ffn(**given)
