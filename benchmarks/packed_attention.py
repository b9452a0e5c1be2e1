"""Times attention over packed tokens on a Hopper GPU, by each size of tile of the extension's
kernel and by torch: flash attention over sequences of any length, cuDNN's over those of one. The
numbers that `csrc/cuda/packed_attention.cu` and `eet_patch/ops/launch.py` choose by. Each is
checked against float64 first and runs in a CUDA graph of launches behind each other: "warm", all
over the same tensors, as a product that has just been made lies in the L2, and "rotated" past it.

    python benchmarks/packed_attention.py
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from eet_patch.ops import launch
from eet_patch.ops._extension import NO_MASK

LAUNCHES = 24
RUNS = 5
HEAD_DIM = 64
SHORT_TILES, TILES = (0, 1), (2, 3, 4, 5, 6)
SHORT = 128  # tokens, the most that the short tiles serve
MAX_ERROR = 1e-3  # of fp16, relative to float64
ROTATED_BYTES = 300e6
# heads, batch size, longest, and how lengths lie: all alike, evenly spread from 6 %, or these
# shuffled
CASES = [
    (12, 32, 512, "ragged"),
    (12, 32, 128, "ragged"),
    (12, 8, 512, "full"),
    (12, 32, 128, "full"),
    (12, 1, 128, "full"),
    (16, 32, 512, "ragged"),
    (16, 32, 128, "full"),
    (12, 64, 32, "full"),
    (12, 8, 256, "ragged"),
    (12, 1, 512, "full"),
    (12, 32, 512, "shuffled"),
    (12, 4, 2048, "ragged"),
]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def lengths_of(batch_size: int, longest: int, kind: str) -> list[int]:
    shares = torch.ones(batch_size) if kind == "full" else torch.linspace(0.06, 1, batch_size)
    if kind == "shuffled":
        shares = shares[torch.randperm(batch_size, generator=torch.Generator().manual_seed(1))]
    return (shares * longest).round().int().clamp(min=1).tolist()


def median_us(attend: Attend, sets: list[tuple[Tensor, ...]]) -> float:
    attend(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [attend(*sets[i % len(sets)]) for i in range(LAUNCHES)]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / LAUNCHES)
    del outputs
    return statistics.median(times)


def in_double(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    sequences = (t.double().split(lengths) for t in (query, key, value))
    for rows, *each in zip(out.split(lengths), *sequences, strict=True):
        q, k, v = (t.transpose(0, 1) for t in each)
        rows.copy_(((q @ k.mT * HEAD_DIM**-0.5).softmax(-1) @ v).transpose(0, 1))
    return out


def measure(num_heads: int, batch_size: int, longest: int, kind: str) -> None:
    lengths = lengths_of(batch_size, longest, kind)
    rows = sum(lengths)
    size = rows * num_heads * HEAD_DIM * 2 * 3
    sets = [
        torch.randn(3, rows, num_heads, HEAD_DIM, device="cuda", dtype=torch.float16).unbind(0)
        for _ in range(max(2, min(LAUNCHES, int(ROTATED_BYTES / size))))
    ]
    starts = torch.tensor([0, *lengths]).cumsum(0).cuda()
    short_starts = starts.int()
    bound = max(64, 1 << (longest - 1).bit_length())
    expected = in_double(*sets[0], lengths)

    def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ends = (short_starts, short_starts, bound, bound)
        return torch.ops.aten._flash_attention_forward(
            query, key, value, *ends, 0.0, False, False, scale=HEAD_DIM**-0.5
        )[0]

    def cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return launch._cudnn_attention(query, key, value, batch_size, False, HEAD_DIM**-0.5)

    def by_tile(tile: int) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return launch.attention(
                query,
                key,
                value,
                NO_MASK,
                False,
                HEAD_DIM**-0.5,
                cu_seqlens=starts,
                max_seqlen=bound,
                tile=tile,
            )

        return attend

    ways: dict[str, Attend] = {"flash": flash}
    if kind == "full":
        ways["cudnn"] = cudnn
    for tile in (SHORT_TILES if bound <= SHORT else ()) + TILES:
        ways[f"tile {tile}"] = by_tile(tile)
    found = []
    for name, attend in ways.items():
        error = ((attend(*sets[0]) - expected).norm() / expected.norm()).item()
        if not error < MAX_ERROR:
            raise SystemExit(f"{name} is wrong at {lengths[:8]}...: error {error:.2e}")
        warm, rotated = median_us(attend, sets[:1]), median_us(attend, sets)
        found.append(f"{name} {warm:.2f}/{rotated:.2f} ({error * 1e4:.1f})")
    case = f"({batch_size}, {longest}) {kind}, {num_heads} heads, {rows} tokens"
    print(f"{case}: {', '.join(found)}", flush=True)


def main() -> None:
    if not torch.cuda.is_available() or not launch.has_packed_attention(0):
        raise SystemExit("needs a Hopper GPU and an extension built for it")
    print(torch.cuda.get_device_name(), "fp16, torch", torch.__version__)
    print("us a launch, warm/rotated (relative error x 1e4)")
    torch.manual_seed(0)
    for case in CASES:
        measure(*case)


if __name__ == "__main__":
    main()
