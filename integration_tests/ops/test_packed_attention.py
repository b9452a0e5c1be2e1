"""Attention over packed tokens by Hopper's warpgroup products: tiles, tails, views and graphs."""

import pytest
import torch

from eet_patch import ops
from eet_patch.ops import launch
from eet_patch.ops._extension import NO_MASK
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

HALF = [torch.float16, torch.bfloat16]
half = pytest.mark.parametrize("dtype", HALF, ids=str)
# Around tiles of 64 and 128 keys and queries, and more tiles than stages hold.
LENGTHS = [
    [1],
    [64],
    [65, 63],
    [128, 0, 127, 129],
    [17, 600, 1, 0, 383, 64, 449, 0, 0],
    [5] * 40 + [200] + [31] * 7,
    [1025, 3],
]


@pytest.fixture
def hopper():
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    if not launch.has_packed_attention(0):
        pytest.skip("the GPU, or what the extension was built for, is not sm_90a")
    return torch.device("cuda", 0)


def packed(lengths, device, longest=None):
    starts = inputs.cu_seqlens_of(lengths, device)
    return {"cu_seqlens": starts, "max_seqlen": longest or max(lengths)}


def attend(query, key, value, **options):
    """The op, known to run the kernel under test."""
    assert launch.takes_packed_attention(query, key, value, False, 1.0)
    return ops.attention(query, key, value, **options)


@half
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths[:5])))
def test_packed_attention(hopper, dtype, head_dim, lengths):
    qkv = inputs.randn(3, sum(lengths), 3, head_dim, dtype=dtype, device=hopper)
    options = packed(lengths, hopper)
    out = attend(*qkv, **options)
    assert_as_accurate_as_torch(out, reference.attention, *qkv, **options)
    again = attend(*qkv, **options)
    assert torch.equal(out, again)
    assert_as_accurate_as_torch(
        attend(*qkv, **packed(lengths, hopper, max(lengths) + 200)),
        reference.attention,
        *qkv,
        **options,
    )


@half
@pytest.mark.parametrize("tile", range(7))
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: "-".join(map(str, lengths[:5])))
def test_tiles_of_packed_attention(hopper, dtype, tile, lengths):
    """Each size of tile, where it serves such lengths."""
    if tile < 2 and max(lengths) > 128:
        pytest.skip("the tile is for sequences of up to 128 tokens")
    qkv = inputs.randn(3, sum(lengths), 3, 64, dtype=dtype, device=hopper)
    starts = inputs.cu_seqlens_of(lengths, hopper)
    out = launch.attention(
        *qkv, NO_MASK, False, 0.125, cu_seqlens=starts, max_seqlen=max(lengths), tile=tile
    )
    options = packed(lengths, hopper)
    assert_as_accurate_as_torch(out, reference.attention, *qkv, **options)


def test_packed_attention_refuses_a_tile_too_short(hopper):
    qkv = inputs.randn(3, 129, 3, 64, dtype=torch.float16, device=hopper)
    starts = inputs.cu_seqlens_of([129], hopper)
    with pytest.raises(RuntimeError, match="attention"):
        launch.attention(*qkv, NO_MASK, False, 0.125, cu_seqlens=starts, max_seqlen=129, tile=0)


