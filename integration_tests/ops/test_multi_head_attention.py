"""multi_head_attention: norm, residual, masks, packed tokens, weight layouts, three weights."""

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

layouts = pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
norms = pytest.mark.parametrize("norm", ["pre", "post", None])


def check(**given):
    out = ops.multi_head_attention(**given)
    assert out.is_contiguous()
    assert_as_accurate_as_torch(out, reference.multi_head_attention, **given)
    return out


def block(shape, num_heads, dtype, device, **options):
    return inputs.attention_block_inputs(shape, num_heads, dtype, device, **options)


# least, odd, a row of BERT's, and sizes on both sides of MAX_SKINNY_ROWS
SHAPES = [((1, 1, 4), 1), ((3, 7, 33), 3), ((1, 64, 128), 2), ((5, 13, 96), 6), ((2, 128, 768), 12)]


@layouts
@pytest.mark.parametrize(("shape", "num_heads"), SHAPES)
def test_multi_head_attention(device, dtype, shape, num_heads, weight_layout):
    check(**block(shape, num_heads, dtype, device, weight_layout=weight_layout))


@layouts
@norms
@pytest.mark.parametrize("add_residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 3, 48), (2, 40, 48)])
def test_multi_head_attention_options(
    device, dtype, shape, bias, add_residual, norm, weight_layout
):
    given = block(shape, 4, dtype, device, weight_layout=weight_layout, norm=norm, bias=bias)
    check(**given, add_residual=add_residual, softmax_scale=0.2, norm_eps=0.1)


@pytest.mark.sanitize
@norms
def test_multi_head_attention_small(device, dtype, norm):
    for seq_len, layout in ((1, "out_in"), (5, "in_out"), (33, "out_in"), (33, "in_out")):
        given = block((2, seq_len, 42), 3, dtype, device, weight_layout=layout, norm=norm)
        padding = torch.zeros(2, seq_len, dtype=torch.bool, device=device)
        padding[1, 1:] = True
        check(**given, key_padding_mask=padding)


@pytest.mark.parametrize(
    "missing", ["query_bias", "key_bias", "value_bias", "out_bias", "norm_bias"]
)
@pytest.mark.parametrize("seq_len", [2, 70])
def test_multi_head_attention_without_one_bias(device, dtype, seq_len, missing):
    check(**block((1, seq_len, 48), 4, dtype, device) | {missing: None})


@pytest.mark.parametrize("num_heads", [64, 8, 4, 2, 1])
@pytest.mark.parametrize("seq_len", [5, 70])
def test_multi_head_attention_head_dims(device, dtype, seq_len, num_heads):
    check(**block((1, seq_len, 64), num_heads, dtype, device))


@pytest.mark.parametrize("head_dim", [1, 7, 72, 80, 96, 128, 256])
def test_multi_head_attention_other_head_dims(device, dtype, head_dim):
    check(**block((1, 7, 2 * head_dim), 2, dtype, device))


@norms
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 33, 63, 64, 65, 66, 70])
def test_multi_head_attention_number_of_rows(device, dtype, rows, norm):
    check(**block((1, rows, 40), 5, dtype, device, norm=norm))
    check(**block((rows, 1, 40), 5, dtype, device, norm=norm, weight_layout="in_out"))


@pytest.mark.parametrize("seq_len", [4, 70])
@pytest.mark.parametrize("kind", ["bool", "float32 lowest", "element lowest"])
def test_multi_head_attention_masks(device, dtype, kind, seq_len):
    given = block((2, seq_len, 48), 4, dtype, device)
    for shape in ((2, 1, 1, seq_len), (1, 1, seq_len, seq_len), (2, 4, seq_len, seq_len)):
        mask = inputs.attention_mask(kind, shape, dtype, device)
        mask[0, :, 0] = inputs.excluding_value(kind, mask.dtype)  # a query that sees nothing
        check(**given, attention_mask=mask)
        check(**given, attention_mask=mask.expand(2, -1, -1, -1))


@norms
@pytest.mark.parametrize("seq_len", [4, 70])
def test_multi_head_attention_of_padding_alone(device, dtype, seq_len, norm):
    """Nothing but padding has an attention of zeros: what is left is the residual and the bias."""
    given = block((2, seq_len, 48), 4, dtype, device, norm=norm)
    padding = torch.zeros(2, seq_len, dtype=torch.bool, device=device)
    padding[0] = True
    out = check(**given, key_padding_mask=padding)
    if norm is None:
        left = given["hidden_states"][0] + given["out_bias"]
        torch.testing.assert_close(out[0], left)


@layouts
@norms
@pytest.mark.parametrize(
    "lengths", [[1], [3, 0, 5, 0, 1], [0, 0, 4], [130], [1, 64, 0, 65, 17]], ids=str
)
def test_multi_head_attention_packed(device, dtype, lengths, norm, weight_layout):
    given = block((sum(lengths), 48), 4, dtype, device, weight_layout=weight_layout, norm=norm)
    starts = inputs.cu_seqlens_of(lengths, device)
    check(**given, cu_seqlens=starts, max_seqlen=max(lengths))


