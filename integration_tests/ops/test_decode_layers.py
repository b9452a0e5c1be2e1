"""decode_layers: several layers against their reference, whatever the cache rows, lengths, padding
and sharing of the past between beams.
"""

import pytest
import torch

from eet_patch.ops import decode
from eet_patch.testing import assert_as_accurate_as_torch, reference
from eet_patch.testing.accuracy import copied, relative_error

NORM_EPS = 1e-5


def random(device, dtype, *shape, std=1.0):
    return (torch.randn(*shape) * std).to(device, dtype)


def layer_of(device, dtype, hidden_size, intermediate_size, layout, bias):
    def weight(n_in, n_out):
        shape = (n_in, n_out) if layout == "in_out" else (n_out, n_in)
        return random(device, dtype, *shape, std=n_in**-0.5)

    def vector(size, mean=0.0):
        return random(device, dtype, size, std=0.3) + mean

    return {
        "norm1_weight": vector(hidden_size, 1.0),
        "norm1_bias": vector(hidden_size) if bias else None,
        "qkv_weight": weight(hidden_size, 3 * hidden_size),
        "qkv_bias": vector(3 * hidden_size) if bias else None,
        "out_weight": weight(hidden_size, hidden_size),
        "out_bias": vector(hidden_size) if bias else None,
        "norm2_weight": vector(hidden_size, 1.0),
        "norm2_bias": vector(hidden_size) if bias else None,
        "fc1_weight": weight(hidden_size, intermediate_size),
        "fc1_bias": vector(intermediate_size) if bias else None,
        "fc2_weight": weight(intermediate_size, hidden_size),
        "fc2_bias": vector(hidden_size) if bias else None,
    }


def case(
    device,
    dtype,
    rows=3,
    num_heads=4,
    head_dim=16,
    capacity=40,
    lengths=(5, 0, 38),
    num_layers=2,
    layout="in_out",
    bias=True,
    starts=None,
    cache_rows=None,
    shared=False,
    activation="gelu_tanh",
):
    """Arguments of the reference. Cache places that no row may read hold NaN."""
    hidden_size = num_heads * head_dim
    slots = rows + 2
    lengths = torch.tensor(lengths[:rows], dtype=torch.int32, device=device)
    key_rows = None
    if shared:
        # Cache rows that no row of this step writes to, beside the row's own.
        owned = range(rows) if cache_rows is None else cache_rows
        free = torch.tensor([slot for slot in range(slots) if slot not in owned])
        key_rows = free[torch.randint(0, len(free), (rows, capacity))].int()
        own = torch.tensor(list(owned)).int()[:, None].expand(rows, capacity)
        key_rows = torch.where(torch.rand(rows, capacity) < 0.3, own, key_rows).to(device)
    caches = []
    for _ in range(num_layers):
        pair = []
        for _ in range(2):
            cache = random(device, dtype, slots, num_heads, capacity, head_dim)
            if not shared:
                for row in range(rows):
                    own = row if cache_rows is None else cache_rows[row]
                    cache[own, :, int(lengths[row]) :] = float("nan")
                    if starts is not None:
                        cache[own, :, : starts[row]] = 0
            pair.append(cache)
        caches.append(tuple(pair))

    def integers(values):
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    return {
        "hidden_states": random(device, dtype, rows, hidden_size),
        "layers": [
            layer_of(device, dtype, hidden_size, 3 * hidden_size, layout, bias)
            for _ in range(num_layers)
        ],
        "caches": caches,
        "lengths": lengths,
        "num_heads": num_heads,
        "activation": activation,
        "norm_eps": NORM_EPS,
        "softmax_scale": head_dim**-0.5,
        "weight_layout": layout,
        "kv_start": integers(starts),
        "cache_rows": integers(cache_rows),
        "key_rows": key_rows,
    }


def table_of(given):
    layers = [
        decode.DecodeLayer(
            layer["norm1_weight"],
            layer["norm1_bias"],
            (layer["qkv_weight"],),
            (layer["qkv_bias"],),
            *(layer[name] for name in list(layer)[4:]),
            *pair,
            given["softmax_scale"],
        )
        for layer, pair in zip(given["layers"], given["caches"], strict=True)
    ]
    return decode.pack_layers(layers, given["weight_layout"] == "in_out")


def run(given, **changes):
    table = table_of(given | {"caches": changes.get("caches", given["caches"])})
    workspace = decode.decode_layers_workspace(
        table, given["hidden_states"], given["hidden_states"].shape[0]
    )
    given = given | changes
    hidden_states = given["hidden_states"]
    return decode.decode_layers(
        hidden_states,
        table,
        given["lengths"],
        given["activation"],
        given["norm_eps"],
        workspace,
        torch.full_like(hidden_states, float("nan")),
        given["kv_start"],
        given["cache_rows"],
        given["key_rows"],
    )


def check(given):
    before = copied(given["caches"])
    out = run(given)
    assert_as_accurate_as_torch(out, reference.decode_layers, **given | {"caches": before})
    # The new keys and values, and nothing else, were written.
    expected = copied(before)
    reference.decode_layers(**copied(given | {"caches": ()}) | {"caches": expected})
    for layer, (pair, old, new) in enumerate(zip(given["caches"], before, expected, strict=True)):
        for ours, was, theirs in zip(pair, old, new, strict=True):
            written = torch.zeros_like(was, dtype=torch.bool)
            for row, length in enumerate(given["lengths"].tolist()):
                own = row if given["cache_rows"] is None else int(given["cache_rows"][row])
                written[own, :, length] = True
            assert torch.equal(ours[~written].nan_to_num(9), was[~written].nan_to_num(9))
            bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[ours.dtype]
            assert relative_error(ours[written], theirs[written]) <= bound, f"layer {layer}"
    return out