def test_packed_attention_runs_its_kernel(hopper):
    qkv = inputs.randn(3, 40, 2, 64, dtype=torch.float16, device=hopper)
    options = packed([9, 31], hopper)
    attend(*qkv, **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        attend(*qkv, **options)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert any("packed_attention_kernel" in name for name in names), names


@half
@pytest.mark.sanitize
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_packed_attention_of_views(hopper, dtype, head_dim):
    lengths = [9, 0, 130, 1]
    options = packed(lengths, hopper)
    rows = sum(lengths)
    fused = inputs.randn(rows, 3, 4, head_dim, dtype=dtype, device=hopper)
    heads_first = fused.permute(1, 2, 0, 3).contiguous().transpose(1, 2)
    grouped = (fused[:, 0], fused[:, 1, :2], fused[:, 2, :2])
    for query, key, value in (fused.unbind(1), heads_first, grouped):
        out = attend(query, key, value, **options)
        assert_as_accurate_as_torch(out, reference.attention, query, key, value, **options)


@half
def test_packed_attention_of_large_scores(hopper, dtype):
    """Maxima that rise from tile to tile, by more and by less than what is let pass."""
    lengths = [400, 77]
    qkv = inputs.randn(3, sum(lengths), 2, 64, dtype=dtype, device=hopper)
    qkv[1] *= torch.linspace(0.1, 12, sum(lengths), device=hopper)[:, None, None].to(dtype)
    options = packed(lengths, hopper) | {"softmax_scale": 0.3}
    out = attend(*qkv, **options)
    assert_as_accurate_as_torch(out, reference.attention, *qkv, **options)


@half
def test_packed_sequences_do_not_see_each_other(hopper, dtype):
    lengths = [20, 133, 70]
    options = packed(lengths, hopper)
    query, key, value = inputs.randn(3, sum(lengths), 2, 64, dtype=dtype, device=hopper)
    expected = attend(query, key, value, **options)
    for tensor in (query, key, value):
        tensor[20:153] = float("nan")
    out = attend(query, key, value, **options)
    assert out[20:153].isnan().all()
    assert torch.equal(out[:20], expected[:20]) and torch.equal(out[153:], expected[153:])


def test_packed_attention_behind_the_last_sequence(hopper):
    """Rows that a rounded number of them adds are neither read nor written."""
    qkv = torch.full((3, 256, 2, 64), float("nan"), dtype=torch.float16, device=hopper)
    qkv[:, :150] = inputs.randn(3, 150, 2, 64, dtype=torch.float16, device=hopper)
    options = packed([100, 50, 0, 0, 0], hopper, 128)
    out = attend(*qkv, **options)[:150]
    expected = attend(*(t[:150] for t in qkv), **options)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("longest", [128, 512])
def test_packed_attention_in_a_graph(hopper, longest):
    """One graph serves whatever lengths its offsets hold at the time."""
    rows, batch = 1024, 8
    qkv = inputs.randn(3, rows, 2, 64, dtype=torch.float16, device=hopper)
    starts = torch.zeros(batch + 1, dtype=torch.int64, device=hopper)
    options = {"cu_seqlens": starts, "max_seqlen": longest}
    attend(*qkv, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    scratch = torch.ones(1 << 16, device=hopper)
    with torch.cuda.graph(graph):
        scratch.zero_()  # what is ahead may be no kernel
        out = attend(*qkv, **options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(5):
        lengths = torch.randint(0, longest + 1, (batch,), generator=generator)
        lengths[-1] = 0
        lengths = torch.where(lengths.cumsum(0) > rows, 0, lengths)
        starts[1:] = lengths.cumsum(0).to(hopper)
        graph.replay()
        total = int(lengths.sum())
        expected = reference.attention(*(t.double() for t in qkv), **options)[:total]
        torch.testing.assert_close(out[:total].double(), expected, rtol=5e-3, atol=2e-3)


def test_what_packed_attention_leaves_to_others(hopper):
    query = torch.zeros(8, 2, 64, dtype=torch.float16, device=hopper)
    assert launch.takes_packed_attention(query, query, query, False, 0.125)
    odd = inputs.misaligned(query)
    narrow = query[..., :40]
    for tensors, causal, scale in (
        ((query,) * 3, True, 0.125),
        ((query,) * 3, False, 0.0),
        ((query,) * 3, False, -1.0),
        ((query, odd, query), False, 0.125),
        ((narrow,) * 3, False, 0.125),
        ((query.float(),) * 3, False, 0.125),
    ):
        assert not launch.takes_packed_attention(*tensors, causal, scale)