@pytest.mark.parametrize("seq_len", [4, 40])
def test_multi_head_attention_packed_equals_padded(device, dtype, seq_len):
    given = block((2, seq_len, 48), 4, dtype, device)
    x = given.pop("hidden_states")
    padding = torch.zeros(2, seq_len, dtype=torch.bool, device=device)
    padding[1, seq_len // 2 :] = True
    padded = ops.multi_head_attention(x, **given, key_padding_mask=padding)
    starts = inputs.cu_seqlens_of([seq_len, seq_len // 2], device)
    packed = ops.multi_head_attention(
        x[~padding].contiguous(), **given, cu_seqlens=starts, max_seqlen=seq_len
    )
    # Two kernels, each within its bound of the truth; here they only must not differ by a token.
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(padded[~padding], packed, **tolerance)


@layouts
@pytest.mark.parametrize("seq_len", [3, 9, 65])
def test_multi_head_attention_misaligned(device, dtype, seq_len, weight_layout):
    given = block((1, seq_len, 64), 4, dtype, device, weight_layout=weight_layout)
    check(**inputs.all_misaligned(given))


@layouts
@pytest.mark.parametrize("seq_len", [3, 70])
def test_multi_head_attention_of_slices_of_one_weight(device, dtype, seq_len, weight_layout):
    """Three contiguous parts of one storage, as a fused checkpoint keeps them."""
    given = block((1, seq_len, 48), 4, dtype, device, weight_layout=weight_layout)
    weights = torch.stack([given[f"{name}_weight"] for name in ("query", "key", "value")])
    biases = torch.stack([given[f"{name}_bias"] for name in ("query", "key", "value")])
    for i, name in enumerate(("query", "key", "value")):
        given[f"{name}_weight"], given[f"{name}_bias"] = weights[i], biases[i]
    check(**given)


@pytest.mark.parametrize("seq_len", [3, 70])
def test_multi_head_attention_keeps_a_nan_to_its_sequence(device, dtype, seq_len):
    given = block((3, seq_len, 48), 4, dtype, device)
    expected = ops.multi_head_attention(**given)
    given["hidden_states"][1] = float("nan")
    out = ops.multi_head_attention(**given)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("seq_len", [3, 70])
def test_multi_head_attention_leaves_its_inputs(device, dtype, seq_len):
    given = block((2, seq_len, 48), 4, dtype, device)
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    ops.multi_head_attention(**given)
    assert all(torch.equal(given[name], before[name]) for name in before)


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("shape", [(1, 1, 2048), (8, 8, 1024), (2, 100, 1024)])
def test_multi_head_attention_heavy(device, dtype, shape, weight_layout):
    check(**block(shape, 16, dtype, device, weight_layout=weight_layout))


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_multi_head_attention_of_nothing(device, dtype, shape):
    out = ops.multi_head_attention(**block(shape, 4, dtype, device))
    assert out.shape == shape and out.dtype == dtype


def test_multi_head_attention_packed_of_nothing(device, dtype):
    given = block((0, 16), 4, dtype, device)
    starts = inputs.cu_seqlens_of([0, 0], device)
    assert ops.multi_head_attention(**given, cu_seqlens=starts, max_seqlen=1).shape == (0, 16)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": 3}, TypeError, "hidden_states must be a torch.Tensor"),
        (
            {"hidden_states": torch.zeros(2, 3, 8).double()},
            TypeError,
            "hidden_states must be float32",
        ),
        ({"hidden_states": torch.zeros(2, 8)}, ValueError, "hidden_states must have 3 dimensions"),
        (
            {"hidden_states": torch.zeros(3, 2, 8).transpose(0, 1)},
            ValueError,
            "hidden_states must be contiguous",
        ),
        ({"weight_layout": "io"}, ValueError, "weight_layout must be one of 'out_in', 'in_out'"),
        ({"norm": "both"}, ValueError, "norm must be one of None, 'pre', 'post', got 'both'"),
        (
            {"num_heads": 3},
            ValueError,
            "num_heads must divide hidden_size, got 3 for hidden_size 8",
        ),
        ({"num_heads": 0}, ValueError, "num_heads must divide hidden_size"),
        ({"num_heads": -2}, ValueError, "num_heads must divide hidden_size"),
        ({"hidden_states": torch.zeros(2, 3, 0)}, ValueError, "num_heads must divide hidden_size"),
        (
            {"hidden_states": torch.zeros(1, 1, 514), "num_heads": 2},
            ValueError,
            "num_heads must give a head_dim of at most 256, got 257",
        ),
        ({"query_weight": torch.zeros(8, 8).half()}, TypeError, "query_weight must have dtype"),
        ({"query_weight": torch.zeros(8)}, ValueError, "query_weight must have 2 dimensions"),
        (
            {"key_weight": torch.zeros(8, 4)},
            ValueError,
            r"key_weight must have shape \(8, 8\), got \(8, 4\)",
        ),
        (
            {"value_weight": torch.zeros(8, 16)[:, ::2]},
            ValueError,
            "value_weight must be contiguous",
        ),
        ({"out_weight": torch.zeros(8, 8, device="meta")}, ValueError, "out_weight must be on cpu"),
        ({"query_bias": torch.zeros(4)}, ValueError, r"query_bias must have shape \(8,\)"),
        ({"key_bias": torch.zeros(8).half()}, TypeError, "key_bias must have dtype"),
        ({"value_bias": torch.zeros(16)[::2]}, ValueError, "value_bias must be contiguous"),
        ({"out_bias": 0.0}, TypeError, "out_bias must be a torch.Tensor"),
        ({"norm_weight": None}, ValueError, "norm_weight must be given with norm='post', got None"),
        ({"norm_weight": torch.zeros(7)}, ValueError, r"norm_weight must have shape \(8,\)"),
        ({"norm_bias": torch.zeros(8).half()}, TypeError, "norm_bias must have dtype"),
        (
            {"attention_mask": torch.zeros(2, 1, 1, 4)},
            ValueError,
            r"attention_mask must broadcast to .*\(2, 4, 3, 3\)",
        ),
        (
            {"key_padding_mask": torch.zeros(2, 4).bool()},
            ValueError,
            r"key_padding_mask must have shape \(2, 3\)",
        ),
        (
            {
                "attention_mask": torch.zeros(1, 1, 1, 1),
                "key_padding_mask": torch.zeros(2, 3).bool(),
            },
            ValueError,
            "not both",
        ),
    ],
)
def test_multi_head_attention_refuses(changes, error, message):
    given = block((2, 3, 8), 4, torch.float32, "cpu") | changes
    with pytest.raises(error, match=message):
        ops.multi_head_attention(**given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"hidden_states": torch.zeros(1, 6, 8)},
            ValueError,
            "hidden_states must have 2 dimensions",
        ),
        ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a torch.Tensor"),
        ({"cu_seqlens": torch.tensor([0, 6]).int()}, TypeError, "cu_seqlens must be int64"),
        ({"cu_seqlens": torch.tensor([0, 1, 6])[::2]}, ValueError, "cu_seqlens must be contiguous"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, "cu_seqlens must have 1 dimensions"),
        ({"cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens must have at least 2 entries"),
        (
            {"max_seqlen": None},
            ValueError,
            "max_seqlen must be at least 1 with cu_seqlens, got None",
        ),
        ({"max_seqlen": 0}, ValueError, "max_seqlen must be at least 1"),
        (
            {"attention_mask": torch.zeros(1, 1, 1, 6)},
            ValueError,
            "packed tokens take no attention_mask",
        ),
        (
            {"key_padding_mask": torch.zeros(1, 6).bool()},
            ValueError,
            "packed tokens take no attention_mask",
        ),
    ],
)
def test_multi_head_attention_packed_refuses(changes, error, message):
    packed = {"cu_seqlens": torch.tensor([0, 2, 6]), "max_seqlen": 4}
    given = block((6, 8), 4, torch.float32, "cpu") | packed | changes
    with pytest.raises(error, match=message):
        ops.multi_head_attention(**given)


