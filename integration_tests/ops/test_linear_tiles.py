"""linear_tiles: every size of tile and what pairs of blocks share, over least, odd and real sizes.
On the CPU, and without a tile, the same products by the extension's other code.
"""

import functools

import pytest
import torch

from eet_patch import ops
from eet_patch.ops import tiles
from eet_patch.testing import assert_as_accurate_as_torch, inputs, reference

ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu", None]
SHAPES = [(1, 8, 8), (63, 72, 200), (129, 776, 1032), (300, 768, 2304), (2177, 72, 328)]


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def half(request):
    return request.param


@pytest.fixture(params=range(tiles.NUM_TILES))
def tile(request, device):
    if request.param != 0 and device.type == "cpu":
        pytest.skip("the CPU has no tiles to choose from")
    if device.type == "cuda" and not tiles.has_tiles(device.index or 0):
        pytest.skip("needs a Hopper GPU and an extension built for it")
    return request.param


def check(shape, dtype, device, tile, activation=None, residual=False, bias=True, num_weights=1):
    rows, in_features, out_features = shape
    given = inputs.linear_inputs(
        (rows, in_features), num_weights * out_features, dtype, device, bias=bias, residual=residual
    )

    def call(hidden_states, weight, bias=None, weight_layout="out_in", residual=None):
        weights = weight.chunk(num_weights)
        biases = (None,) * num_weights if bias is None else bias.chunk(num_weights)
        assert device.type == "cpu" or tiles.takes_tiles(hidden_states, weights, biases, False)
        return tiles.linear_tiles(hidden_states, weights, biases, tile, activation, residual)

    def expected(**given):
        return reference.linear(**given, activation=activation)

    assert_as_accurate_as_torch(call(**given), expected, **given)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_tiles(device, half, tile, shape):
    check(shape, half, device, tile, "gelu")
    check(shape, half, device, tile, residual=True)
    check(shape, half, device, tile, num_weights=3)


FEW_ROWS_SHAPES = [(128, 768, 3072), (128, 3072, 768), (96, 1096, 64), (17, 200, 104), (65, 8, 8)]


@pytest.mark.parametrize("shape", FEW_ROWS_SHAPES)
def test_linear_tiles_of_few_rows(device, half, tile, shape):
    if tile < tiles.FIRST_CLUSTER:
        pytest.skip("a tile of many rows")
    check(shape, half, device, tile, "gelu")
    check(shape, half, device, tile, residual=True)
    check(shape, half, device, tile, residual=True, bias=False)
    check(shape, half, device, tile, num_weights=3, bias=False)


