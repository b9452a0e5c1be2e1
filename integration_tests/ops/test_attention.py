"""attention: prefill and decoding; head sizes, lengths, strides and grouped heads."""

import pytest
import torch
import torch.nn.functional as F

from eet_patch import ops
from eet_patch.testing import (
    ERROR_SLACK,
    MAX_ERROR_RATIO,
    assert_as_accurate_as_torch,
    inputs,
    reference,
    relative_error,
)

HEAD_DIMS = [1, 7, 8, 16, 33, 40, 64, 72, 80, 96, 128, 255, 256]
# Lengths on both sides of every power of two, where tiles and splits end.
CACHE_LENGTHS = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 512, 513]
CACHE_LENGTHS += [1023, 1024, 1025, 2047, 2048, 2049]
# (batch_size, num_heads, q_len, kv_len)
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 5), (1, 2, 65, 129), (2, 2, 128, 128), (3, 1, 17, 333)]
causal = pytest.mark.parametrize("is_causal", [False, True])


def check(query, key, value, **options):
    out = ops.attention(query, key, value, **options)
    assert out.is_contiguous()
    assert_as_accurate_as_torch(out, reference.attention, query, key, value, **options)
    return out


@causal
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(device, dtype, shape, is_causal):
    check(*inputs.attention_inputs(*shape, 64, dtype, device), is_causal=is_causal)


@causal
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("q_len", [1, 5, 70])
def test_attention_head_dims(device, dtype, q_len, head_dim, is_causal):
    given = inputs.attention_inputs(2, 2, q_len, 75, head_dim, dtype, device)
    check(*given, is_causal=is_causal)


@pytest.mark.sanitize
@pytest.mark.parametrize("head_dim", [7, 64, 80])
@pytest.mark.parametrize("kind", [None, "bool", "element -inf"])
def test_attention_small(device, dtype, head_dim, kind):
    for q_len, kv_len, is_causal in ((1, 1, False), (1, 70, True), (9, 33, True), (66, 66, False)):
        given = inputs.attention_inputs(2, 4, q_len, kv_len, head_dim, dtype, device, 2)
        mask = None
        if kind is not None:
            mask = inputs.attention_mask(kind, (2, 1, q_len, kv_len), dtype, device)
        kv_start = torch.tensor([0, min(3, kv_len - 1)], device=device)
        check(*given, attention_mask=mask, is_causal=is_causal, kv_start=kv_start)


@pytest.mark.sanitize
@pytest.mark.parametrize("head_dim", [33, 64])
def test_attention_decoding_splits(device, dtype, head_dim):
    """One query over a long cache, which a GPU shares out among its processors."""
    for kv_len in (700, 2049):
        check(*inputs.attention_inputs(1, 2, 1, kv_len, head_dim, dtype, device))


