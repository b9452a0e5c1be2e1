"""masked_multi_head_attention: prefill and decoding; caches written where they should be alone."""

import pytest
import torch

from eet_patch import ops
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

layouts = pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
norms = pytest.mark.parametrize("norm", ["pre", "post", None])


def block(shape, num_heads, dtype, device, **options):
    options.setdefault("norm", "pre")
    return inputs.attention_block_inputs(shape, num_heads, dtype, device, **options)


def make_cache(given, capacity, past_len, layout="contiguous"):
    """Key and value caches with past_len random tokens; beyond is NaN, never to be read."""
    (batch_size, _, hidden_size), num_heads = given["hidden_states"].shape, given["num_heads"]
    shape = (batch_size, num_heads, capacity, hidden_size // num_heads)
    like = given["hidden_states"]
    both = inputs.randn(2, *shape, dtype=like.dtype, device=like.device)
    both[:, :, :, past_len:] = float("nan")
    if layout == "tokens first":  # (batch, capacity, heads, head_dim)
        both = both.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "part of a larger one":
        wide = both.new_full((2, batch_size, num_heads + 1, capacity + 3, shape[-1] + 8), 7.0)
        wide[:, :, :num_heads, :capacity, : shape[-1]] = both
        both = wide[:, :, :num_heads, :capacity, : shape[-1]]
    elif layout == "misaligned":
        both = inputs.misaligned(both)
    return {"key_cache": both[0], "value_cache": both[1], "past_len": past_len}


def with_caches(key_cache, value_cache, **given):
    """The reference with what it leaves in the caches, which are copies of the caller's."""
    out = reference.masked_multi_head_attention(
        **given, key_cache=key_cache, value_cache=value_cache
    )
    start = given["past_len"]
    new = slice(start, start + given["hidden_states"].shape[1])
    return out, key_cache[:, :, new], value_cache[:, :, new]


def same_bits(a, b):
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def check(**given):
    if given.get("key_cache") is None:
        out = ops.masked_multi_head_attention(**given)
        assert_as_accurate_as_torch(out, reference.masked_multi_head_attention, **given)
        return out
    caches = [given["key_cache"], given["value_cache"]]
    before = [cache.clone() for cache in caches]
    out = ops.masked_multi_head_attention(**given)
    start, end = given["past_len"], given["past_len"] + given["hidden_states"].shape[1]
    written = [cache[:, :, start:end] for cache in caches]
    assert_as_accurate_as_torch((out, *written), with_caches, **given)
    for old, new in zip(before, caches, strict=True):
        assert same_bits(old[:, :, :start], new[:, :, :start]), "the past was written to"
        assert same_bits(old[:, :, end:], new[:, :, end:]), (
            "the cache was written to beyond the end"
        )
    return out


# least, odd, GPT-2's
SHAPES = [((1, 1, 4), 1), ((3, 7, 33), 3), ((1, 64, 128), 2), ((5, 13, 96), 6), ((1, 100, 768), 12)]


@layouts
@pytest.mark.parametrize(("shape", "num_heads"), SHAPES)
def test_prefill_without_cache(device, dtype, shape, num_heads, weight_layout):
    check(**block(shape, num_heads, dtype, device, weight_layout=weight_layout))


@layouts
@pytest.mark.parametrize(("shape", "num_heads"), SHAPES)
def test_prefill_into_a_cache(device, dtype, shape, num_heads, weight_layout):
    given = block(shape, num_heads, dtype, device, weight_layout=weight_layout)
    check(**given, **make_cache(given, shape[1] + 5, 0))


@layouts
@norms
@pytest.mark.parametrize("add_residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 48), (2, 40, 48)])
def test_options(device, dtype, shape, bias, add_residual, norm, weight_layout):
    given = block(shape, 4, dtype, device, weight_layout=weight_layout, norm=norm, bias=bias)
    given |= {"add_residual": add_residual, "softmax_scale": 0.2, "norm_eps": 0.1}
    check(**given, **make_cache(given, 60, 9))


@pytest.mark.sanitize
@norms
def test_small(device, dtype, norm):
    cases = [(1, 0, "out_in"), (1, 40, "in_out"), (33, 3, "out_in"), (5, 0, "in_out")]
    for q_len, past_len, layout in cases:
        given = block((2, q_len, 42), 3, dtype, device, weight_layout=layout, norm=norm)
        starts = torch.tensor([0, 2], device=device)
        check(**given, **make_cache(given, past_len + q_len + 1, past_len), kv_start=starts)


@pytest.mark.parametrize(
    "past_len",
    [0, 1, 2, 14, 15, 16, 31, 32, 62, 63, 64, 127, 128, 255, 256, 511, 512, 1023, 1024, 2047, 2048],
)
def test_decoding(device, dtype, past_len):
    given = block((2, 1, 80), 2, dtype, device)
    check(**given, **make_cache(given, past_len + 1 + past_len % 3, past_len))


@pytest.mark.parametrize("q_len", [2, 3, 8, 17, 65])
@pytest.mark.parametrize("past_len", [1, 30, 64, 130])
def test_several_tokens_after_a_past(device, dtype, q_len, past_len):
    given = block((2, q_len, 48), 4, dtype, device)
    check(**given, **make_cache(given, past_len + q_len, past_len))


@pytest.mark.parametrize("num_heads", [64, 8, 4, 2, 1])
@pytest.mark.parametrize("q_len", [1, 70])
def test_head_dims(device, dtype, q_len, num_heads):
    given = block((1, q_len, 64), num_heads, dtype, device)
    check(**given, **make_cache(given, q_len + 20, 20))


@pytest.mark.parametrize("head_dim", [1, 7, 33, 40, 72, 80, 96, 128, 256])
def test_other_head_dims(device, dtype, head_dim):
    given = block((2, 1, 2 * head_dim), 2, dtype, device)
    check(**given, **make_cache(given, 40, 35))


@norms
@pytest.mark.parametrize("batch_size", [1, 2, 7, 8, 9, 16, 33, 63, 64, 65, 66, 70])
def test_batch_sizes(device, dtype, batch_size, norm):
    """Rows of one decoding step, across MAX_SKINNY_ROWS."""
    given = block((batch_size, 1, 40), 5, dtype, device, norm=norm)
    starts = torch.randint(0, 13, (batch_size,)).to(device)
    check(**given, **make_cache(given, 15, 13), kv_start=starts)


@pytest.mark.parametrize("layout", ["tokens first", "part of a larger one", "misaligned"])
@pytest.mark.parametrize("q_len", [1, 3, 70])
def test_cache_strides(device, dtype, q_len, layout):
    given = block((2, q_len, 64), 4, dtype, device)
    check(**given, **make_cache(given, q_len + 8, 5, layout))


@pytest.mark.parametrize("q_len", [1, 70])
def test_a_cache_in_a_larger_buffer_leaves_the_rest(device, dtype, q_len):
    given = block((2, q_len, 64), 4, dtype, device)
    cache = make_cache(given, q_len + 8, 5, "part of a larger one")
    buffer = torch.as_strided(cache["key_cache"], (cache["key_cache"]._base.numel(),), (1,), 0)
    view = cache["key_cache"]
    outside = torch.ones_like(buffer, dtype=torch.bool)
    for part in (cache["key_cache"], cache["value_cache"]):
        marker = outside.as_strided(part.shape, part.stride(), part.storage_offset())
        marker.fill_(False)
    assert outside.any() and not outside.all() and view.data_ptr() == buffer.data_ptr()
    ops.masked_multi_head_attention(**given, **cache)
    assert (buffer[outside] == 7).all()


@pytest.mark.parametrize("q_len", [1, 6, 70])
def test_left_padding(device, dtype, q_len):
    """Up to a sequence of which every key is padding: its attention is zero."""
    given = block((5, q_len, 48), 4, dtype, device)
    starts = torch.tensor([0, 1, 4, 10, 10 + q_len], device=device)
    check(**given, **make_cache(given, 10 + q_len, 10), kv_start=starts)
    starts = torch.tensor([0, 1, q_len // 2, q_len - 1, q_len], device=device)
    check(**given, kv_start=starts)


@pytest.mark.parametrize("q_len", [1, 5, 70])
@pytest.mark.parametrize("kind", ["bool", "float32 -inf", "element -inf"])
def test_masks(device, dtype, kind, q_len):
    given = block((2, q_len, 48), 4, dtype, device)
    kv_len = 9 + q_len
    for shape in ((2, 1, 1, kv_len), (1, 1, q_len, kv_len), (2, 4, q_len, kv_len)):
        mask = inputs.attention_mask(kind, shape, dtype, device)
        mask[0, :, 0] = inputs.excluding_value(kind, mask.dtype)  # a query that sees nothing
        cache = make_cache(given, kv_len + 2, 9)
        check(**given, **cache, attention_mask=mask)
        cache = make_cache(given, kv_len + 2, 9)
        starts = torch.tensor([0, 3], device=device)
        check(**given, **cache, attention_mask=mask.expand(2, -1, -1, -1), kv_start=starts)


def test_a_static_mask_wider_than_the_keys(device, dtype):
    """A slice of the mask of a whole static cache, batch stride 0."""
    given = block((2, 1, 48), 4, dtype, device)
    mask = (torch.rand(1, 1, 1, 64) < 0.6).to(device).expand(2, 1, 1, 64)
    check(**given, **make_cache(given, 64, 20), attention_mask=mask[..., :21])


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("prompt", [1, 5, 70])
def test_generation_step_by_step(device, dtype, prompt, norm):
    """A prompt, then three tokens one at a time, on the caches that the steps before have left."""
    given = block((3, prompt + 3, 48), 4, dtype, device, norm=norm)
    tokens = given.pop("hidden_states")
    cache = make_cache({"hidden_states": tokens, **given}, prompt + 4, 0)
    starts = torch.tensor([0, 0, prompt // 2], device=device)
    bounds = [0, *range(prompt, prompt + 4)]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        cache["past_len"] = start
        step = tokens[:, start:end].contiguous()
        check(hidden_states=step, **given, **cache, kv_start=starts)


@layouts
@pytest.mark.parametrize("q_len", [1, 9, 65])
def test_misaligned(device, dtype, q_len, weight_layout):
    given = block((1, q_len, 64), 4, dtype, device, weight_layout=weight_layout)
    cache = make_cache(given, q_len + 8, 5)
    check(**inputs.all_misaligned(given), **cache)


@pytest.mark.parametrize("q_len", [1, 3, 70])
def test_a_nan_stays_in_its_sequence(device, dtype, q_len):
    given = block((3, q_len, 48), 4, dtype, device)
    cache = make_cache(given, q_len + 9, 9)
    again = {"key_cache": cache["key_cache"].clone(), "value_cache": cache["value_cache"].clone()}
    expected = ops.masked_multi_head_attention(**given, **cache)
    given["hidden_states"][1] = float("nan")
    out = ops.masked_multi_head_attention(**given, **cache | again)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


@pytest.mark.slow
@layouts
@pytest.mark.parametrize("shape", [(1, 1, 4096), (8, 1, 1024), (1, 200, 1024)])
def test_heavy(device, dtype, shape, weight_layout):
    given = block(shape, 16, dtype, device, weight_layout=weight_layout)
    check(**given, **make_cache(given, shape[1] + 1000, 1000))


@pytest.mark.parametrize("shape", [(0, 1, 16), (2, 0, 16)])
@pytest.mark.parametrize("cached", [True, False])
def test_nothing(device, dtype, shape, cached):
    given = block(shape, 4, dtype, device)
    cache = make_cache(given, 8, 3) if cached else {}
    before = cache["key_cache"].clone() if cached else None
    out = ops.masked_multi_head_attention(**given, **cache)
    assert out.shape == shape and out.dtype == dtype
    assert not cached or same_bits(before, cache["key_cache"])


def cache_of(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": torch.zeros(6, 8)}, ValueError, "hidden_states must have 3 dimensions"),
        (
            {"hidden_states": torch.zeros(3, 2, 8).transpose(0, 1)},
            ValueError,
            "hidden_states must be contiguous",
        ),
        ({"num_heads": 5}, ValueError, "num_heads must divide hidden_size, got 5"),
        ({"query_weight": torch.zeros(8, 9)}, ValueError, r"query_weight must have shape \(8, 8\)"),
        ({"out_bias": torch.zeros(9)}, ValueError, r"out_bias must have shape \(8,\)"),
        ({"norm_weight": None}, ValueError, "norm_weight must be given with norm='pre'"),
        ({"norm": "Pre"}, ValueError, "norm must be one of"),
        ({"key_cache": None}, ValueError, "key_cache and value_cache must be given together"),
        ({"value_cache": None}, ValueError, "key_cache and value_cache must be given together"),
        (
            {"key_cache": None, "value_cache": None},
            ValueError,
            "past_len must be 0 without a cache, got 4",
        ),
        ({"key_cache": 1}, TypeError, "key_cache must be a torch.Tensor"),
        ({"key_cache": cache_of(2, 4, 9, 2).half()}, TypeError, "key_cache must have dtype"),
        (
            {"key_cache": cache_of(2, 4, 9, 2, device="meta")},
            ValueError,
            "key_cache must be on cpu",
        ),
        ({"key_cache": cache_of(2, 4, 18)}, ValueError, "key_cache must have 4 dimensions"),
        (
            {"key_cache": cache_of(1, 4, 9, 2)},
            ValueError,
            r"key_cache must have shape \(2, 4, 9, 2\)",
        ),
        (
            {"value_cache": cache_of(2, 2, 9, 4)},
            ValueError,
            r"value_cache must have shape \(2, 4, 9, 2\)",
        ),
        (
            {"value_cache": cache_of(2, 4, 9, 2).bfloat16()},
            TypeError,
            "value_cache must have dtype",
        ),
        (
            {"value_cache": cache_of(2, 9, 4, 2).transpose(1, 2)},
            ValueError,
            "key_cache and value_cache must have equal strides",
        ),
        (
            {name: cache_of(2, 4, 2, 9).transpose(2, 3) for name in ("key_cache", "value_cache")},
            ValueError,
            "a contiguous last",
        ),
        ({"past_len": 7}, ValueError, r"past_len must be 0 to 6 \(capacity less q_len\), got 7"),
        ({"past_len": -1}, ValueError, "past_len must be 0 to 6"),
        # A view has the strides of its larger buffer, but must not be written beyond its own end.
        (
            {"value_cache": cache_of(2, 4, 9, 2)[:, :, :6]},
            ValueError,
            "value_cache must have shape",
        ),
        ({"kv_start": torch.zeros(2).int()}, TypeError, "kv_start must be int64"),
        ({"kv_start": torch.zeros(1).long()}, ValueError, r"kv_start must have shape \(2,\)"),
        ({"kv_start": 0}, TypeError, "kv_start must be a torch.Tensor"),
        (
            {"attention_mask": torch.zeros(2, 1, 3, 9)},
            ValueError,
            r"attention_mask must broadcast to .*\(2, 4, 3, 7\)",
        ),
        (
            {"attention_mask": torch.zeros(2, 1, 3, 7).int()},
            TypeError,
            "attention_mask must be bool",
        ),
    ],
)
def test_refuses(changes, error, message):
    given = block((2, 3, 8), 4, torch.float32, "cpu")
    caches = {"key_cache": cache_of(2, 4, 9, 2), "value_cache": cache_of(2, 4, 9, 2), "past_len": 4}
    with pytest.raises(error, match=message):
        ops.masked_multi_head_attention(**given | caches | changes)
