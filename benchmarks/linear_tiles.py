"""Times every tile of `linear_tiles` beside torch's product and the activation behind it, on a
Hopper GPU: the numbers that `eet_patch/ops/tiles.py` chooses by. Each is checked against fp32
first, runs in a CUDA graph, and takes its weights in turn from more of them than the L2 holds.

    python benchmarks/linear_tiles.py --rows 4096 2176 --hidden 768 1024
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from eet_patch.ops import bias_activation, tiles

NUM_WEIGHTS = 12
REPLAYS = 3
RUNS = 7
MAX_ERROR = 2e-3  # of fp16, relative to fp32


def median_us(calls: list[Callable[[], object]]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / REPLAYS / len(calls))
    return statistics.median(times)


def products(hidden: int) -> list[tuple[str, int, int, int, str | None, bool]]:
    """name, in_features, out_features, number of weights, activation, residual"""
    return [
        ("qkv", hidden, hidden, 3, None, False),
        ("out", hidden, hidden, 1, None, True),
        ("fc1", hidden, 4 * hidden, 1, "gelu", False),
        ("fc2", 4 * hidden, hidden, 1, None, True),
    ]


def measure(rows: int, name: str, k: int, n: int, count: int, activation, adds) -> None:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float32)

    x = randn(rows, k).half()
    weights = [
        tuple((randn(n, k) / k**0.5).half() for _ in range(count)) for _ in range(NUM_WEIGHTS)
    ]
    biases = tuple(randn(n).half() for _ in range(count))
    residual = randn(rows, count * n).half() if adds else None
    joined, bias = [torch.cat(each) for each in weights], torch.cat(biases)

    def by_torch(i: int) -> torch.Tensor:
        if activation is None:
            return F.linear(x, joined[i], bias)
        return bias_activation(F.linear(x, joined[i]), bias, activation)

    expected = F.linear(x.float(), joined[0].float(), bias.float())
    expected = F.gelu(expected) if activation else expected
    expected = expected + residual.float() if adds else expected
    blas = median_us([lambda i=i: by_torch(i) for i in range(NUM_WEIGHTS)])
    found = []
    for tile in range(tiles.NUM_TILES):

        def by_tile(i: int, tile: int = tile) -> torch.Tensor:
            return tiles.linear_tiles(x, weights[i], biases, tile, activation, residual, True)

        error = ((by_tile(0).float() - expected).norm() / expected.norm()).item()
        if not error < MAX_ERROR:
            raise SystemExit(f"tile {tile} is wrong at {rows} rows, {name}: error {error:.2e}")
        found.append((median_us([lambda i=i: by_tile(i) for i in range(NUM_WEIGHTS)]), tile))
    found.sort()
    best = "  ".join(f"{tile}: {us:.1f}" for us, tile in found[:8])
    flop = 2 * rows * k * n * count
    print(
        f"{rows:6} {name:4} {k:5} -> {count * n:5}  torch {blas:6.1f} us, "
        f"tiles {found[0][0]:6.1f} us ({flop / found[0][0] / 1e6:.0f} TFLOP/s)  {best}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 1024, 2176, 4096, 8704])
    parser.add_argument("--hidden", type=int, nargs="+", default=[768, 1024])
    options = parser.parse_args()
    if not torch.cuda.is_available() or not tiles.has_tiles(0):
        raise SystemExit("needs a Hopper GPU and an extension built for it")
    print(torch.cuda.get_device_name(), "fp16, torch", torch.__version__)
    for hidden in options.hidden:
        for rows in options.rows:
            for product in products(hidden):
                measure(rows, *product)


if __name__ == "__main__":
    main()
