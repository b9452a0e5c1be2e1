"""What the benchmarks share: check first, then time in turns, then write a CSV row a measurement.

Floors. `floor_ms` is a time that no implementation can beat on the machine at hand: the larger of
    bytes that must be read / read bandwidth     (a reduction over a buffer larger than any cache)
    operations that must be done / matmul rate   (one large product in the same dtype)
with both rates measured when the script starts. Weights that fit the last cache don't count as
bytes. A ratio below 1 means that the machine was busy otherwise while its rates were measured.
"""

import argparse
import contextlib
import csv
import datetime
import functools
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

import eet_patch
from eet_patch.testing.timing import clock, device_name

ROOT = Path(__file__).resolve().parent.parent
# Where rows are written; processes beside each other need folders of their own.
RESULTS = Path(os.environ.get("EET_RESULTS") or ROOT / "benchmarks" / "results")
COLUMNS = (
    "case,model,provider,dtype,batch_size,seq_len,new_tokens,fill,median_ms,p20_ms,p80_ms,floor_ms,"
    "ratio_to_floor,peak_gb,max_error,checked,device,torch,host,commit,date"
).split(",")
KEY = (
    "case",
    "model",
    "provider",
    "dtype",
    "batch_size",
    "seq_len",
    "new_tokens",
    "fill",
    "device",
)
SLOW_MS = 2000.0  # calls above it are timed --slow-runs times
BRIEF_MS = 100.0  # patched calls below it are warmed up twice
BASELINE = "transformers"
PATCHED = "eet_patch"
Row = dict[str, str]