@pytest.mark.parametrize("rows", [128, 96, 300])
def test_linear_tiles_in_a_chain(device, half, tile, rows):
    """The same bits, whether or not a launch starts before the one ahead has ended. Each reads what
    that wrote, and what was written there before is not a number.
    """
    torch.manual_seed(0)
    weights = [(torch.randn(264, 264, device=device) / 16).to(half) for _ in range(12)]
    bias = torch.randn(264, device=device).to(half)
    x = torch.randn(rows, 264, device=device).to(half)

    def chain(chained):
        outs = [x]
        # Blocks of memory that the launches will take.
        poisoned = [torch.full_like(x, float("nan")) for _ in weights]
        del poisoned
        for i, weight in enumerate(weights):
            activation, residual = ("gelu", None) if i % 2 else (None, outs[-1])
            outs.append(
                tiles.linear_tiles(
                    outs[-1], (weight,), (bias,), tile, activation, residual, chained and i > 0
                )
            )
        return torch.stack(outs)

    expected = chain(False)
    assert expected.isfinite().all()
    for _ in range(3):
        assert torch.equal(chain(True), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_tiles_of_each_activation(device, half, tile, activation, bias):
    check((200, 136, 264), half, device, tile, activation, bias=bias)


@pytest.mark.parametrize("num_weights", [1, 3])
@pytest.mark.parametrize("residual", [True, False])
def test_linear_tiles_of_several_weights(device, half, tile, num_weights, residual):
    check((131, 64, 40), half, device, tile, residual=residual, num_weights=num_weights)


def test_linear_tiles_twice(device, half, tile):
    """The same bits."""
    given = inputs.linear_inputs((700, 776), 1032, half, device)
    weights, biases = (given["weight"],), (given["bias"],)
    outs = [
        tiles.linear_tiles(given["hidden_states"], weights, biases, tile, "gelu") for _ in range(2)
    ]
    assert torch.equal(*outs)


def test_takes_tiles(device):
    x = torch.randn(9, 64, dtype=torch.float16, device=device)
    weight = torch.randn(24, 64, dtype=torch.float16, device=device)
    takes = device.type == "cuda" and tiles.has_tiles(device.index or 0)
    assert tiles.takes_tiles(x, (weight,), (None,), False) == takes
    assert not tiles.takes_tiles(x, (weight,), (None,), True)
    assert not tiles.takes_tiles(x.float(), (weight.float(),), (None,), False)
    assert not tiles.takes_tiles(x, (weight[:20],), (None,), False)
    assert not tiles.takes_tiles(x[:, :60].contiguous(), (weight[:, :60],), (None,), False)
    apart = torch.randn(9 * 64 + 1, dtype=torch.float16, device=device)[1:].view(9, 64)
    assert not tiles.takes_tiles(apart, (weight,), (None,), False)


@pytest.mark.parametrize("rows", [65, 128, 129, 448, 512, 1024, 2048, 2176, 4096, 8704, 10**6])
@pytest.mark.parametrize("num_weights", [1, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("adds_residual", [False, True])
@pytest.mark.parametrize("torch_launches", [1, 2])
def test_choose_tile(rows, num_weights, activation, adds_residual, torch_launches):
    for in_features in (8, 384, 768, 1024, 3072, 4096, 16384):
        for out_features in (8, 768, 1024, 3072, 4096):
            sizes = (rows, in_features, out_features, num_weights)
            tile = tiles.choose_tile(*sizes, activation, adds_residual, torch_launches)
            assert tile is None or 0 <= tile < tiles.NUM_TILES
            if adds_residual and activation is not None:
                assert tile is None


def test_choose_tile_where_it_was_measured():
    """Fused GELU is worth it from some hundred rows on, products by themselves from 2048 on."""
    assert tiles.choose_tile(4096, 768, 3072, 1, "gelu") is not None
    assert tiles.choose_tile(1024, 1024, 4096, 1, "gelu") is not None
    assert tiles.choose_tile(320, 768, 3072, 1, "gelu") is None
    assert tiles.choose_tile(4096, 4096, 16384, 1, "gelu") is None
    assert tiles.choose_tile(4096, 768, 768, 3) is not None
    assert tiles.choose_tile(1024, 768, 768, 3) is None
    assert tiles.choose_tile(1024, 768, 768, 3, torch_launches=2) is not None
    assert tiles.choose_tile(1024, 768, 3072, 1, "relu") is None
    assert tiles.choose_tile(4096, 768, 768, 1, None, True) is not None
    assert tiles.choose_tile(2176, 1024, 1024, 1, None, True) is None
    for hidden in (384, 768, 1024):
        assert tiles.choose_tile(256, hidden, hidden, 3) == tiles.cluster_tile(2, 4)
        assert tiles.choose_tile(96, hidden, 4 * hidden, 1, "gelu") == tiles.cluster_tile(2, 4)
        assert tiles.choose_tile(65, hidden, hidden, 1, None, True) == tiles.cluster_tile(4, 2)
        assert tiles.choose_tile(128, 4 * hidden, hidden, 1, None, True) == tiles.cluster_tile(4, 2)


@pytest.mark.parametrize("rows", [97, 520, 2176])
@pytest.mark.parametrize("hidden", [768, 1024])
def test_blocks_by_tiles(device, half, rows, hidden):
    """The products of a layer as it asks for them, by whatever `choose_tile` says."""
    for given, activation in (
        (inputs.linear_inputs((rows, hidden), 4 * hidden, half, device), "gelu"),
        (inputs.linear_inputs((rows, hidden), hidden, half, device, residual=True), None),
        (inputs.linear_inputs((rows, hidden), 3 * hidden, half, device), None),
    ):
        out = ops.linear(**given, activation=activation)
        expected = functools.partial(reference.linear, activation=activation)
        assert_as_accurate_as_torch(out, expected, **given)
