"""The first call of generate() in a new process, and the memory of a call, patched and unpatched.

    python benchmarks/gpt2_first_call.py                               # small, 3 processes of each
    python benchmarks/gpt2_first_call.py --models small,8b --runs 1    # memory; one run has no row

Rows: `small, call` is the first call alone, `small, import and call` adds the time from the start
of the process to the end of its imports, enable() included; the model's construction is in neither.
The calls are short, so that what a first call does once isn't hidden by what each token costs.
Memory goes to results/gpt2_memory_<device>.txt: beyond model and KV cache, in a call of 512 + 512
tokens, by torch's allocator at its peak and by eet_patch.report() at its highest.
check: the unpatched model reads the tokens in one pass, as gpt2_common.py says.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gpt2_common
import harness
from gpt2_common import MODELS
from harness import BASELINE, PATCHED, Case, Measurement

BATCH_SIZE = 4
GPU_LENGTHS, CPU_LENGTHS = (512, 16, 512), (32, 4, 32)  # prompt, new tokens, for the memory
PROCESS = Path(__file__).with_name("first_call_process.py")
HEADER = (
    "MB in a call of {} + {} tokens at batch {}, {}; beyond = peak - model - KV cache;\n"
    "reported = eet_patch.report() at its highest, less the KV cache; outside = of the GPU, not\n"
    "by torch's allocator (context, kernels, graphs)\n"
)
COLUMNS = ("model", "provider", "model_mb", "kv_cache", "peak", "beyond", "reported", "outside")


def run_process(name: str, provider: str, args: argparse.Namespace) -> dict:
    seq_len, new_tokens, memory_tokens = CPU_LENGTHS if args.device == "cpu" else GPU_LENGTHS
    given = {
        "patched": provider == PATCHED,
        "shape": MODELS[name],
        "dtype": harness.dtype_name(gpt2_common.dtype_of(args)),
        "device": args.device,
        "batch_size": BATCH_SIZE,
        "seq_len": seq_len,
        "new_tokens": new_tokens,
        "memory_tokens": memory_tokens,
        "started": time.monotonic(),  # of one clock for all processes
    }
    command = [sys.executable, str(PROCESS), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise SystemExit(f"{provider} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_line(name: str, provider: str, found: dict) -> dict[str, str]:
    def mb(value: int | None) -> str:
        return "–" if value is None else f"{value / 1e6:.0f}"

    reported, peak = found.get("reported"), found.get("peak")
    held = found["model"] + found["kv_cache"]
    values = (
        mb(found["model"]),
        mb(found["kv_cache"]),
        mb(peak),
        mb(None if peak is None else peak - held),
        mb(None if reported is None else max(reported - found["kv_cache"], 0)),
        mb(found.get("outside")),
    )
    return dict(zip(COLUMNS, (name, provider, *values), strict=True))


def write_memory(lines: list[dict[str, str]], args: argparse.Namespace) -> None:
    """A line replaces that of the same model and provider."""
    name = harness.device_name(args.device)
    path = harness.RESULTS / f"gpt2_memory_{harness.slug(name)}.txt"
    seq_len, _, new_tokens = CPU_LENGTHS if args.device == "cpu" else GPU_LENGTHS
    known = {}
    if path.exists() and not args.no_write:
        for text in path.read_text().splitlines():
            cells = text.split()
            if len(cells) == len(COLUMNS) and cells[1] in (BASELINE, PATCHED):
                known[cells[0], cells[1]] = cells
    known |= {(line["model"], line["provider"]): list(line.values()) for line in lines}
    dtype = harness.dtype_name(gpt2_common.dtype_of(args))
    text = HEADER.format(seq_len, new_tokens, BATCH_SIZE, dtype)
    text += f"{name}, commit {harness.current_commit()}\n\n"
    for cells in (COLUMNS, *known.values()):
        text += " ".join(f"{cell:>13}" for cell in cells) + "\n"
    print(f"\n{text}")
    if not args.no_write:
        path.write_text(text)


def rows_of(name: str, runs: dict[str, list[dict]], args: argparse.Namespace) -> list[harness.Row]:
    seq_len, new_tokens, _ = CPU_LENGTHS if args.device == "cpu" else GPU_LENGTHS
    dtype = gpt2_common.dtype_of(args)
    rows = []
    for title, parts in (
        ("call", ("first_call_s",)),
        ("import and call", ("imported_s", "first_call_s")),
    ):
        found = {}
        for provider, results in runs.items():
            gap = max(result["gap"] for result in results)
            ran = provider != PATCHED or all(
                result["replaced"] and not result["fallbacks"] for result in results
            )
            found[provider] = Measurement(
                gap,
                ran and gap <= harness.TOLERANCE[dtype],
                [1e3 * sum(result[part] for part in parts) for result in results],
                results[0]["peak"] / 1e9 if "peak" in results[0] else None,
            )
        case = Case("gpt2_first_call", f"{name}, {title}", BATCH_SIZE, seq_len, dtype, new_tokens)
        rows += harness.make_rows(case, found, None, args.device)
        more = [statistics.median(m.times_ms) for m in (found[PATCHED], found[BASELINE])]
        print(f"  {name}, {title}: patched takes {(more[0] - more[1]) / 1e3:+.2f} s more")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpt2_common.add_arguments(parser)
    parser.set_defaults(runs=3)
    parser.add_argument("--models", default="small", help=f"comma-separated: {', '.join(MODELS)}")
    args = parser.parse_args()
    rows, lines = [], []
    for name in gpt2_common.names_of(args, parser):
        runs: dict[str, list[dict]] = {BASELINE: [], PATCHED: []}
        for _ in range(args.runs):
            for provider, results in runs.items():
                results.append(run_process(name, provider, args))
                shown = {key: round(value, 2) for key, value in results[-1].items()
                         if key.endswith("_s")}  # fmt: skip
                print(f"  {name}, {provider}: {shown}", flush=True)
        lines += [memory_line(name, provider, runs[provider][0]) for provider in runs]
        if args.runs >= 3:
            found = rows_of(name, runs, args)
            harness.record(found, args)
            rows += found
    if rows:
        harness.print_rows(rows)
    write_memory(lines, args)
    return harness.exit_status(rows)


if __name__ == "__main__":
    raise SystemExit(main())
