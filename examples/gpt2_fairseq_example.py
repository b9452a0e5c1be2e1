"""Continue prompts with a decoder-only language model of fairseq, with eet_patch and without: same
tokens and scores, and the times.

    python examples/gpt2_fairseq_example.py
    python examples/gpt2_fairseq_example.py --model FOLDER --data data-bin --prompt "a few words"

--model names a folder with model.pt of a `transformer_lm` (as `transformer_lm_gpt2_small`). Without
it a small one is trained (train_tiny_fairseq.py, half a minute).
"""

import argparse
import logging
import statistics
import sys
import time

import torch
from fairseq.models.transformer_lm import TransformerLanguageModel
from train_tiny_fairseq import tiny_fairseq_path

import eet_patch

PROMPTS = ["the third of", "half past", "seven thousand two", "twenty five past eleven and the"]
MAX_SCORE_DIFFERENCE = {"float32": 1e-4, "float16": 5e-2}  # of a token's log-probability
RUNS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder that holds model.pt")
    parser.add_argument("--data", help="folder of its dictionary, made by fairseq-preprocess")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--beam", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(MAX_SCORE_DIFFERENCE), default="float32")
    args = parser.parse_args()
    if args.model is None:
        folder = tiny_fairseq_path("lm")
        args.model, args.data = str(folder / "lm"), str(folder / "corpus" / "data_lm")
    logging.disable(logging.INFO)

    # user_dir lets fairseq 0.12 load checkpoints with torch 2.6 and later, and enables the patch.
    model = TransformerLanguageModel.from_pretrained(
        args.model, "model.pt", args.data, user_dir=eet_patch.fairseq_dir()
    )
    model = model.to(args.device, getattr(torch, args.dtype)).eval()
    prompts = [model.encode(text)[:-1] for text in args.prompt or PROMPTS]  # without the end

    def continued() -> tuple[list[dict], float]:
        started = time.perf_counter()
        beams = model.generate(
            prompts, beam=args.beam, max_len_b=args.new_tokens, min_len=args.new_tokens
        )
        hypotheses = [beam[0] for beam in beams]
        scores = [hypothesis["positional_scores"].cpu() for hypothesis in hypotheses]  # waits
        elapsed = (time.perf_counter() - started) * 1e3
        tokens = [hypothesis["tokens"].tolist() for hypothesis in hypotheses]
        return [{"tokens": t, "scores": s} for t, s in zip(tokens, scores, strict=True)], elapsed

    times: dict[str, list[float]] = {"fairseq": [], "eet_patch": []}
    for run in range(RUNS + 1):  # in turns; the first warms up
        eet_patch.disable()
        own, plain_ms = continued()
        eet_patch.enable()
        out, patched_ms = continued()
        if run:
            times["fairseq"] += [plain_ms]
            times["eet_patch"] += [patched_ms]
    for hypothesis in out:
        print("-", model.decode(torch.tensor(hypothesis["tokens"])))
    print()
    for provider, runs in times.items():
        print(f"{provider:12s}{statistics.median(runs):9.1f} ms for {len(prompts)} prompts")
    same = [mine["tokens"] == theirs["tokens"] for mine, theirs in zip(out, own, strict=True)]
    differences = [
        (mine["scores"] - theirs["scores"]).abs().max().item()
        for mine, theirs, equal in zip(out, own, same, strict=True)
        if equal
    ]
    row = eet_patch.report()["fairseq_search"]
    print(f"\n{sum(same)} of {len(same)} the same, scores differ by {max(differences):.1e} at most")
    print(f"{row.replaced} searches replaced, fell back: {row.fallbacks or 'never'}")
    within = max(differences) <= MAX_SCORE_DIFFERENCE[args.dtype] and row.replaced > 0
    return 0 if within and (all(same) or args.dtype != "float32") else 1


if __name__ == "__main__":
    sys.exit(main())
