"""pack_tokens and gather_rows: which tokens are real, and rows moved by index."""

import pytest
import torch

from eet_patch import ops
from eet_patch.ops import packing
from eet_patch.testing import inputs


def keep_of(kind, batch, seq_len, device):
    """A bool mask (batch, seq_len), True = real."""
    generator = torch.Generator().manual_seed(batch * 1000 + seq_len)
    places = torch.arange(seq_len)
    lengths = torch.randint(0, seq_len + 1, (batch, 1), generator=generator)
    keep = {
        "full": torch.ones(batch, seq_len, dtype=torch.bool),
        "none": torch.zeros(batch, seq_len, dtype=torch.bool),
        "right": places < lengths,
        "left": places >= seq_len - lengths,
        "random": torch.rand(batch, seq_len, generator=generator) < 0.6,
    }
    return keep[kind].to(device)


def check(packing, keep):
    batch, seq_len = keep.shape
    places = keep.flatten().nonzero()[:, 0]
    count, lengths = len(places), keep.sum(1)
    assert packing.summary.tolist() == [count, int(lengths.max()), 0]
    assert torch.equal(packing.tokens[:count].long(), places)
    assert (packing.tokens[count:] == -1).all() and len(packing.tokens) >= batch * seq_len
    rows = torch.full((batch * seq_len,), -1, device=keep.device)
    rows[places] = torch.arange(count, device=keep.device)
    assert torch.equal(packing.rows.long(), rows)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    assert torch.equal(packing.cu_seqlens, starts)
    assert torch.equal(packing.short_cu_seqlens.long(), starts)


SIZES = [(1, 1), (3, 7), (2, 300), (300, 2), (5, 1100), (9, 1100), (300, 40)]
KINDS = ["full", "none", "right", "left", "random"]


@pytest.mark.sanitize
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pack_tokens(device, size, kind):
    keep = keep_of(kind, *size, device)
    check(ops.pack_tokens(keep), keep)
    check(ops.pack_tokens(keep.long()), keep)
    strided = keep.long().repeat_interleave(2, 1)[:, ::2]
    check(ops.pack_tokens(strided), keep)


def additive(mask, dtype):
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["bool", "float32", "element", "infinite"])
def test_masks_of_four_dimensions(device, dtype, kind, form):
    keep = keep_of(kind, 3, 70, device)
    keys = keep[:, None, None, :]
    pairs = keys & keep[:, None, :, None]
    shapes = [keys, keys.expand(3, 1, 70, 70), keys.expand(3, 4, 70, 70).contiguous(), pairs]
    for mask in shapes:
        if form == "float32":
            mask = additive(mask, torch.float32)
        elif form == "element":
            mask = additive(mask, dtype)
        elif form == "infinite":
            mask = torch.zeros(mask.shape, device=device).masked_fill_(~mask, float("-inf"))
        check(ops.pack_tokens(mask, num_heads=4, dtype=dtype), keep)


def test_masks_that_say_more(device):
    keep = keep_of("right", 3, 20, device)
    keep[:, :4] = True
    mask = keep[:, None, None, :].expand(3, 2, 20, 20).clone()
    assert ops.pack_tokens(mask, num_heads=2).summary[2] == 0
    one_head = mask.clone()
    one_head[1, 1, 2, 3] ^= True  # one real query of one head
    bias = additive(mask, torch.float32)
    bias[2, 0, 1, 1] = -10000.0
    causal = torch.ones(20, 20, dtype=torch.bool, device=device).tril()[None, None]
    for other in (one_head, bias, causal.expand(3, 1, 20, 20)):
        assert ops.pack_tokens(other, num_heads=2).summary[2] == 1
    two = keep.long()
    two[0, 0] = 2  # neither 0 nor 1
    assert ops.pack_tokens(two).summary[2] == 1
    hidden = mask.clone()
    hidden[..., 19] = False
    hidden[:, :, 19, 1:] = False  # a query that is padding may see less than the others
    assert ops.pack_tokens(hidden, num_heads=2).summary[2] == 0