@pytest.mark.parametrize("kv_len", CACHE_LENGTHS)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_attention_decoding(device, dtype, kv_len, num_kv_heads):
    given = inputs.attention_inputs(2, 4, 1, kv_len, 64, dtype, device, num_kv_heads)
    check(*given)
    check(*given, is_causal=True, kv_start=torch.tensor([0, kv_len // 2], device=device))


@pytest.mark.parametrize("q_len", [2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_attention_query_lengths(device, dtype, q_len):
    check(*inputs.attention_inputs(2, 2, q_len, 67, 40, dtype, device), is_causal=True)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16, 33])
def test_attention_batch_sizes(device, dtype, batch_size):
    check(*inputs.attention_inputs(batch_size, 3, 1, 20, 16, dtype, device))
    check(*inputs.attention_inputs(batch_size, 3, 9, 9, 16, dtype, device), is_causal=True)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, -0.5])
def test_attention_softmax_scale(device, dtype, scale):
    for q_len in (1, 20):
        given = inputs.attention_inputs(2, 2, q_len, 40, 64, dtype, device)
        check(*given, softmax_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [1, 20])
def test_attention_of_large_scores(device, dtype, q_len):
    """Scores in the thousands: exp of them overflows unless the largest is taken off first."""
    query, key, value = inputs.attention_inputs(2, 2, q_len, 40, 64, dtype, device)
    check(query * 100, key * 10, value)
    check(query.abs() * -30, key.abs(), value)  # all far below zero


@causal
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("q_len", [1, 4, 33])
def test_attention_grouped_heads(device, dtype, q_len, num_kv_heads, is_causal):
    given = inputs.attention_inputs(2, 6, q_len, 50, 40, dtype, device, num_kv_heads)
    check(*given, is_causal=is_causal)


@pytest.mark.parametrize("q_len", [1, 20])
def test_attention_nan_stays_in_its_sequence_and_head(device, dtype, q_len):
    query, key, value = inputs.attention_inputs(2, 3, q_len, 70, 33, dtype, device)
    expected = ops.attention(query, key, value)
    for tensor in (query, key, value):
        tensor[0, 1] = float("nan")
    out = ops.attention(query, key, value)
    assert out[0, :, 1].isnan().all()
    out[0, :, 1] = expected[0, :, 1]
    assert torch.equal(out, expected)


def strided(query, key, value, layout):
    """The same values in another place: as views of what layers and caches keep."""
    if layout == "tokens first":  # (batch, length, heads, head_dim), as projections leave it
        return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    if layout == "fused":  # one (batch, length, 3, heads, head_dim) product
        return (
            torch.stack([t.transpose(1, 2) for t in (query, key, value)], 2)
            .transpose(1, 3)
            .unbind(2)
        )
    if layout == "cache":  # the first part of a larger buffer; what follows is garbage

        def within(t):
            buffer = t.new_full((t.shape[0], t.shape[1], t.shape[2] + 9, t.shape[3]), float("nan"))
            buffer[:, :, : t.shape[2]] = t
            return buffer[:, :, : t.shape[2]]

        return query, within(key), within(value)
    if layout == "wide rows":  # head_dim is a slice
        return [torch.cat([t, t * float("nan")], 3)[..., : t.shape[3]] for t in (query, key, value)]
    if layout == "batch last":
        return [t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3) for t in (query, key, value)]
    if layout == "misaligned":
        return [inputs.misaligned(t) for t in (query, key, value)]
    if layout == "broadcast":  # one head for all, by stride 0
        return query, key[:, :1].expand_as(key), value[:1].expand_as(value)
    raise ValueError(layout)


LAYOUTS = ["tokens first", "fused", "cache", "wide rows", "batch last", "misaligned", "broadcast"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [7, 64])
@pytest.mark.parametrize("q_len", [1, 33])
def test_attention_strides(device, dtype, q_len, head_dim, layout):
    given = inputs.attention_inputs(2, 3, q_len, 33, head_dim, dtype, device)
    query, key, value = strided(*given, "cache" if layout == "fused" and q_len == 1 else layout)
    check(query, key, value)
    check(query, key, value, is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 1, 200), (2, 4, 128, 128)])
def test_attention_is_as_accurate_as_sdpa(device, dtype, shape, is_causal):
    """A stricter standard than the reference: fused kernels keep their scores in fp32 as well."""
    given = inputs.attention_inputs(*shape, 64, dtype, device)
    truth = reference.attention(*(t.double() for t in given), is_causal=is_causal)
    sdpa = F.scaled_dot_product_attention(*given, is_causal=is_causal and shape[2] > 1)
    error = relative_error(ops.attention(*given, is_causal=is_causal), truth)
    own_error = relative_error(sdpa.transpose(1, 2), truth)
    assert error <= MAX_ERROR_RATIO * own_error + ERROR_SLACK


@pytest.mark.slow
@causal
@pytest.mark.parametrize(
    "shape", [(1, 16, 512, 512, 64), (2, 12, 384, 1024, 64), (1, 2, 300, 4096, 128)]
)
def test_attention_heavy(device, dtype, shape, is_causal):
    check(*inputs.attention_inputs(*shape, dtype, device), is_causal=is_causal)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 3), (2, 0, 3, 3)])
def test_attention_of_nothing(device, dtype, shape):
    batch_size, num_heads, q_len, kv_len = shape
    sizes = (batch_size, max(num_heads, 1), q_len, kv_len, 8)
    query, key, value = inputs.attention_inputs(*sizes, dtype, device)
    out = ops.attention(query[:, :num_heads], key, value)
    assert out.shape == (batch_size, q_len, num_heads, 8) and out.dtype == dtype


@pytest.mark.parametrize("q_len", [1, 20])
def test_attention_over_no_keys_is_zero(device, dtype, q_len):
    out = ops.attention(*inputs.attention_inputs(2, 2, q_len, 0, 40, dtype, device))
    assert out.shape == (2, q_len, 2, 40) and (out == 0).all()


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


