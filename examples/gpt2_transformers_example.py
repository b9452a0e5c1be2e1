"""Generate text greedily with GPT-2, with eet_patch and without: same tokens, and the times.

    python examples/gpt2_transformers_example.py
    python examples/gpt2_transformers_example.py --model gpt2 --dtype float16

Without --model it takes the model of train_tiny_gpt2.py; the first run trains it in a minute.
"""

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor
from train_tiny_gpt2 import tiny_gpt2_path
from transformers import AutoModelForCausalLM, AutoTokenizer

import eet_patch

PROMPTS = [
    "Return the",
    "This module provides a",
    "Raise ValueError if the argument is not",
    "The optional argument is used to specify the name of the",
]
RUNS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hub id or folder of a GPT-2 model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    name = args.model or tiny_gpt2_path()

    # Nothing up to `generate` knows of eet_patch: this is the code that you have already.
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype))
    model = model.to(args.device).eval()
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt").to(args.device)
    prompt_length = batch["input_ids"].shape[1]
    options = {"max_new_tokens": args.new_tokens, "do_sample": False}
    options["pad_token_id"] = tokenizer.pad_token_id

    def generate() -> tuple[Tensor, float]:
        started = time.perf_counter()
        tokens = model.generate(**batch, **options).cpu()  # .cpu() waits for the device
        seconds = time.perf_counter() - started
        return tokens, seconds * 1e3 / (tokens.shape[1] - prompt_length)

    def parts_at_ties(expected: Tensor, actual: Tensor) -> bool:
        """In half precision two tokens may be as likely as each other but for rounding."""
        with_logits = {"output_logits": True, "return_dict_in_generate": True}
        logits = model.generate(**batch, **options, **with_logits).logits
        width = min(expected.shape[1], actual.shape[1])
        for row, differing in enumerate(expected[:, :width] != actual[:, :width]):
            for position in differing.nonzero()[:1].flatten().tolist():  # the first, if any
                scores = logits[position - prompt_length][row].float()
                gap = scores[expected[row, position]] - scores[actual[row, position]]
                if gap > 8 * torch.finfo(model.dtype).eps * scores.abs().max():
                    return False
        return True

    times: dict[str, list[float]] = {"transformers": [], "eet_patch": []}
    # In turns, so that a machine that slows down slows both; the first run warms up.
    for run in range(RUNS + 1):
        expected, plain_ms = generate()
        with eet_patch.enabled():
            actual, patched_ms = generate()
            report = eet_patch.report()
        if run >= 1:
            times["transformers"] += [plain_ms]
            times["eet_patch"] += [patched_ms]

    same = torch.equal(actual, expected)
    verdict = "equal" if same else "DIFFER"
    if not same and parts_at_ties(expected, actual):
        same, verdict = True, "equal up to a tie within rounding"
    calls = sum(target.replaced for target in report.targets)
    print(f"{type(model).__name__}, {args.dtype} on {args.device}, {len(PROMPTS)} prompts\n")
    for prompt, tokens in zip(PROMPTS, actual, strict=True):
        print(f"  {prompt!r} ->\n    {tokenizer.decode(tokens, skip_special_tokens=True)!r}")
    for provider, runs in times.items():
        print(f"{provider:14s}{statistics.median(runs):9.2f} ms a step")
    print(f"tokens {verdict}, {calls} calls replaced")
    for target in report.targets:
        if target.replaced or target.fallbacks:
            fell_back = target.fallbacks or "never"
            print(f"  {target.name}: {target.replaced} replaced, fell back: {fell_back}")
    return 0 if same and calls > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