def side_by_side(given):
    """The same block with the three projections in one weight, as GPT-2's c_attn has them."""
    in_out = given["weight_layout"] == "in_out"
    names = ("query", "key", "value")
    weight = torch.cat([given[f"{name}_weight"] for name in names], dim=1 if in_out else 0)
    biases = [given[f"{name}_bias"] for name in names]
    bias = None if biases[0] is None else torch.cat(biases)
    rest = {f"{name}_{part}": None for name in names[1:] for part in ("weight", "bias")}
    return given | {"query_weight": weight, "query_bias": bias} | rest


@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("bias", [True, False])
def test_one_weight_may_hold_the_three_projections(device, dtype, weight_layout, bias):
    for shape in ((2, 7, 48), (3, 50, 48)):
        given = inputs.attention_block_inputs(
            shape, 4, dtype, device, weight_layout=weight_layout, bias=bias
        )
        out = ops.multi_head_attention(**side_by_side(given))
        assert_as_accurate_as_torch(out, reference.multi_head_attention, **given)
        out = ops.masked_multi_head_attention(**side_by_side(given))
        assert_as_accurate_as_torch(out, reference.masked_multi_head_attention, **given)


def test_what_stands_beside_one_weight_is_checked(device):
    given = inputs.attention_block_inputs((2, 3, 48), 4, torch.float32, device)
    for changes, message in (
        ({"key_weight": None}, "key_weight and value_weight must be given together"),
        ({"key_weight": None, "value_weight": None}, "key_bias and value_bias must be None"),
        (
            {name: None for name in ("key_weight", "value_weight", "key_bias", "value_bias")},
            r"query_weight must have shape \(144, 48\), got \(48, 48\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ops.multi_head_attention(**given | changes)
