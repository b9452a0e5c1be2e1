"""attention: every mask in every layout, and queries that see nothing."""

import itertools

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

causal = pytest.mark.parametrize("is_causal", [False, True])
mask_kinds = pytest.mark.parametrize("kind", inputs.MASK_KINDS)


def check(query, key, value, **options):
    out = ops.attention(query, key, value, **options)
    assert_as_accurate_as_torch(out, reference.attention, query, key, value, **options)
    return out


@causal
@mask_kinds
@pytest.mark.parametrize("q_len", [1, 3, 65])
def test_attention_masks(device, dtype, q_len, kind, is_causal):
    given = inputs.attention_inputs(2, 3, q_len, 70, 40, dtype, device)
    mask = inputs.attention_mask(kind, (2, 3, q_len, 70), dtype, device)
    check(*given, attention_mask=mask, is_causal=is_causal)


@pytest.mark.parametrize("kind", ["bool", "float32 lowest", "element -inf"])
@pytest.mark.parametrize("q_len", [1, 20])
def test_attention_mask_broadcast(device, dtype, q_len, kind):
    """Each dimension of size 1, of stride 0, and whole."""
    given = inputs.attention_inputs(2, 3, q_len, 35, 16, dtype, device)
    sizes = (2, 3, q_len, 35)
    for ones in itertools.product([True, False], repeat=4):
        shape = tuple(1 if one else size for one, size in zip(ones, sizes, strict=True))
        mask = inputs.attention_mask(kind, shape, dtype, device)
        check(*given, attention_mask=mask)
        if any(ones):
            check(*given, attention_mask=mask.expand(sizes))
        if ones[0]:  # as for a static cache without padding
            check(*given, attention_mask=mask.expand(2, -1, -1, -1))


@mask_kinds
def test_attention_mask_strides(device, dtype, kind):
    given = inputs.attention_inputs(2, 3, 20, 35, 16, dtype, device)
    by_heads = inputs.attention_mask(kind, (3, 2, 20, 35), dtype, device)
    check(*given, attention_mask=by_heads.transpose(0, 1))
    by_keys = inputs.attention_mask(kind, (2, 1, 35, 20), dtype, device)
    check(*given, attention_mask=by_keys.transpose(2, 3))
    wide = inputs.attention_mask(kind, (2, 1, 20, 90), dtype, device)
    check(*given, attention_mask=wide[..., :35])
    check(*given, attention_mask=wide[..., 0:70:2])
    check(*given, attention_mask=wide[..., 1:36])


@pytest.mark.parametrize("q_len", [1, 20])
@pytest.mark.parametrize("kv_len", [1, 33, 130])
def test_attention_key_padding_mask(device, dtype, q_len, kv_len):
    given = inputs.attention_inputs(3, 2, q_len, kv_len, 40, dtype, device)
    padding = torch.rand(3, kv_len) < 0.5
    padding[:, -1] = False
    padding[2] = True  # nothing to see
    padding = padding.to(device)
    out = check(*given, key_padding_mask=padding)
    assert (out[2] == 0).all()
    check(*given, key_padding_mask=padding[:1].expand(3, -1))
    check(*given, key_padding_mask=padding.repeat_interleave(2, dim=1)[:, ::2])


@causal
@pytest.mark.parametrize("q_len", [1, 6, 70])
def test_attention_kv_start(device, dtype, q_len, is_causal):
    given = inputs.attention_inputs(5, 2, q_len, 70, 40, dtype, device)
    starts = torch.tensor([0, 1, 33, 69, 70], device=device)
    out = check(*given, kv_start=starts, is_causal=is_causal)
    assert (out[4] == 0).all()


@pytest.mark.parametrize("kind", ["bool", "float32 lowest"])
def test_attention_everything_at_once(device, dtype, kind):
    given = inputs.attention_inputs(2, 4, 30, 50, 40, dtype, device, 2)
    mask = inputs.attention_mask(kind, (2, 1, 1, 50), dtype, device)
    starts = torch.tensor([0, 25], device=device)
    check(*given, attention_mask=mask, is_causal=True, kv_start=starts, softmax_scale=0.2)


@mask_kinds
@pytest.mark.parametrize("q_len", [1, 3, 65])
@pytest.mark.parametrize("kv_len", [1, 65, 600])
def test_attention_masked_rows_are_zero(device, dtype, kind, q_len, kv_len):
    given = inputs.attention_inputs(2, 2, q_len, kv_len, 40, dtype, device)
    mask = inputs.attention_mask(kind, (2, 1, q_len, kv_len), dtype, device)
    lowest = inputs.excluding_value(kind, mask.dtype)
    mask[0] = lowest  # the whole of one sequence
    mask[1, :, -1] = lowest  # one query of the other
    out = check(*given, attention_mask=mask)
    assert (out[0] == 0).all() and (out[1, -1] == 0).all()
    assert q_len == 1 or (out[1, 0] != 0).any()


@pytest.mark.parametrize("q_len", [1, 20])
def test_attention_float32_mask_of_the_lowest_half(device, q_len):
    """-65504 in float32 is no exclusion: a row of nothing else attends evenly."""
    given = inputs.attention_inputs(1, 2, q_len, 40, 16, torch.float16, device)
    mask = torch.full((1, 1, 1, 40), torch.finfo(torch.float16).min, device=device)
    out = ops.attention(*given, attention_mask=mask)
    assert torch.isfinite(out).all() and (out != 0).any()
