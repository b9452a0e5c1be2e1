"""cross_multi_head_attention: a decoder over an encoder's keys and values."""

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

layouts = pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
norms = pytest.mark.parametrize("norm", ["pre", "post", None])


def check(**given):
    out = ops.cross_multi_head_attention(**given)
    assert out.is_contiguous()
    assert_as_accurate_as_torch(out, reference.cross_multi_head_attention, **given)
    return out


def block(shape, kv_len, num_heads, dtype, device, **options):
    return inputs.cross_attention_block_inputs(shape, kv_len, num_heads, dtype, device, **options)


SHAPES = [((1, 1, 4), 1, 1), ((3, 7, 33), 5, 3), ((5, 1, 512), 37, 8), ((2, 70, 96), 20, 6)]


@layouts
@pytest.mark.parametrize(("shape", "kv_len", "num_heads"), SHAPES)
def test_cross_multi_head_attention(device, dtype, shape, kv_len, num_heads, weight_layout):
    check(**block(shape, kv_len, num_heads, dtype, device, weight_layout=weight_layout))


@pytest.mark.sanitize
@layouts
@norms
@pytest.mark.parametrize("add_residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_multi_head_attention_options(device, dtype, bias, add_residual, norm, weight_layout):
    for q_len in (1, 40):
        given = block(
            (2, q_len, 48), 11, 4, dtype, device, weight_layout=weight_layout, norm=norm, bias=bias
        )
        check(**given, add_residual=add_residual, softmax_scale=0.2, norm_eps=0.1)


@pytest.mark.parametrize("missing", ["query_bias", "out_bias", "norm_bias"])
@pytest.mark.parametrize("q_len", [2, 70])
def test_cross_multi_head_attention_without_one_bias(device, dtype, q_len, missing):
    check(**block((1, q_len, 48), 11, 4, dtype, device) | {missing: None})


@pytest.mark.parametrize("kv_len", [1, 2, 16, 63, 64, 65, 129, 512, 1025])
@pytest.mark.parametrize("q_len", [1, 9])
def test_cross_multi_head_attention_kv_lengths(device, dtype, q_len, kv_len):
    check(**block((2, q_len, 80), kv_len, 2, dtype, device))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 33, 63, 64, 65, 70])
def test_cross_multi_head_attention_number_of_rows(device, dtype, rows):
    check(**block((rows, 1, 40), 6, 5, dtype, device))
    check(**block((1, rows, 40), 6, 5, dtype, device, norm="pre", weight_layout="in_out"))


@pytest.mark.parametrize("layout", ["tokens first", "cache", "broadcast", "misaligned"])
@pytest.mark.parametrize("q_len", [1, 40])
def test_cross_multi_head_attention_strides(device, dtype, q_len, layout):
    given = block((3, q_len, 48), 21, 4, dtype, device)
    for name in ("key", "value"):
        t = given[name]
        if layout == "tokens first":  # as the projections leave them
            given[name] = t.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "cache":
            given[name] = torch.cat([t, t * float("nan")], dim=2)[:, :, :21]
        elif layout == "broadcast":  # one encoder run for all beams
            given[name] = t[:1].expand_as(t)
        else:
            given[name] = inputs.misaligned(t)
    check(**given)


@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("kind", ["bool", "float32 -inf", "element -inf"])
def test_cross_multi_head_attention_masks(device, dtype, kind, q_len):
    given = block((2, q_len, 48), 21, 4, dtype, device)
    for shape in ((2, 1, 1, 21), (1, 1, q_len, 21), (2, 4, q_len, 21)):
        mask = inputs.attention_mask(kind, shape, dtype, device)
        mask[0, :, 0] = inputs.excluding_value(kind, mask.dtype)  # a query that sees nothing
        check(**given, attention_mask=mask)


@norms
@pytest.mark.parametrize("q_len", [1, 40])
def test_cross_multi_head_attention_key_padding_mask(device, dtype, q_len, norm):
    given = block((3, q_len, 48), 21, 4, dtype, device, norm=norm)
    padding = torch.zeros(3, 21, dtype=torch.bool, device=device)
    padding[0, 5:] = True
    padding[1] = True
    check(**given, key_padding_mask=padding)


