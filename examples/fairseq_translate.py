"""Run fairseq-generate with eet_patch and without: the same hypotheses, scores and BLEU, and the
times.

    python examples/fairseq_translate.py
    python examples/fairseq_translate.py --data data-bin --path model.pt --beam 5 --max-tokens 8000

Without --path it trains a small model first (train_tiny_fairseq.py, about a minute), which writes
number, date and time words as digits. The only difference between the two commands is
`--user-dir $(python -m eet_patch fairseq-dir)`.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from typing import NamedTuple

import torch
from train_tiny_fairseq import command, tiny_fairseq_path

import eet_patch

MAX_SCORE_DIFFERENCE = 1e-4
RUNS = 3


class Result(NamedTuple):
    hypotheses: list[tuple[str, float, str]]  # id of the sentence, score, words
    bleu: str
    seconds: float  # of the search, by fairseq's own clock
    report: str


def generate(arguments: list[str], patched: bool) -> Result:
    env = dict(os.environ, EET_REPORT="1")
    # fairseq 0.12 predates torch 2.6, which refuses to load its checkpoints; our folder mends that.
    env |= {} if patched else {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    flag = ["--user-dir", eet_patch.fairseq_dir()] if patched else []
    words = [*command("fairseq-generate"), *arguments, *flag]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    seconds = re.search(r"Translated .* in ([\d.]+)s", done.stdout + done.stderr)
    if done.returncode or seconds is None:
        sys.exit(done.stdout[-2000:] + done.stderr)
    lines = done.stdout.splitlines()
    split = [line.split("\t", 2) for line in lines if line.startswith("H-")]
    hypotheses = [(name, float(score), words) for name, score, words in split]
    bleu = [line for line in lines if "BLEU" in line]
    report = [line for line in done.stderr.splitlines() if " calls " in line]
    return Result(hypotheses, "".join(bleu[-1:]), float(seconds[1]), "\n".join(report))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder made by fairseq-preprocess")
    parser.add_argument("--path", help="checkpoint")
    parser.add_argument("--beam", default="4")
    parser.add_argument("--max-tokens", default="3000")
    parser.add_argument("--gen-subset", default="test")
    parser.add_argument("--fp16", action="store_true")
    args = parser.parse_args()
    if args.path is None:
        folder = tiny_fairseq_path("pre_norm")
        args.data, args.path = (
            str(folder / "corpus" / "data"),
            str(folder / "pre_norm" / "model.pt"),
        )
    arguments = [args.data, "--path", args.path, "--beam", args.beam]
    arguments += ["--max-tokens", args.max_tokens, "--gen-subset", args.gen_subset]
    arguments += [] if torch.cuda.is_available() else ["--cpu"]
    arguments += ["--fp16"] if args.fp16 else []

    own, out = [], []
    for _ in range(RUNS):  # in turns, so that a machine that slows down slows both
        own.append(generate(arguments, patched=False))
        out.append(generate(arguments, patched=True))
    print(f"{len(own[0].hypotheses)} sentences, beam {args.beam}\n")
    for name, runs in (("fairseq", own), ("eet_patch", out)):
        print(f"{name:12s}{statistics.median(run.seconds for run in runs):8.2f} s to translate")

    pairs = list(zip(out[0].hypotheses, own[0].hypotheses, strict=True))
    parted = sum((mine[0], mine[2]) != (theirs[0], theirs[2]) for mine, theirs in pairs)
    difference = max(abs(mine[1] - theirs[1]) for mine, theirs in pairs)
    print(f"\n{parted} hypotheses differ; largest difference of a score {difference:.1e}")
    print(f"fairseq    {own[0].bleu}\neet_patch  {out[0].bleu}\n{out[0].report}")
    if args.fp16:  # rounding decides between hypotheses that score nearly the same
        return 0
    same = not parted and difference <= MAX_SCORE_DIFFERENCE and own[0].bleu == out[0].bleu
    return 0 if same and "calls replaced" in out[0].report else 1


if __name__ == "__main__":
    sys.exit(main())
