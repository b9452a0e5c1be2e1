"""decode_layers of an encoder-decoder: post-norm, and cross-attention over keys and values that the
beams of a sentence share; and the step's attention by itself.
"""

import pytest
import torch

from eet_patch.ops import decode
from eet_patch.testing import assert_as_accurate_as_torch, reference
from eet_patch.testing.accuracy import copied, relative_error

NORM_EPS = 1e-5
WEIGHTS_BOUND = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def random(device, dtype, *shape, std=1.0):
    return (torch.randn(*shape) * std).to(device, dtype)


def layer_of(device, dtype, hidden_size, inner_size, cross, bias, parts):
    def weight(n_in, n_out):
        return random(device, dtype, n_out, n_in, std=n_in**-0.5)

    def vector(size, mean=0.0):
        return random(device, dtype, size, std=0.3) + mean

    layer = {"qkv_weight": weight(hidden_size, 3 * hidden_size), "parts": parts}
    layer["qkv_bias"] = vector(3 * hidden_size) if bias else None
    sizes = {
        "out": (hidden_size, hidden_size),
        "fc1": (hidden_size, inner_size),
        "fc2": (inner_size, hidden_size),
    }
    if cross:
        sizes |= dict.fromkeys(("cross_query", "cross_out"), (hidden_size, hidden_size))
    for name, (n_in, n_out) in sizes.items():
        layer[f"{name}_weight"] = weight(n_in, n_out)
        layer[f"{name}_bias"] = vector(n_out) if bias else None
    for name in ("norm1", "norm2", *(["cross_norm"] if cross else [])):
        layer[f"{name}_weight"] = vector(hidden_size, 1.0)
        layer[f"{name}_bias"] = vector(hidden_size) if bias else None
    return layer