@layouts
@pytest.mark.parametrize("q_len", [1, 9, 65])
def test_cross_multi_head_attention_misaligned(device, dtype, q_len, weight_layout):
    given = block((1, q_len, 64), 20, 4, dtype, device, weight_layout=weight_layout)
    check(**inputs.all_misaligned(given))


@pytest.mark.parametrize("q_len", [1, 70])
def test_cross_multi_head_attention_leaves_its_inputs(device, dtype, q_len):
    given = block((2, q_len, 48), 21, 4, dtype, device)
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    ops.cross_multi_head_attention(**given)
    assert all(torch.equal(given[name], before[name]) for name in before)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 1, 1024), (2, 200, 1024)])
def test_cross_multi_head_attention_heavy(device, dtype, shape):
    check(**block(shape, 400, 16, dtype, device, norm="pre"))


def test_cross_multi_head_attention_over_no_keys(device, dtype):
    given = block((2, 3, 48), 0, 4, dtype, device, norm=None)
    out = check(**given)
    torch.testing.assert_close(out, given["hidden_states"] + given["out_bias"])


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_cross_multi_head_attention_of_nothing(device, dtype, shape):
    out = ops.cross_multi_head_attention(**block(shape, 7, 4, dtype, device))
    assert out.shape == shape and out.dtype == dtype


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": torch.zeros(6, 8)}, ValueError, "hidden_states must have 3 dimensions"),
        (
            {"hidden_states": torch.zeros(2, 3, 8).double()},
            TypeError,
            "hidden_states must be float32",
        ),
        ({"num_heads": 3}, ValueError, "num_heads must divide hidden_size"),
        ({"query_weight": torch.zeros(8, 4)}, ValueError, r"query_weight must have shape \(8, 8\)"),
        ({"query_bias": torch.zeros(8).half()}, TypeError, "query_bias must have dtype"),
        ({"out_weight": torch.zeros(4, 8)}, ValueError, r"out_weight must have shape \(8, 8\)"),
        ({"norm_weight": None}, ValueError, "norm_weight must be given with norm='post'"),
        ({"weight_layout": None}, ValueError, "weight_layout must be one of"),
        ({"key": None}, TypeError, "key must be a torch.Tensor"),
        ({"key": torch.zeros(2, 4, 5, 2).half()}, TypeError, "key must have dtype"),
        ({"key": torch.zeros(2, 5, 8)}, ValueError, "key must have 4 dimensions"),
        ({"key": torch.zeros(2, 2, 5, 4)}, ValueError, r"key must have shape \(2, 4, 5, 2\)"),
        (
            {"key": torch.zeros(2, 4, 2, 5).transpose(2, 3)},
            ValueError,
            "key must have a contiguous last",
        ),
        ({"value": torch.zeros(2, 4, 6, 2)}, ValueError, r"value must have shape \(2, 4, 5, 2\)"),
        ({"value": torch.zeros(2, 4, 5, 2, device="meta")}, ValueError, "value must be on cpu"),
        (
            {"value": torch.zeros(2, 4, 2, 5).transpose(2, 3)},
            ValueError,
            "value must have a contiguous last",
        ),
        (
            {"attention_mask": torch.zeros(2, 1, 1, 4)},
            ValueError,
            r"attention_mask must broadcast to .*\(2, 4, 3, 5\)",
        ),
        ({"key_padding_mask": torch.zeros(2, 5)}, TypeError, "key_padding_mask must be bool"),
        (
            {"key_padding_mask": torch.zeros(2, 3).bool()},
            ValueError,
            r"key_padding_mask must have shape \(2, 5\)",
        ),
    ],
)
def test_cross_multi_head_attention_refuses(changes, error, message):
    given = block((2, 3, 8), 5, 4, torch.float32, "cpu") | changes
    with pytest.raises(error, match=message):
        ops.cross_multi_head_attention(**given)
