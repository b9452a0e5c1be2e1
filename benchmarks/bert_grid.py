"""BERT encoding over a grid of 60 shapes: is the patch ever slower than the unpatched model?

    python benchmarks/bert_grid.py                    # BERT-base in float16 on a GPU
    python benchmarks/bert_grid.py --compile          # 8 of the shapes against torch.compile too

Prints a line a shape and exits with 1 where the patched call took more than 1.03 times the
unpatched one, or than the compiled one. Nothing is written: `bert_encode.py` has the rows that the
README shows.
"""

import argparse
import statistics
import time

import harness
import torch
from bert_encode import build_batch, build_model
from harness import Case
from torch import Tensor, nn

import eet_patch

BATCHES = (1, 4, 16, 64)
LENGTHS = (8, 32, 128, 256, 512)
FILLS = (0.3, 0.65, 1.0)
COMPILED = {(1, 32), (1, 128), (4, 128), (16, 128), (16, 512), (64, 32), (64, 128), (64, 512)}
ALLOWED = 1.03


def median_ms(call, device: str, seconds: float) -> float:
    """Of as many calls as fit, 7 at least, after three that are not timed."""
    for _ in range(3):
        harness.clock(call, device)
    times, until = [], time.perf_counter() + seconds
    while len(times) < 7 or time.perf_counter() < until:
        times.append(harness.clock(call, device))
    return statistics.median(times)


def run_shape(model: nn.Module, case: Case, args: argparse.Namespace) -> bool:
    """Prints the times of one shape; whether the patch was as quick as it has to be."""
    batch = build_batch(case, args.device)
    real = batch["attention_mask"].bool()

    def encode(encoder: nn.Module = model) -> Tensor:
        with torch.no_grad():
            return encoder(**batch).last_hidden_state

    own = median_ms(encode, args.device, args.seconds)
    expected = encode()
    rivals = {"transformers": own}
    if args.compile and case.fill == 1 and (case.batch_size, case.seq_len) in COMPILED:
        torch._dynamo.reset()
        compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
        rivals["torch_compile"] = median_ms(lambda: encode(compiled), args.device, args.seconds)
    with eet_patch.enabled():
        error = harness.relative_error(encode()[real], expected[real])
        patched = median_ms(encode, args.device, args.seconds)
    right = error <= harness.TOLERANCE[case.dtype]
    quick = all(patched <= ALLOWED * rival for rival in rivals.values())
    times = ", ".join(f"{name} {rival:.3f}" for name, rival in rivals.items())
    marks = ("" if right else "  WRONG") + ("" if quick else "  SLOWER")
    print(f"{harness.title(case)}: {times}, eet_patch {patched:.3f} ms{marks}", flush=True)
    return right and quick


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="bert-base")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--seconds", type=float, default=0.05, help="least time for each median")
    parser.add_argument("--compile", action="store_true", help="against torch.compile too")
    parser.add_argument("--only", default="", help="regular expression: shapes whose title matches")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = build_model(args.model, dtype, args.device)
    cases = [
        Case("bert_grid", args.model, batch_size, seq_len, dtype, fill=fill)
        for batch_size in BATCHES
        for seq_len in LENGTHS
        for fill in FILLS
    ]
    cases = harness.selected(cases, args.only)
    good = [run_shape(model, case, args) for case in cases]
    print(f"{sum(good)} of {len(good)} shapes are right and not slower")
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