def case(
    device,
    dtype,
    sentences=3,
    beams=2,
    num_heads=4,
    head_dim=16,
    capacity=20,
    length=5,
    cross_len=9,
    ends=None,
    starts=None,
    post_norm=False,
    cross=True,
    bias=True,
    num_layers=2,
    parts=3,
    weights=True,
    activation="relu",
):
    """Arguments of the reference: beams with parents among those of their sentence. What no row
    may read holds NaN.
    """
    rows, hidden_size = sentences * beams, num_heads * head_dim
    ends = ends or [cross_len - s % 3 for s in range(sentences)]
    caches, cross_caches = [], []
    for _ in range(num_layers):
        pair = [random(device, dtype, rows, num_heads, capacity, head_dim) for _ in range(2)]
        for cache in pair:
            cache[:, :, length:] = float("nan")
        caches.append(tuple(pair))
        # As the encoder's output is projected: (sentences, positions, heads, head_dim).
        pair = [random(device, dtype, sentences, cross_len, hidden_size) for _ in range(2)]
        for tensor in pair:
            for s in range(sentences):
                tensor[s, ends[s] :] = float("nan")
                tensor[s, : starts[s] if starts else 0] = float("nan")
        cross_caches.append(
            tuple(t.view(sentences, cross_len, num_heads, head_dim).transpose(1, 2) for t in pair)
        )

    def integers(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    sentence = torch.arange(rows) // beams
    key_rows = sentence[:, None] * beams + torch.randint(beams, (rows, capacity))
    given = {
        "hidden_states": random(device, dtype, rows, hidden_size),
        "layers": [
            layer_of(device, dtype, hidden_size, 3 * hidden_size, cross, bias, parts)
            for _ in range(num_layers)
        ],
        "caches": caches,
        "lengths": integers([length] * rows),
        "num_heads": num_heads,
        "activation": activation,
        "norm_eps": NORM_EPS,
        "softmax_scale": head_dim**-0.5,
        "weight_layout": "out_in",
        "key_rows": key_rows.int().to(device),
        "post_norm": post_norm,
    }
    if cross:
        given["cross_caches"] = cross_caches
        given["cross_rows"] = sentence.int().to(device)
        given["cross_start"] = None if starts is None else integers(starts)[sentence.to(device)]
        given["cross_lengths"] = integers(ends)[sentence.to(device)]
        if weights:
            shape = (rows, capacity, cross_len)
            given["cross_weights"] = torch.full(shape, float("nan"), device=device)
    return given


def cross_of(given):
    if "cross_caches" not in given:
        return None
    return decode.CrossView(
        given["cross_rows"],
        given["cross_start"],
        given["cross_lengths"],
        given.get("cross_weights"),
    )


def table_of(given):
    layers = []
    for index, (layer, pair) in enumerate(zip(given["layers"], given["caches"], strict=True)):
        cross = None
        if "cross_caches" in given:
            names = ("norm_weight", "norm_bias", "query_weight", "query_bias", "out_weight")
            cross = decode.CrossLayer(
                *(layer[f"cross_{name}"] for name in names),
                layer["cross_out_bias"],
                *given["cross_caches"][index],
            )
        bias, parts = layer["qkv_bias"], layer["parts"]
        layers.append(
            decode.DecodeLayer(
                layer["norm1_weight"],
                layer["norm1_bias"],
                layer["qkv_weight"].chunk(parts),
                (None,) * parts if bias is None else bias.chunk(parts),
                *(layer[f"{n}_{k}"] for n in ("out", "norm2", "fc1", "fc2")
                  for k in ("weight", "bias")),
                *pair,
                given["softmax_scale"],
                cross,
            )
        )  # fmt: skip
    return decode.pack_layers(layers, False, given["post_norm"])


def run(given):
    table, hidden_states = table_of(given), given["hidden_states"]
    workspace = decode.decode_layers_workspace(table, hidden_states, hidden_states.shape[0])
    return decode.decode_layers(
        hidden_states,
        table,
        given["lengths"],
        given["activation"],
        NORM_EPS,
        workspace,
        torch.full_like(hidden_states, float("nan")),
        key_rows=given["key_rows"],
        cross=cross_of(given),
    )


def check(given):
    if given["hidden_states"].device.type == "cuda" and given["hidden_states"].shape[0] > 64:
        with pytest.raises(ValueError, match="hidden_states must have at most 64 rows"):
            run(given)  # the search goes through torch's products there
        return
    before = copied(given)
    before["layers"] = [{k: v for k, v in layer.items() if k != "parts"} for layer in
                        before["layers"]]  # fmt: skip
    out = run(given)
    assert_as_accurate_as_torch(out, reference.decode_layers, **copied(before))
    expected = copied(before)
    reference.decode_layers(**expected)
    rows, length = out.shape[0], int(given["lengths"][0])
    bound = WEIGHTS_BOUND[out.dtype]
    for ours, theirs in zip(given["caches"], expected["caches"], strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            assert relative_error(mine[:rows, :, length], other[:rows, :, length]) <= bound
    if "cross_weights" in given:
        ours, theirs = given["cross_weights"], expected["cross_weights"]
        assert relative_error(ours[:, length], theirs[:, length]) <= bound
        others = torch.arange(ours.shape[1], device=ours.device) != length
        assert ours[:, others].isnan().all()  # nothing else was written
    return out


@pytest.mark.sanitize
@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_decode_cross(device, dtype, post_norm, cross, parts):
    check(case(device, dtype, post_norm=post_norm, cross=cross, parts=parts))


@pytest.mark.parametrize("post_norm", [True, False])
def test_decode_cross_without_biases(device, dtype, post_norm):
    check(case(device, dtype, post_norm=post_norm, bias=False))


@pytest.mark.sanitize
@pytest.mark.parametrize("head_dim", [8, 20, 24, 64, 96, 128, 256])
def test_decode_cross_head_dims(device, dtype, head_dim):
    check(case(device, dtype, num_heads=2, head_dim=head_dim, post_norm=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("cross_len", [1, 2, 31, 64, 65, 127, 300, 1024])
def test_decode_cross_lengths(device, dtype, cross_len):
    ends = [cross_len, max(1, cross_len // 3)]
    check(case(device, dtype, sentences=2, cross_len=cross_len, ends=ends, head_dim=64))


@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("rows", [(1, 1), (1, 5), (7, 1), (8, 4), (13, 5), (32, 5), (51, 5)])
def test_decode_cross_rows(device, dtype, rows, post_norm):
    sentences, beams = rows
    given = {"sentences": sentences, "beams": beams, "head_dim": 64}
    check(case(device, dtype, **given, post_norm=post_norm))


@pytest.mark.parametrize("rows", [(2, 4), (8, 4), (12, 5)])
def test_decode_cross_at_size(device, dtype, rows):
    """The heads and widths of a large translation model."""
    if device.type == "cpu":
        pytest.skip("slow on a CPU, and no other code")
    sentences, beams = rows
    given = {"sentences": sentences, "beams": beams, "num_heads": 16, "head_dim": 64}
    check(case(device, dtype, **given, capacity=64, length=40, cross_len=30, post_norm=True))


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [(2, 2), (24, 3)])
def test_decode_cross_of_odd_width(device, dtype, rows):
    """A width that tensor cores don't take: norms behind the blocks are launches of their own."""
    sentences, beams = rows
    given = {"sentences": sentences, "beams": beams, "num_heads": 3, "head_dim": 20}
    check(case(device, dtype, **given, post_norm=True))


@pytest.mark.sanitize
def test_decode_cross_padding_on_the_left(device, dtype):
    check(case(device, dtype, starts=[0, 3, 8], ends=[9, 9, 9]))


def test_decode_cross_without_weights(device, dtype):
    check(case(device, dtype, weights=False))


def test_a_sentence_without_keys_yields_zeros(device):
    """Its cross-attention adds the bias of its output alone; nothing becomes NaN."""
    given = case(device, torch.float32, ends=[9, 4, 9], starts=[0, 4, 0])
    out = run(given)
    assert out.isfinite().all()
    assert (given["cross_weights"][2:4, 5] == 0).all()


def test_decode_cross_first_step(device, dtype):
    check(case(device, dtype, length=0, post_norm=True))


def test_decode_cross_twice_gives_the_same_bits(device, dtype):
    given = case(device, dtype, cross_len=300, ends=[300, 200, 77], head_dim=64)
    first = run(copied(given))
    for _ in range(3):
        assert torch.equal(run(copied(given)), first)


@pytest.mark.sanitize
@pytest.mark.parametrize("rows", [6, 70])
@pytest.mark.parametrize("appends", [True, False])
def test_step_attention(device, dtype, rows, appends):
    """The attention by itself, over scattered keys and with those of other sentences hidden."""
    heads, head_dim, capacity = 4, 64, 50
    hidden_size = heads * head_dim
    lengths = torch.tensor([(7 * row + 1) % 49 for row in range(rows)], dtype=torch.int32)
    cache_rows = torch.randperm(rows).int()
    key_rows = torch.randint(rows, (rows, capacity)).int() if appends else None
    if appends:  # nobody reads what another row writes in this step
        written = torch.zeros(rows, capacity, dtype=torch.bool)
        written[cache_rows.long(), lengths.long()] = True
        taken = written[key_rows.long(), torch.arange(capacity)]
        key_rows = torch.where(taken, cache_rows[:, None], key_rows)
    starts = (lengths // 3).int()
    keys, values = (random(device, dtype, rows, heads, capacity, head_dim) for _ in range(2))
    qkv = random(device, dtype, rows, 3 * hidden_size)

    def attention(qkv, keys, values):
        outs, weights = [], torch.zeros(rows, capacity, dtype=torch.float64)
        for row in range(rows):
            length, own = int(lengths[row]), int(cache_rows[row])
            query, key, value = qkv[row].view(3, heads, head_dim)
            at = torch.arange(length, device=qkv.device)
            source = torch.full_like(at, own) if key_rows is None else key_rows[row, :length]
            source = source.to(at)
            k, v = (t[source.long(), :, at] for t in (keys, values))
            if appends:
                k, v = torch.cat([k, key[None]]), torch.cat([v, value[None]])
            start = int(starts[row])
            k, v = (t[start:].transpose(0, 1) for t in (k, v))
            p = (query[:, None] @ k.transpose(1, 2) * head_dim**-0.5).softmax(-1)
            outs.append((p @ v).reshape(hidden_size))
            weights[row, start : start + p.shape[2]] = p.mean(0)[0].double().cpu()
        return torch.stack(outs), weights

    def move(tensor):
        return None if tensor is None else tensor.to(device)

    out, weights = torch.full_like(qkv[:, :hidden_size], float("nan")).contiguous(), None
    if not appends:
        weights = torch.full((rows, 2, capacity), float("nan"), device=device)
    own, theirs = copied(keys), copied(values)
    query, *new = qkv.split(hidden_size, 1)
    decode.launch_step_attention(
        out, query, keys, values, heads, head_dim**-0.5, move(lengths),
        new=tuple(new) if appends else None,
        kv_start=move(starts), cache_rows=move(cache_rows), key_rows=move(key_rows),
        weights=weights, weight_positions=None if appends else torch.ones_like(move(lengths)),
    )  # fmt: skip
    assert_as_accurate_as_torch(out, lambda *t: attention(*t)[0], qkv, own, theirs)
    if appends:
        at, where = move(lengths).long(), move(cache_rows).long()
        own[where, :, at] = qkv[:, hidden_size : 2 * hidden_size].view(rows, heads, head_dim)
        theirs[where, :, at] = qkv[:, 2 * hidden_size :].view(rows, heads, head_dim)
    assert torch.equal(keys, own) and torch.equal(values, theirs)
    if not appends:
        expected = attention(qkv.double(), keys.double(), values.double())[1]
        assert weights[:, 0].isnan().all()
        torch.testing.assert_close(weights[:, 1].double().cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("sentences", "beams", "heads", "head_dim", "capacity"),
    [
        (2, 3, 2, 16, 20),
        (68, 5, 6, 64, 70),
        (68, 5, 13, 64, 70),
        (130, 5, 7, 24, 100),
        (90, 13, 4, 80, 40),
    ],
)
@pytest.mark.parametrize("appends", [True, False])
def test_step_attention_of_beams(
    device, dtype, sentences, beams, heads, head_dim, capacity, appends
):
    """Rows of a sentence share their keys from some position downwards, or all of them."""
    rows, hidden_size = sentences * beams, heads * head_dim
    sentence = torch.arange(rows) // beams
    lengths = ((11 * sentence + 3) % (capacity - 1)).int()
    starts = (lengths // 4 * (sentence % 2)).int()
    cache_rows = (sentence if not appends else torch.randperm(rows)).int()
    key_rows = None
    if appends:
        first = sentence[:, None] * beams
        shared = torch.arange(capacity) < lengths[:, None] - 2 - sentence[:, None] % 7
        mixed = first + torch.randint(beams, (rows, capacity))
        key_rows = cache_rows[torch.where(shared, first, mixed)]
    keys, values = (random(device, dtype, rows, heads, capacity, head_dim) for _ in range(2))
    query, key, value = (random(device, dtype, rows, hidden_size) for _ in range(3))

    def attention(query, keys, values, key, value):
        at = torch.arange(capacity, device=query.device)
        seen = (at < lengths.to(at)[:, None]) & (at >= starts.to(at)[:, None])
        source = cache_rows[:, None].expand(rows, capacity) if key_rows is None else key_rows
        k, v = (t[source.to(at), :, at].transpose(1, 2) for t in (keys, values))
        if appends:
            k, v = (
                torch.cat([old, new.view(rows, heads, 1, head_dim)], 2)
                for old, new in ((k, key), (v, value))
            )
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        scores = query.view(rows, heads, 1, head_dim) @ k.transpose(2, 3) * head_dim**-0.5
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ v).reshape(rows, hidden_size)

    def move(tensor):
        return None if tensor is None else tensor.to(device)

    out, own, theirs = torch.full_like(query, float("nan")), copied(keys), copied(values)
    decode.launch_step_attention(
        out, query, keys, values, heads, head_dim**-0.5, move(lengths),
        new=(key, value) if appends else None, shared_rows=beams,
        kv_start=move(starts), cache_rows=move(cache_rows), key_rows=move(key_rows),
    )  # fmt: skip
    assert_as_accurate_as_torch(out, attention, query, own, theirs, key, value)
    if appends:
        at, where = move(lengths).long(), move(cache_rows).long()
        own[where, :, at] = key.view(rows, heads, head_dim)
        theirs[where, :, at] = value.view(rows, heads, head_dim)
    assert torch.equal(keys, own) and torch.equal(values, theirs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": torch.zeros(6)}, TypeError, "cross.rows must be int32"),
        ({"lengths": torch.zeros(5, dtype=torch.int32)}, ValueError, "cross.lengths must have"),
        ({"weights": torch.zeros(6, 20, 8)}, ValueError, "cross.weights must have shape"),
    ],
)
def test_decode_cross_refuses(changes, error, message):
    given = case(torch.device("cpu"), torch.float32)
    table, hidden_states = table_of(given), given["hidden_states"]
    workspace = decode.decode_layers_workspace(table, hidden_states, 6)
    arguments = (given["lengths"], "relu", NORM_EPS, workspace, torch.empty_like(hidden_states))
    with pytest.raises(error, match=message):
        cross = cross_of(given)._replace(**changes)
        decode.decode_layers(hidden_states, table, *arguments, cross=cross)
    with pytest.raises(ValueError, match="cross must be given if"):
        decode.decode_layers(hidden_states, table, *arguments)