# Largest relative Frobenius difference from the unpatched model in the same dtype that we accept.
# The tests hold results to a stricter bound, against fp64; this one catches wrong results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """One line of a benchmark's table of shapes. `seq_len` counts the padding, `new_tokens` is 0
    for an encoder, `fill` is the share of real tokens."""

    name: str
    model: str
    batch_size: int
    seq_len: int
    dtype: torch.dtype
    new_tokens: int = 0
    fill: float = 1.0


@dataclass(frozen=True)
class Provider:
    """A way to run the case. `scope` is entered around the calls and is outside the clock; leaving
    a `patched` one drops the buffers and graphs that calls leave behind. Where `one_call_warms`,
    the check's call has done all that is done once. `tensor_of` makes of what the user's call
    returns the tensor that is checked, outside the clock."""

    name: str
    call: Callable[[], Any]
    scope: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    patched: bool = False
    one_call_warms: bool = False
    tensor_of: Callable[[Any], Tensor] = Tensor.clone  # compiled models may overwrite their last


@dataclass
class Measurement:
    """What one provider showed: its difference from the unpatched model, its times, its memory."""

    max_error: float = float("nan")
    checked: bool = False
    times_ms: list[float] = field(default_factory=list)
    peak_gb: float | None = None
    slow: bool = False  # a call takes longer than SLOW_MS


def patched_provider(
    call: Callable[[], Any],
    name: str = PATCHED,
    tensor_of: Callable[[Any], Tensor] = Tensor.clone,
) -> Provider:
    return Provider(name, call, eet_patch.enabled, patched=True, tensor_of=tensor_of)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on a CPU")
    parser.add_argument("--runs", type=int, default=9, help="least number of timed runs (>= 5)")
    parser.add_argument(
        "--slow-runs",
        type=int,
        default=5,
        help=f"the same for calls of more than {SLOW_MS / 1e3:.0f} s (>= 3)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="least time spent on a case")
    parser.add_argument("--only", default="", help="regular expression: cases whose title matches")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    parser.add_argument("--no-write", action="store_true", help="leave the results folder alone")


def prepare(args: argparse.Namespace) -> None:
    """Apply what `add_arguments` declared to the process."""
    if args.runs < 5:
        raise SystemExit("--runs must be at least 5: a median of fewer says little")
    if args.slow_runs < 3:
        raise SystemExit("--slow-runs must be at least 3: fewer have no spread")
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()


def title(case: Case) -> str:
    new_tokens = f"+{case.new_tokens}" if case.new_tokens else ""
    fill = f", {case.fill:.0%} real" if case.fill < 1 else ""
    dtype = dtype_name(case.dtype)
    return f"{case.model} ({case.batch_size}, {case.seq_len}{new_tokens}{fill}) {dtype}"


def selected(cases: Iterable[Case], pattern: str) -> list[Case]:
    chosen = [case for case in cases if re.search(pattern, title(case))]
    if not chosen:
        raise SystemExit(f"no case matches {pattern!r}")
    return chosen


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- models --------------------------------------------------------------------------------------


def random_model(
    auto_class: type, config: PretrainedConfig, dtype: torch.dtype, device: str
) -> nn.Module:
    """Build a model with seeded random weights on the device. Biases and norms are random too: at
    their initial zeros and ones a kernel that forgets them would pass the check."""
    torch.manual_seed(0)
    with torch.device(device):
        model = auto_class.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.requires_grad_(True)


def layer_parameters(layers: nn.Module) -> list[nn.Parameter]:
    """Weights of the layers that every token passes: all but the embeddings."""
    return [parameter for parameter in layers.parameters() if parameter.ndim == 2]


# --- check and time ------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius norm of the difference, formed in fp64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def check(
    provider: Provider,
    compare: Callable[[Provider, Tensor], tuple[float, bool]],
    measurement: Measurement,
    device: str,
) -> None:
    """Run the provider once and set `max_error`, `checked` and `peak_gb`; says why where the check
    fails."""
    eet_patch.reset_report()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    with provider.scope():
        returned = provider.call()
        if device != "cpu":
            torch.cuda.synchronize(device)
            measurement.peak_gb = torch.cuda.max_memory_allocated(device) / 1e9
        first = time.perf_counter() - started
        result = provider.tensor_of(returned)
        targets = eet_patch.report().targets
    # A first guess, which the first timed call puts right.
    measurement.slow = provider.one_call_warms and first * 1e3 > SLOW_MS
    measurement.max_error, measurement.checked = compare(provider, result)
    if not measurement.checked:
        print(
            f"  {provider.name}: wrong result, error {measurement.max_error:.1e}", file=sys.stderr
        )
    if provider.patched:
        for target in targets:
            for reason, count in target.fallbacks.items():
                print(f"  {target.name}: {count} calls fell back: {reason}", file=sys.stderr)
        if not any(target.replaced for target in targets):
            print("  eet_patch replaced nothing: the row does not count", file=sys.stderr)
            measurement.checked = False
    print(
        f"  {provider.name}: first call {first:.2f} s, error {measurement.max_error:.1e}",
        flush=True,
    )


def measure(
    providers: Sequence[Provider],
    compare: Callable[[Provider, Tensor], tuple[float, bool]],
    args: argparse.Namespace,
) -> dict[str, Measurement]:
    """Check each provider, then time all of them in turns, so that a drift of the machine hits all.

    A turn is one call that isn't timed, or two brief ones (entering a scope may have dropped
    buffers or captured graphs), and a few that are; a slow provider whose scope drops nothing warms
    up once alone, by the check if one call is enough. The order of the providers changes from round
    to round.
    """
    found = {provider.name: Measurement() for provider in providers}
    for provider in providers:
        check(provider, compare, found[provider.name], args.device)
    started, rounds, order = time.perf_counter(), 0, list(providers)
    turns = 3 if len(providers) > 1 else 1
    while True:
        for provider in order:
            measurement = found[provider.name]
            if measurement.slow and len(measurement.times_ms) >= args.slow_runs:
                continue
            with provider.scope():
                if provider.patched or not measurement.slow:
                    first = clock(provider.call, args.device)
                    measurement.slow = first > SLOW_MS
                    if provider.patched and first < BRIEF_MS:
                        clock(provider.call, args.device)  # a graph is captured at the second call
                if measurement.slow:
                    calls = -(-args.slow_runs // turns)
                else:
                    calls = max(2 if first > 500 else 5, -(-args.runs // turns))
                for _ in range(calls):
                    measurement.times_ms.append(clock(provider.call, args.device))
                measurement.slow = measurement.times_ms[-1] > SLOW_MS
        rounds += 1
        order.reverse()
        enough = all(
            len(measurement.times_ms) >= (args.slow_runs if measurement.slow else args.runs)
            for measurement in found.values()
        )
        if enough and rounds >= turns and time.perf_counter() - started >= args.seconds:
            break
        if enough and all(measurement.slow for measurement in found.values()):
            break
    for name, measurement in found.items():
        times = measurement.times_ms
        print(f"  {name}: {len(times)} calls, median {statistics.median(times):.3g} ms", flush=True)
    return found


# --- floors --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Read bandwidth, matmul rate by dtype, and the last cache of the machine at hand."""

    bytes_per_second: float
    flops: dict[torch.dtype, float]
    cache_bytes: int

    def floor_ms(self, dtype: torch.dtype, read_bytes: float, operations: float) -> float:
        by_bytes = read_bytes / self.bytes_per_second if read_bytes > self.cache_bytes else 0.0
        return max(by_bytes, operations / self.flops[dtype]) * 1e3


