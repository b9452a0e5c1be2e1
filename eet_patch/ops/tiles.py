"""Products of many rows by the extension's own tiles (Hopper, half precision), with bias,
activation or residual added while the sums are in registers, and where they are worth it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from eet_patch.ops._extension import ACTIVATION_CODES, EXTENSION, extension, place
from eet_patch.ops.launch import Biases, Weights, address, three_addresses

TILED_DTYPES = (torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """A tile of csrc/cuda/linear_tiles.h, and what a launch was measured to take: microseconds in
    all, for each 10^6 products of a multiprocessor by steps of 64, and for each 10^5 sums of it.
    """

    code: int
    rows: int
    columns: int
    pair: str | None  # what two blocks share
    launch_us: float
    product_us: float
    sum_us: float


# Fitted to the times of benchmarks/linear_tiles.py on an H100 (132 multiprocessors), fp16, 512 to
# 8704 rows of BERT-base and BERT-large. The tile that comes out first takes at most 15 % (on
# average 2 %) more than the best.
NUM_SHAPES = 7
MULTIPROCESSORS = 132  # those measured; the kernels count what is there
TILES = (
    Tile(0, 128, 112, None, 2.41, 24.95, 7.71),
    Tile(1, 128, 128, None, 2.36, 20.36, 9.82),
    Tile(2, 128, 160, None, 2.41, 21.75, 9.22),
    Tile(3, 128, 192, None, 3.22, 20.14, 8.39),
    Tile(4, 128, 208, None, 3.07, 19.97, 10.19),
    Tile(5, 128, 192, None, -0.14, 19.70, 16.58),
    Tile(6, 128, 256, None, -1.14, 19.20, 18.07),
    Tile(NUM_SHAPES + 1, 128, 128, "input", 2.54, 20.56, 9.35),
    Tile(NUM_SHAPES + 3, 128, 192, "input", 3.32, 20.15, 8.03),
    Tile(2 * NUM_SHAPES + 1, 128, 128, "weight", 2.73, 21.88, 6.30),
    Tile(2 * NUM_SHAPES + 2, 128, 160, "weight", 2.97, 21.85, 6.51),
    Tile(2 * NUM_SHAPES + 3, 128, 192, "weight", 4.05, 20.71, 5.07),
    Tile(2 * NUM_SHAPES + 4, 128, 208, "weight", 3.46, 20.35, 8.97),
    Tile(2 * NUM_SHAPES + 6, 128, 256, "weight", -0.71, 19.20, 17.19),
)
# Then: 128 rows by 64 columns, whose k is split over so many blocks, times so many that bring each
# other's rows.
CLUSTER_SHAPES = ((2, 4), (4, 2))
FIRST_CLUSTER = 3 * NUM_SHAPES
NUM_TILES = FIRST_CLUSTER + len(CLUSTER_SHAPES)

# Where tiles beat torch's products, and the kernels behind them, in the same measurement.
# microseconds of torch and of the best tile, BERT-base:
#   rows   fc1 and GELU     query, key, value   fc2 [and residual]   out [and residual]
#    128     8.1 |  6.2       5.3 |  5.2          7.6 |  6.3           3.8 |  4.3
#    512    10.4 |  9.2       6.9 |  7.4         10.0 | 10.2           4.8 |  5.8
#   1024    18.5 | 12.6       8.7 |  9.4         12.1 | 17.0           5.5 |  7.6
#   2176    29.2 | 22.5      14.8 | 15.1         20.6 | 20.3           8.2 |  8.4
#   4096    49.7 | 36.5      25.5 | 23.5         29.1 | 30.8          11.1 | 11.4
#   8704   103.8 | 76.4      54.6 | 49.9         73.2 | 74.9          26.2 | 26.3
# and BERT-large:
#    128     8.7 |  7.5       6.1 |  6.3          9.1 |  8.6           4.5 |  5.1
#   1024    20.2 | 16.6      12.5 | 13.5         16.8 | 22.9           6.5 |  9.2
#   2176    40.6 | 35.1      28.3 | 22.7         32.1 | 37.4          11.3 | 13.1
#   4096    80.8 | 60.7      43.9 | 40.2         48.5 | 50.9          17.5 | 17.3
#   8704   164.6 |122.7      89.5 | 87.6        127.6 |126.0          39.5 | 38.9
# torch's out and fc2 leave the residual to the layer norm behind them, where it is a third of what
# is moved in 9 us (4096 rows of 768) or 15 us (8704): a product that adds it may take that much
# longer. torch's query, key and value are one launch above, and two where the three weights don't
# lie equally far apart (20 us at 2176 rows of 768). Other sizes were not measured.
#
# Up to FEW_ROWS rows what counts is the chain. A layer of BERT-base in a graph of twelve, 128 rows,
# us: 30.8 by blocks of a whole multiprocessor and torch's out, 27.3 by clusters whose blocks leave
# room for the next launch and which are one kernel for all four products; 96 rows 30.9 and 27.5,
# BERT-large 39.9 and 32.9, MiniLM 27.0 (all by torch) and 23.6; 160 rows of BERT-base 39.7 and
# 34.0, 256 rows 38.6 and 34.7 (benchmarks/results/linear_tiles_nvidia_h100_80gb_hbm3.txt). Between
# 129 and 256 rows other sizes were not measured.
FEW_ROWS = 256
FEW_ROWS_FEATURES = (384, 1024)
ACTIVATION_ROWS = 448
PLAIN_ROWS = 2048
RESIDUAL_ROWS_PER_COLUMN = 2.75  # BERT-large's 2176 rows have fewer, base's have more
MAX_TILED_IN_FEATURES = 1024
LONG_IN_FEATURES = 4096  # of fc2
LONG_ROWS = 3072  # up to here, and again from so many times out_features on:
LONG_ROWS_PER_COLUMN = 8
# torch's cuBLASLt adds this one itself.
BLAS_ACTIVATIONS = (None, "relu")


@functools.cache
def has_tiles(device: int) -> bool:
    """Whether the extension was built for this GPU's warpgroup instructions."""
    if EXTENSION is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return "90a" in EXTENSION.build_info()["cuda_archs"].split(";")