@pytest.mark.parametrize("layout", ["in_out", "out_in"])
@pytest.mark.parametrize("bias", [True, False])
def test_decode_layers(device, dtype, layout, bias):
    check(case(device, dtype, layout=layout, bias=bias))


@pytest.mark.sanitize
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80, 96, 128, 160, 256, 20])
def test_decode_layers_head_dims(device, dtype, head_dim):
    check(case(device, dtype, num_heads=2, head_dim=head_dim))


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 17, 33, 64])
def test_decode_layers_rows(device, dtype, rows):
    check(case(device, dtype, rows=rows, lengths=[(7 * row) % 39 for row in range(rows)]))


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 300, 1023])
def test_decode_layers_lengths(device, dtype, length):
    check(case(device, dtype, rows=2, capacity=1024, lengths=(length, length // 2), head_dim=64))


@pytest.mark.sanitize
def test_decode_layers_left_padding(device, dtype):
    check(case(device, dtype, starts=(2, 0, 38)))
    check(case(device, dtype, starts=(5, 0, 1), capacity=700, lengths=(600, 0, 699)))


@pytest.mark.sanitize
def test_decode_layers_cache_rows(device, dtype):
    check(case(device, dtype, cache_rows=(4, 0, 2), starts=(0, 0, 3)))


@pytest.mark.sanitize
def test_decode_layers_shared_past(device, dtype):
    given = case(device, dtype, shared=True)
    check(given)
    check(case(device, dtype, shared=True, cache_rows=(3, 1, 0)))


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", None])
def test_decode_layers_activations(device, dtype, activation):
    check(case(device, dtype, activation=activation))


@pytest.mark.parametrize("sizes", [(12, 64, 3), (16, 64, 2), (8, 80, 2), (20, 80, 1), (8, 128, 2)])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_decode_layers_real_sizes(device, dtype, sizes, rows):
    num_heads, head_dim, num_layers = sizes
    lengths = [(131 * row + 17) % 255 for row in range(rows)]
    given = case(
        device,
        dtype,
        rows=rows,
        num_heads=num_heads,
        head_dim=head_dim,
        num_layers=num_layers,
        capacity=256,
        lengths=lengths,
        starts=[min(row, lengths[row]) for row in range(rows)],
    )
    check(given)


def test_decode_layers_twice_gives_the_same_bits(device, dtype):
    given = case(device, dtype, rows=4, capacity=500, lengths=(450, 3, 200, 499), head_dim=64)
    first = run(given, caches=copied(given["caches"]))
    for _ in range(5):
        assert torch.equal(first, run(given, caches=copied(given["caches"])))


def test_decode_layers_of_changing_rows_share_a_workspace(device, dtype):
    """What one call leaves in the workspace doesn't disturb a call of other rows."""
    given = case(device, dtype, rows=12, capacity=500, lengths=(450, 499, 300) * 4, head_dim=64)
    table, hidden_states = table_of(given), given["hidden_states"]
    workspace = decode.decode_layers_workspace(table, hidden_states, 12)

    def step(rows):
        return decode.decode_layers(
            hidden_states[:rows],
            table,
            given["lengths"][:rows],
            given["activation"],
            NORM_EPS,
            workspace,
            torch.empty_like(hidden_states[:rows]),
        )

    expected = {rows: step(rows) for rows in (12, 5, 1)}
    for rows in (5, 12, 1, 5, 12, 12, 1, 12):
        assert torch.equal(step(rows), expected[rows])


def test_decode_layers_in_place(device, dtype):
    given = case(device, dtype)
    expected = run(given, caches=copied(given["caches"]))
    table, hidden_states = table_of(given), given["hidden_states"]
    workspace = decode.decode_layers_workspace(table, hidden_states, 3)
    decode.decode_layers(
        hidden_states,
        table,
        given["lengths"],
        given["activation"],
        NORM_EPS,
        workspace,
        hidden_states,
    )
    assert torch.equal(hidden_states, expected)


def test_decode_layers_in_a_graph():
    """A captured step serves every length: all that changes is read on the device."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda is not available")
    device, dtype = torch.device("cuda", 0), torch.float16
    given = case(device, dtype, rows=3, capacity=300, lengths=(0, 100, 297), head_dim=64)
    table, hidden_states = table_of(given), given["hidden_states"]
    workspace = decode.decode_layers_workspace(table, hidden_states, 3)
    lengths, out = given["lengths"].clone(), torch.empty_like(hidden_states)

    def step():
        decode.decode_layers(
            hidden_states, table, lengths, given["activation"], NORM_EPS, workspace, out
        )

    graph = decode.Graph(device)
    with graph:
        step()
    eager = given | {"caches": copied(given["caches"])}
    for _ in range(3):
        graph.replay()
        assert torch.equal(out, run(eager, lengths=lengths))
        lengths += 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_states": torch.zeros(3, 63)}, ValueError, "hidden_states must have shape"),
        (
            {"hidden_states": torch.zeros(3, 64).double()},
            TypeError,
            "hidden_states must be float32",
        ),
        ({"lengths": torch.zeros(3)}, TypeError, "lengths must be int32"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, ValueError, "lengths must have shape"),
        ({"kv_start": torch.zeros(3, dtype=torch.int64)}, TypeError, "kv_start must be int32"),
        ({"cache_rows": torch.zeros(1, dtype=torch.int32)}, ValueError, "cache_rows must have"),
        (
            {"key_rows": torch.zeros(3, 7, dtype=torch.int32)},
            ValueError,
            "key_rows must have shape",
        ),
    ],
)
def test_decode_layers_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        run(case(torch.device("cpu"), torch.float32), **changes)
