"""The whole command: `fairseq-generate` without and with `--user-dir $(python -m eet_patch
fairseq-dir)`, by the time that it says itself ("Translated ... sentences"), in turns.

    python benchmarks/fairseq_generate.py --device cpu --threads 2

The model is the small one of examples/train_tiny_fairseq.py, trained if it is not there yet; the
sentences are of its kind, of mixed length. check: the same hypotheses and BLEU, scores within 1e-4.
"""

import argparse
import importlib.metadata
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import torch
from harness import PATCHED, Case, Measurement

import eet_patch

sys.path.insert(0, str(harness.ROOT / "examples"))
import train_tiny_fairseq as fixture

BASELINE = "fairseq"
SENTENCES, SEED = 3000, 11
MAX_SCORE_DIFFERENCE = 1e-4


def write_data(folder: Path, corpus: Path) -> float:
    """A test set by the fixture's dictionary; returns the mean number of words."""
    rng = random.Random(SEED)
    pairs = [fixture.sentence_pair(rng) for _ in range(SENTENCES)]
    for side, lines in zip(("words", "digits"), zip(*pairs, strict=True), strict=True):
        (folder / f"test.{side}").write_text("\n".join(lines) + "\n")
    fixture.run(
        "fairseq-preprocess", "-s", "words", "-t", "digits", "--testpref", folder / "test",
        "--srcdict", corpus / "data" / "dict.words.txt",
        "--tgtdict", corpus / "data" / "dict.digits.txt", "--destdir", folder / "data",
    )  # fmt: skip
    return sum(len(words.split()) for words, _ in pairs) / SENTENCES


def generate(words: list[str], patched: bool, args: argparse.Namespace) -> tuple[float, str]:
    """Milliseconds a sentence, and what was printed."""
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # of the checkpoint, by torch's newer releases
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(harness.ROOT), env.get("PYTHONPATH")]))
    flag = ["--user-dir", eet_patch.fairseq_dir()] if patched else []
    done = subprocess.run([*words, *flag], capture_output=True, text=True, env=env)
    rate = re.search(r"Translated .*\((\d[\d.,]*) sentences/s", done.stdout + done.stderr)
    if done.returncode or rate is None:
        raise SystemExit(done.stdout[-1000:] + done.stderr[-3000:])
    return 1e3 / float(rate[1].replace(",", "")), done.stdout


def hypotheses(text: str) -> dict[str, tuple[float, str]]:
    found = {}
    for line in text.splitlines():
        if match := re.match(r"(H-\d+)\t(\S+)\t(.*)", line):
            found[match[1]] = float(match[2]), match[3]
    return found


def difference(own: str, out: str) -> tuple[float, bool]:
    """The largest of two runs' scores, and whether all else is the same."""
    mine, theirs = hypotheses(out), hypotheses(own)
    same = mine.keys() == theirs.keys() and len(mine) > 0
    same = same and all(mine[key][1] == theirs[key][1] for key in theirs)
    worst = max((abs(mine[k][0] - theirs[k][0]) for k in theirs if k in mine), default=1.0)
    bleu = [re.findall(r"BLEU4 = [\d.]+", text) for text in (own, out)]
    return worst, same and bleu[0] == bleu[1] and worst <= MAX_SCORE_DIFFERENCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_arguments(parser)
    parser.add_argument("--beam", type=int, default=5)
    args = parser.parse_args()
    harness.prepare(args)
    folder = fixture.tiny_fairseq_path("pre_norm")
    with tempfile.TemporaryDirectory() as scratch:
        mean_words = write_data(Path(scratch), folder / "corpus")
        words = [
            *fixture.command("fairseq-generate"), str(Path(scratch) / "data"),
            "--path", str(folder / "pre_norm" / "model.pt"), "--beam", str(args.beam),
            "--num-workers", "0", *(["--cpu"] if args.device == "cpu" else []),
        ]  # fmt: skip
        found = {name: Measurement() for name in (BASELINE, PATCHED)}
        printed = dict.fromkeys(found, "")
        for turn in range(args.runs):
            for name in reversed(found) if turn % 2 else found:
                ms, printed[name] = generate(words, name == PATCHED, args)
                found[name].times_ms.append(ms)
                print(f"{name}: {ms:.3f} ms a sentence", flush=True)
            error, same = difference(printed[BASELINE], printed[PATCHED])
            for measurement in found.values():
                measurement.max_error, measurement.checked = error, same
    tokens = [len(text.split()) for _, text in hypotheses(printed[BASELINE]).values()]
    case = Case("fairseq_generate", f"fixture beam {args.beam}", SENTENCES, round(mean_words),
                torch.float32, round(sum(tokens) / len(tokens)))  # fmt: skip
    rows = harness.make_rows(case, found, None, args.device)
    for row in rows:
        row["host"] = f"fairseq {importlib.metadata.version('ve-fairseq')}"
    harness.record(rows, args)
    harness.print_rows(rows)
    return harness.exit_status(rows)


if __name__ == "__main__":
    raise SystemExit(main())