BOTH = "give attention_mask or key_padding_mask, not both"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": None}, TypeError, "query must be a torch.Tensor"),
        ({"query": zeros(2, 4, 3, 8).double()}, TypeError, "query must be float32"),
        ({"query": zeros(2, 4, 3, 8, device="meta")}, ValueError, "query must be on a CPU or CUDA"),
        ({"query": zeros(4, 3, 8)}, ValueError, "query must have 4 dimensions"),
        (
            {"query": zeros(2, 4, 8, 3).transpose(2, 3)},
            ValueError,
            "query must have a contiguous last",
        ),
        ({"query": zeros(2, 4, 3, 0)}, ValueError, "query must have a head_dim of 1 to 256, got 0"),
        (
            {"query": zeros(2, 4, 3, 257)},
            ValueError,
            "query must have a head_dim of 1 to 256, got 257",
        ),
        ({"key": 1}, TypeError, "key must be a torch.Tensor"),
        ({"key": zeros(2, 2, 6, 8).half()}, TypeError, "key must have dtype torch.float32"),
        ({"key": zeros(2, 2, 6, 8, device="meta")}, ValueError, "key must be on cpu"),
        ({"key": zeros(2, 6, 8)}, ValueError, "key must have 4 dimensions"),
        ({"key": zeros(2, 2, 8, 6).transpose(2, 3)}, ValueError, "key must have a contiguous last"),
        (
            {"key": zeros(2, 3, 6, 8)},
            ValueError,
            "key must have a number of heads that divides query's 4, got 3",
        ),
        ({"key": zeros(2, 0, 6, 8)}, ValueError, "key must have a number of heads that divides"),
        (
            {"key": zeros(1, 2, 6, 8)},
            ValueError,
            r"key must have shape \(2, 2, 6, 8\), got \(1, 2, 6, 8\)",
        ),
        ({"key": zeros(2, 2, 6, 7)}, ValueError, "key must have shape"),
        ({"value": zeros(2, 2, 5, 8)}, ValueError, r"value must have shape \(2, 2, 6, 8\)"),
        ({"value": zeros(2, 2, 6, 8).bfloat16()}, TypeError, "value must have dtype"),
        (
            {"value": zeros(2, 2, 8, 6).transpose(2, 3)},
            ValueError,
            "value must have a contiguous last",
        ),
        (
            {"query": zeros(2, 4, 7, 8), "is_causal": True},
            ValueError,
            "key must be at least as long as query",
        ),
        ({"kv_start": [0, 0]}, TypeError, "kv_start must be a torch.Tensor"),
        ({"kv_start": zeros(2)}, TypeError, "kv_start must be int64"),
        ({"kv_start": zeros(3).long()}, ValueError, r"kv_start must have shape \(2,\)"),
        ({"kv_start": zeros(4).long()[::2]}, ValueError, "kv_start must be contiguous"),
        ({"kv_start": zeros(2, device="meta").long()}, ValueError, "kv_start must be on cpu"),
        ({"attention_mask": [1]}, TypeError, "attention_mask must be a torch.Tensor"),
        (
            {"attention_mask": zeros(2, 1, 3, 6).half()},
            TypeError,
            "attention_mask must be bool, float32",
        ),
        (
            {"attention_mask": zeros(2, 1, 3, 6).long()},
            TypeError,
            "attention_mask must be bool, float32",
        ),
        (
            {"attention_mask": zeros(2, 1, 3, 5)},
            ValueError,
            r"attention_mask must broadcast to .* \(2, 4, 3, 6\)",
        ),
        ({"attention_mask": zeros(2, 2, 3, 6)}, ValueError, "attention_mask must broadcast to"),
        ({"attention_mask": zeros(3, 6)}, ValueError, "attention_mask must broadcast to"),
        (
            {"attention_mask": zeros(1, 1, 1, 1, device="meta")},
            ValueError,
            "attention_mask must be on cpu",
        ),
        ({"key_padding_mask": zeros(2, 6)}, TypeError, "key_padding_mask must be bool"),
        ({"key_padding_mask": 0}, TypeError, "key_padding_mask must be a torch.Tensor"),
        (
            {"key_padding_mask": zeros(1, 6).bool()},
            ValueError,
            r"key_padding_mask must have shape \(2, 6\)",
        ),
        (
            {"key_padding_mask": zeros(2, 6, device="meta").bool()},
            ValueError,
            "key_padding_mask must be on cpu",
        ),
        (
            {"attention_mask": zeros(1, 1, 1, 6), "key_padding_mask": zeros(2, 6).bool()},
            ValueError,
            BOTH,
        ),
    ],
)
def test_attention_refuses(changes, error, message):
    given = {"query": zeros(2, 4, 3, 8), "key": zeros(2, 2, 6, 8), "value": zeros(2, 2, 6, 8)}
    with pytest.raises(error, match=message):
        ops.attention(**given | changes)
