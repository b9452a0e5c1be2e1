"""attention over packed tokens: sequences of any length, none of which sees another."""

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

causal = pytest.mark.parametrize("is_causal", [False, True])


def check(query, key, value, **options):
    out = ops.attention(query, key, value, **options)
    assert_as_accurate_as_torch(out, reference.attention, query, key, value, **options)
    return out


PACKED = [[1], [3, 0, 5, 0, 1], [0, 0, 4], [130], [1, 64, 0, 65, 17], [5] * 33]


@causal
@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize("num_kv_heads", [4, 1])
def test_attention_packed(device, dtype, lengths, num_kv_heads, is_causal):
    query = inputs.randn(sum(lengths), 4, 40, dtype=dtype, device=device)
    key, value = inputs.randn(2, sum(lengths), num_kv_heads, 40, dtype=dtype, device=device)
    starts = inputs.cu_seqlens_of(lengths, device)
    packed = {"cu_seqlens": starts, "max_seqlen": max(lengths), "is_causal": is_causal}
    out = check(query, key, value, **packed)
    again = ops.attention(query, key, value, **packed | {"max_seqlen": max(lengths) + 100})
    torch.testing.assert_close(out, again)  # max_seqlen may be an upper bound


@pytest.mark.sanitize
@pytest.mark.parametrize("head_dim", [7, 64])
def test_attention_packed_strides(device, dtype, head_dim):
    lengths = [9, 0, 66, 1]
    starts = inputs.cu_seqlens_of(lengths, device)
    fused = inputs.randn(sum(lengths), 3, 2, head_dim, dtype=dtype, device=device)
    check(*fused.unbind(1), cu_seqlens=starts, max_seqlen=66)
    heads_first = fused.permute(1, 2, 0, 3).contiguous().transpose(1, 2)
    check(*heads_first, cu_seqlens=starts, max_seqlen=66, is_causal=True)
    check(*map(inputs.misaligned, heads_first), cu_seqlens=starts, max_seqlen=66)


def test_attention_packed_sequences_do_not_see_each_other(device, dtype):
    lengths = [20, 33, 70]
    packed = {"cu_seqlens": inputs.cu_seqlens_of(lengths, device), "max_seqlen": 70}
    query, key, value = inputs.randn(3, sum(lengths), 2, 40, dtype=dtype, device=device)
    expected = ops.attention(query, key, value, **packed)
    for tensor in (query, key, value):
        tensor[20:53] = float("nan")
    out = ops.attention(query, key, value, **packed)
    assert out[20:53].isnan().all()
    assert torch.equal(out[:20], expected[:20]) and torch.equal(out[53:], expected[53:])


def test_attention_packed_of_nothing(device, dtype):
    empty = inputs.randn(0, 2, 8, dtype=dtype, device=device)
    starts = inputs.cu_seqlens_of([0, 0], device)
    out = ops.attention(empty, empty, empty, cu_seqlens=starts, max_seqlen=1)
    assert out.shape == (0, 2, 8)


NO_MASKS = "packed tokens take no attention_mask, key_padding_mask or kv_start"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(1, 9, 4, 8)}, ValueError, "query must have 3 dimensions"),
        ({"key": torch.zeros(9, 8)}, ValueError, "key must have 3 dimensions"),
        ({"key": torch.zeros(8, 2, 8)}, ValueError, r"key must have shape \(9, 2, 8\)"),
        ({"value": torch.zeros(9, 4, 8)}, ValueError, r"value must have shape \(9, 2, 8\)"),
        ({"cu_seqlens": [0, 9]}, TypeError, "cu_seqlens must be a torch.Tensor"),
        ({"cu_seqlens": torch.tensor([0, 9]).int()}, TypeError, "cu_seqlens must be int64"),
        ({"cu_seqlens": torch.tensor([[0, 9]])}, ValueError, "cu_seqlens must have 1 dimensions"),
        (
            {"cu_seqlens": torch.tensor([0])},
            ValueError,
            "cu_seqlens must have at least 2 entries, got 1",
        ),
        ({"cu_seqlens": torch.tensor([0, 1, 9])[::2]}, ValueError, "cu_seqlens must be contiguous"),
        (
            {"max_seqlen": None},
            ValueError,
            "max_seqlen must be at least 1 with cu_seqlens, got None",
        ),
        ({"max_seqlen": 0}, ValueError, "max_seqlen must be at least 1 with cu_seqlens, got 0"),
        ({"attention_mask": torch.zeros(1, 1, 1, 1)}, ValueError, NO_MASKS),
        ({"key_padding_mask": torch.zeros(1, 9).bool()}, ValueError, NO_MASKS),
        ({"kv_start": torch.tensor([0])}, ValueError, NO_MASKS),
    ],
)
def test_attention_packed_refuses(changes, error, message):
    given = {
        "query": torch.zeros(9, 4, 8),
        "key": torch.zeros(9, 2, 8),
        "value": torch.zeros(9, 2, 8),
    }
    packed = {"cu_seqlens": torch.tensor([0, 4, 9]), "max_seqlen": 5}
    with pytest.raises(error, match=message):
        ops.attention(**given | packed | changes)