def measure_rates(device: str, dtypes: Iterable[torch.dtype]) -> Rates:
    """A floor is what the machine can do, not what it does on average: the best of many runs, each
    short enough on a CPU to fit between the other work of a shared machine. On a CPU torch has two
    libraries, and which of them `matmul` takes is not always the quicker: the better one counts."""
    buffer = torch.ones(2**25 if device == "cpu" else 2**28, device=device)
    bytes_per_second = buffer.nbytes / best_seconds(buffer.sum, device)
    size, flops = (512 if device == "cpu" else 8192), {}
    for dtype in set(dtypes):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        products = [functools.partial(torch.matmul, a, b)]
        if device == "cpu" and torch.backends.mkldnn.is_available():
            products.append(functools.partial(nn.functional.linear, a.to_mkldnn(), b.to_mkldnn()))
        with torch.no_grad():
            seconds = min(best_seconds(product, device) for product in products)
        flops[dtype] = 2 * size**3 / seconds
    rates = Rates(bytes_per_second, flops, last_cache_bytes(device))
    matmul = ", ".join(f"{dtype_name(d)} {rate / 1e9:.0f}" for d, rate in flops.items())
    print(
        f"{device_name(device)}: read {bytes_per_second / 1e9:.0f} GB/s, GFLOP/s of matmul {matmul}"
    )
    return rates


def best_seconds(call: Callable[[], Tensor], device: str) -> float:
    """Shortest of the calls that fit into two seconds."""
    best, until = float("inf"), time.perf_counter() + 2.0
    while time.perf_counter() < until:
        best = min(best, clock(call, device) / 1e3)
    return best


def last_cache_bytes(device: str) -> int:
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes)


# --- rows ----------------------------------------------------------------------------------------


def slug(device: str) -> str:
    """File name of a device's results: lower case, without the number of threads."""
    return re.sub(r"[^a-z0-9]+", "_", device.split(",")[0].lower()).strip("_")


def current_commit() -> str:
    """Commit of the sources, `-dirty` if they differ from it; EET_COMMIT names a copy's."""
    if named := os.environ.get("EET_COMMIT"):
        return named
    try:
        head = git("rev-parse", "--short", "HEAD")
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
        )
    except (OSError, subprocess.CalledProcessError):
        return ""  # a copy without its history
    return head + ("-dirty" if changed else "")


def git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}".rstrip("0").rstrip(".")


def make_rows(
    case: Case, found: dict[str, Measurement], floor_ms: float | None, device: str, per: int = 1
) -> list[Row]:
    """One row a provider. `per` divides the times: new tokens, or 1 for a whole call. `floor_ms`
    is None where nothing tells how fast the work could be."""
    rows = []
    for provider, measurement in found.items():
        times = [value / per for value in measurement.times_ms]
        p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
        median = statistics.median(times)
        rows.append(
            {
                "case": case.name,
                "model": case.model,
                "provider": provider,
                "dtype": dtype_name(case.dtype),
                "batch_size": str(case.batch_size),
                "seq_len": str(case.seq_len),
                "new_tokens": str(case.new_tokens),
                "fill": f"{case.fill:.2f}",
                "median_ms": number(median),
                "p20_ms": number(p20),
                "p80_ms": number(p80),
                "floor_ms": number(floor_ms),
                "ratio_to_floor": "" if floor_ms is None else f"{median / floor_ms:.2f}",
                "peak_gb": number(measurement.peak_gb),
                "max_error": f"{measurement.max_error:.1e}",
                "checked": str(measurement.checked).lower(),
                "device": device_name(device),
                "torch": torch.__version__,
                "host": f"transformers {transformers.__version__}",
                "commit": current_commit(),
                "date": datetime.date.today().isoformat(),
            }
        )
    return rows


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def upsert(rows: Sequence[Row], path: Path) -> None:
    """Write `rows` into the CSV at `path`: a row replaces the one of the same key, in its place."""
    merged = {tuple(row[column] for column in KEY): row for row in read_rows(path)}
    merged.update({tuple(row[column] for column in KEY): row for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    with scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged.values())
    os.replace(scratch, path)  # a run that is stopped leaves the old file or the new one


def record(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Keep the rows of one case at once, so that a long run may be stopped."""
    if not args.no_write:
        upsert(rows, RESULTS / f"{slug(rows[0]['device'])}.csv")


def print_rows(rows: Sequence[Row]) -> None:
    print(
        f"\n{'model':12} {'dtype':9} {'shape':>12} {'fill':>5} {'provider':22} {'median ms':>10} "
        f"{'p20':>9} {'p80':>9} {'floor':>8} {'x floor':>8} {'error':>8} checked"
    )
    for row in rows:
        new_tokens = f"+{row['new_tokens']}" if row["new_tokens"] != "0" else ""
        shape = f"{row['batch_size']}x{row['seq_len']}{new_tokens}"
        print(
            f"{row['model']:12} {row['dtype']:9} {shape:>12} {row['fill']:>5} {row['provider']:22} "
            f"{row['median_ms']:>10} {row['p20_ms']:>9} {row['p80_ms']:>9} {row['floor_ms']:>8} "
            f"{row['ratio_to_floor']:>8} {row['max_error']:>8} {row['checked']}"
        )


def exit_status(rows: Sequence[Row]) -> int:
    return 0 if all(row["checked"] == "true" for row in rows) else 1