@pytest.mark.sanitize
@pytest.mark.parametrize("hidden_size", [1, 7, 64, 1000])
def test_gather_rows(device, dtype, hidden_size):
    rows = inputs.randn(9, hidden_size, dtype=dtype, device=device)
    index = torch.tensor([8, 0, -1, 3, 3, -7], dtype=torch.int32, device=device)
    out = ops.gather_rows(rows, index)
    expected = rows[index.clamp(min=0).long()].masked_fill((index < 0)[:, None], 0)
    assert torch.equal(out, expected)
    assert ops.gather_rows(rows, index[:0]).shape == (0, hidden_size)


@pytest.mark.sanitize
@pytest.mark.parametrize("hidden_size", [7, 64, 1000])
def test_embedding_of_packed_tokens(device, dtype, hidden_size):
    words, positions = inputs.randn(2, 50, hidden_size, dtype=dtype, device=device)
    weight, bias = inputs.randn(2, hidden_size, dtype=dtype, device=device)
    ids = torch.randint(0, 50, (3, 5), device=device)
    places = torch.arange(5, device=device)[None]
    tables = (words, places, positions, ids % 2, positions, weight, bias)
    tokens = torch.tensor([14, -1, 0, 6, -1], dtype=torch.int32, device=device)
    out = ops.embedding(ids, *tables, tokens=tokens)
    expected = ops.embedding(ids, *tables).view(15, hidden_size)[tokens.clamp(min=0).long()]
    assert torch.equal(out, expected.masked_fill((tokens < 0)[:, None], 0))


@pytest.mark.sanitize
@pytest.mark.parametrize("hidden_size", [7, 64, 768, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_pack_and_embed(device, dtype, kind, hidden_size):
    """Both in one launch, into room that holds what other calls left there, against one by one."""
    batch, seq_len, capacity, max_batch = 3, 70, 224, 4
    keep = keep_of(kind, batch, seq_len, device)
    words, places = inputs.randn(2, 50, hidden_size, dtype=dtype, device=device)
    types = inputs.randn(2, hidden_size, dtype=dtype, device=device)
    weight, bias = inputs.randn(2, hidden_size, dtype=dtype, device=device)
    ids = torch.randint(0, 50, (batch, seq_len), device=device)
    positions = torch.arange(100, device=device)[None] % 50
    starts = packing.Starts.empty(max_batch, torch.device(device))
    integers = torch.full((2000,), 7, dtype=torch.int32, device=device)
    room = packing.Places.within(integers, capacity, batch * seq_len, batch)
    summary = torch.zeros(4, dtype=torch.int64, device=device)
    out = torch.full((capacity, hidden_size), 3.0, dtype=dtype, device=device)
    tables = packing.lookup_tables((words, places, types), weight, bias, 1e-12)
    mask = packing.padding_mask_form(keep, (batch, 1, seq_len, seq_len), out)
    lookup = packing.Lookup((ids, positions, ids % 2), seq_len, tables)
    packing.launch_pack_and_embed(
        out, lookup, mask, batch, seq_len, max_batch, starts, room, summary, 5
    )
    found = packing.Packing(*room[:2], *starts, summary[:3])
    starts_so_far = packing.Starts(*(t[: batch + 1] for t in starts))
    check(found._replace(**starts_so_far._asdict()), keep)
    assert summary[3] == 5 and (starts.cu_seqlens[batch:] == keep.sum()).all()
    expected = ops.embedding(
        ids,
        words,
        positions[:, :seq_len],
        places,
        ids % 2,
        types,
        weight,
        bias,
        tokens=room.tokens,
    )
    assert torch.equal(out, expected)


def test_arguments():
    rows = torch.zeros(3, 4)
    with pytest.raises(TypeError, match="index must be int32"):
        ops.gather_rows(rows, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="attention_mask must have 2 or 4 dimensions"):
        ops.pack_tokens(torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="attention_mask must be bool"):
        ops.pack_tokens(torch.ones(2, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match="tokens must be int32"):
        ids = torch.zeros(1, 2, dtype=torch.int64)
        ops.embedding(ids, rows, tokens=torch.zeros(2, dtype=torch.int64))