def takes_tiles(flat: Tensor, weights: Weights, biases: Biases, in_out: bool) -> bool:
    """Whether `linear_tiles` can be called: with (rows, in_features) and contiguous weights."""
    if flat.device.type != "cuda" or in_out or flat.dtype not in TILED_DTYPES:
        return False
    if flat.shape[1] % 8 or weights[0].shape[0] % 8 or not has_tiles(flat.device.index):
        return False
    if not flat.is_contiguous():
        return False
    tensors = (flat, *weights, *(bias for bias in biases if bias is not None))
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _cost(tile: Tile, rows: int, in_features: int, out_features: int, num_weights: int) -> float:
    row_blocks = -(-rows // tile.rows)
    columns = -(-out_features // tile.columns) * num_weights
    groups, at_once = row_blocks * columns, MULTIPROCESSORS
    if tile.pair is not None:
        at_once //= 2
        groups = (
            row_blocks * -(-columns // 2) if tile.pair == "input" else -(-row_blocks // 2) * columns
        )
    sums = -(-groups // at_once) * tile.rows * tile.columns
    steps = -(-in_features // 64)
    return tile.launch_us + tile.product_us * sums * steps * 1e-6 + tile.sum_us * sums * 1e-5


def cluster_tile(ranks: int, sharers: int) -> int:
    return FIRST_CLUSTER + CLUSTER_SHAPES.index((ranks, sharers))


@functools.lru_cache(maxsize=4096)
def choose_tile(
    rows: int,
    in_features: int,
    out_features: int,
    num_weights: int = 1,
    activation: str | None = None,
    adds_residual: bool = False,
    torch_launches: int = 1,
) -> int | None:
    """The tile that beats torch's product and what would stand behind it, or None.
    `torch_launches`: how many torch's product of several weights takes.
    """
    fused = activation not in BLAS_ACTIVATIONS or torch_launches > 1
    if adds_residual and activation is not None:
        return None
    if rows <= FEW_ROWS:
        least, most = FEW_ROWS_FEATURES
        if adds_residual:
            takes = least <= out_features <= most and least <= in_features <= LONG_IN_FEATURES
            return cluster_tile(4, 2) if takes else None
        takes = (fused or num_weights > 1) and least <= in_features <= most
        return cluster_tile(2, 4) if takes else None
    if adds_residual:
        takes = rows >= PLAIN_ROWS and rows >= RESIDUAL_ROWS_PER_COLUMN * out_features
        if in_features > MAX_TILED_IN_FEATURES:
            takes &= rows <= LONG_ROWS or rows >= LONG_ROWS_PER_COLUMN * out_features
        if not takes or not 768 <= out_features <= 1024 or in_features > LONG_IN_FEATURES:
            return None
    elif in_features > MAX_TILED_IN_FEATURES or out_features < 256:
        return None
    elif rows < (ACTIVATION_ROWS if fused else PLAIN_ROWS):
        return None
    sizes = (rows, in_features, out_features, num_weights)
    return min(TILES, key=lambda tile: _cost(tile, *sizes)).code


def tile_for(
    flat: Tensor,
    weights: Weights,
    biases: Biases,
    in_out: bool,
    activation: str | None = None,
    residual: Tensor | None = None,
    torch_launches: int = 1,
) -> int | None:
    """`choose_tile` for these tensors; None too where `linear_tiles` can't be called."""
    if not takes_tiles(flat, weights, biases, in_out):
        return None
    if residual is not None and (residual.data_ptr() % 16 or not residual.is_contiguous()):
        return None
    sizes = (*flat.shape, weights[0].shape[0], len(weights))
    return choose_tile(*sizes, activation, residual is not None, torch_launches)


def linear_tiles(
    flat: Tensor,
    weights: Weights,
    biases: Biases,
    tile: int,
    activation: str | None = None,
    residual: Tensor | None = None,
    chained: bool = False,
) -> Tensor:
    """`activation(flat @ weight.T + bias)`, or `flat @ weight.T + bias + residual`: (rows,
    in_features) to (rows, len(weights) * out_features), unchecked. `chained`: the kernel ahead on
    the stream wrote no weights, so that this one may start before it has ended.
    """
    rows, in_features = flat.shape
    out_features = weights[0].shape[0]
    out = flat.new_empty(rows, len(weights) * out_features)
    extension().linear_tiles(
        out.data_ptr(),
        flat.data_ptr(),
        three_addresses(weights),
        three_addresses(biases),
        address(residual),
        rows,
        in_features,
        out_features,
        len(weights),
        ACTIVATION_CODES[activation],
        tile,
        chained,
        *place(flat),
    )
    return out
