"""The charts that EET published for GPT-2: 1024 tokens in all at batch 4, fp16, by the share of
them that is context, and by hidden size at half of it.

    python benchmarks/gpt2_context.py --slow-runs 3
    python benchmarks/gpt2_context.py --only 'h1024 ' --providers eet_patch,transformers
    python benchmarks/gpt2_context.py --providers transformers-static-compile --slow-runs 3

24 layers, 12 above a hidden size of 5120; heads of 64. A row is a whole call of generate() / new
tokens. PUBLISHED stands against the PyTorch of 2021, which fed a prompt token by token: it is
quoted beside our rows, not compared with them. Check and floor are those of gpt2_common.py.
"""

import argparse

import gpt2_common
import harness
from gpt2_common import EAGER, STATIC
from harness import BASELINE, PATCHED, Case

HEAD_DIM = 64
TOTAL = 1024
GPU_ROWS = (  # hidden size, context
    *((1024, context) for context in (1, 64, 128, 256, 512, 768, 960)),
    *((hidden_size, 512) for hidden_size in (1536, 2048, 2560, 4096, 5120, 12288)),
)
CPU_TOTAL = 64  # on a CPU two layers of each, to try the script
CPU_ROWS = ((128, 1), (128, 32), (256, 32))
# EET's speed-up over PyTorch on an A100, at (hidden size, context) of 1024 tokens.
PUBLISHED = {
    (1024, 1): 3.96,
    (1024, 512): 7.62,
    (1024, 960): 52.9,
    (1536, 512): 6.26,
    (2048, 512): 6.23,
    (2560, 512): 5.45,
    (4096, 512): 4.03,
    (5120, 512): 3.54,
    (12288, 512): 2.21,
}


def layers_of(hidden_size: int, device: str) -> int:
    if device == "cpu":
        return 2
    return 24 if hidden_size <= 5120 else 12


def name_of(hidden_size: int) -> str:
    return f"h{hidden_size}"


def published(row: harness.Row) -> str:
    """EET's own ratio for the work of a row, as text; a dash where it published none."""
    hidden_size, context = int(row["model"].removeprefix("h")), int(row["seq_len"])
    same_work = row["batch_size"] == "4" and context + int(row["new_tokens"]) == TOTAL
    ratio = PUBLISHED.get((hidden_size, context)) if same_work else None
    return f"{ratio}x" if ratio else "–"


def run_case(case: Case, rates: harness.Rates, args: argparse.Namespace) -> list[harness.Row]:
    hidden_size = int(case.model.removeprefix("h"))
    shape = (layers_of(hidden_size, args.device), hidden_size, hidden_size // HEAD_DIM)
    model = gpt2_common.build_model(shape, case.dtype, args.device)
    prompt = gpt2_common.prompt_of(case.batch_size, case.seq_len, args.device)
    known = gpt2_common.providers_of(case, model, prompt, args.device)
    providers = gpt2_common.chosen(known, args.providers, (BASELINE, EAGER, PATCHED, STATIC))
    found = harness.measure(providers, gpt2_common.greedy_check(case, model), args)
    floor_ms = gpt2_common.generation_floor(case, rates, model)
    return harness.make_rows(case, found, floor_ms, args.device, per=case.new_tokens)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpt2_common.add_arguments(parser)
    args = parser.parse_args()
    harness.prepare(args)
    on_cpu = args.device == "cpu"
    dtype, total = gpt2_common.dtype_of(args), CPU_TOTAL if on_cpu else TOTAL
    cases = [
        Case("gpt2_context", name_of(hidden_size), 4, context, dtype, total - context)
        for hidden_size, context in (CPU_ROWS if on_cpu else GPU_ROWS)
    ]
    return gpt2_common.run_cases(harness.selected(cases, args.only), run_case, args)


if __name__ == "__main__":
    raise SystemExit(main())
