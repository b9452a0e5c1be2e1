"""The whole command: `fairseq-generate` without and with `--user-dir $(python -m eet_patch
fairseq-dir)`, by the time that it says itself ("Translated ... sentences"), in turns.

    python benchmarks/fairseq_generate.py --device cpu --threads 2
    python benchmarks/fairseq_generate.py --model wmt_big        # on a GPU, in fp16

By itself the model is the small one of examples/train_tiny_fairseq.py, trained if it is not there
yet; the sentences are of its kind, of mixed length. check: the same hypotheses and BLEU, scores
within 1e-4.

wmt_big is transformer_wmt_en_de_big with random weights, a dictionary of 32768 and sentences of 5
to 60 words, whose hypotheses run to their limit, as many tokens as the source. Where nothing was
learned many a choice lies within rounding: check: the best hypotheses score the same, on average
and sentence by sentence, to within what fp16 leaves.
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
from typing import NamedTuple

import fairseq.options
import fairseq.tasks
import harness
import torch
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from harness import PATCHED, Case, Measurement
from omegaconf import OmegaConf

import eet_patch

sys.path.insert(0, str(harness.ROOT / "examples"))
import train_tiny_fairseq as fixture

BASELINE = "fairseq"
SENTENCES, SEED = 3000, 11
# Of wmt_big: the dictionary, of which fairseq adds four tokens itself, and words of a sentence.
VOCAB_SIZE, SPECIAL_TOKENS, LENGTHS = 32768, 4, (5, 60)
MAX_SCORE_DIFFERENCE = 1e-4


class Work(NamedTuple):
    """What is translated: the data set, the model, and the options that a user would give."""

    data: Path
    model: Path
    mean_words: float
    options: tuple[str, ...]


def preprocess(folder: Path, dictionaries: tuple[Path, Path]) -> None:
    fixture.run(
        "fairseq-preprocess", "-s", "words", "-t", "digits", "--testpref", folder / "test",
        "--srcdict", dictionaries[0], "--tgtdict", dictionaries[1], "--destdir", folder / "data",
    )  # fmt: skip


def write_lines(folder: Path, pairs: list[tuple[str, str]]) -> float:
    """A test set as text; returns the mean number of words."""
    for side, lines in zip(("words", "digits"), zip(*pairs, strict=True), strict=True):
        (folder / f"test.{side}").write_text("\n".join(lines) + "\n")
    return sum(len(words.split()) for words, _ in pairs) / len(pairs)


def fixture_work(folder: Path, args: argparse.Namespace) -> Work:
    trained = fixture.tiny_fairseq_path("pre_norm")
    rng = random.Random(SEED)
    mean_words = write_lines(folder, [fixture.sentence_pair(rng) for _ in range(args.sentences)])
    data = trained / "corpus" / "data"
    preprocess(folder, (data / "dict.words.txt", data / "dict.digits.txt"))
    return Work(folder / "data", trained / "pre_norm" / "model.pt", mean_words, ())


def wmt_big_work(folder: Path, args: argparse.Namespace) -> Work:
    rng = random.Random(SEED)
    names = [f"w{number}" for number in range(VOCAB_SIZE - SPECIAL_TOKENS)]
    dictionary = folder / "dict.txt"
    dictionary.write_text("".join(f"{name} 1\n" for name in names))
    lines = [" ".join(rng.choices(names, k=rng.randint(*LENGTHS))) for _ in range(args.sentences)]
    mean_words = write_lines(folder, [(line, line) for line in lines])
    preprocess(folder, (dictionary, dictionary))
    write_checkpoint(folder, args)
    options = ["--batch-size", "128", "--max-len-a", "1", "--max-len-b", "0"]
    if args.device != "cpu":
        options.append("--fp16")
    return Work(folder / "data", folder / "model.pt", mean_words, tuple(options))


def write_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """A model of random weights in the form in which fairseq-train leaves one."""
    parser = fairseq.options.get_training_parser()
    task = [str(folder / "data"), "--task", "translation", "-s", "words", "-t", "digits"]
    words = [*task, "--arch", "transformer_wmt_en_de_big", "--share-all-embeddings"]
    words += args.shape.split()
    config = convert_namespace_to_omegaconf(fairseq.options.parse_args_and_arch(parser, words))
    torch.manual_seed(0)
    with torch.device(args.device):
        model = fairseq.tasks.setup_task(config.task).build_model(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    kept = {
        "cfg": OmegaConf.to_container(config, resolve=True, enum_to_str=True),
        "args": None,
        "model": model.half().cpu().state_dict(),
        "optimizer_history": [{"criterion_name": "", "num_updates": 0, "lr_scheduler_state": {}}],
        "extra_state": {},
        "task_state": {},
    }
    torch.save(kept, folder / "model.pt")


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


def random_difference(own: str, out: str) -> tuple[float, bool]:
    """The relative error of the scores, and whether they say the same; says how many hypotheses
    are.
    """
    mine, theirs = hypotheses(out), hypotheses(own)
    if not theirs or mine.keys() != theirs.keys():
        return float("nan"), False
    same = sum(mine[key][1] == theirs[key][1] for key in theirs)
    print(f"  {same} of {len(theirs)} best hypotheses are the same", flush=True)
    scores = [torch.tensor([found[key][0] for key in theirs]).double() for found in (mine, theirs)]
    error = harness.relative_error(*scores)
    shift = float((scores[0].mean() - scores[1].mean()).abs() / scores[1].mean().abs())
    return error, max(error, shift) <= harness.TOLERANCE[torch.float16]


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
    parser.add_argument("--model", choices=["fixture", "wmt_big"], default="fixture")
    parser.add_argument("--sentences", type=int, default=SENTENCES)
    parser.add_argument("--shape", default="", help="further arguments of wmt_big's architecture")
    args = parser.parse_args()
    harness.prepare(args)
    is_fixture = args.model == "fixture"
    with tempfile.TemporaryDirectory() as scratch:
        work = (fixture_work if is_fixture else wmt_big_work)(Path(scratch), args)
        words = [
            *fixture.command("fairseq-generate"), str(work.data), "--path", str(work.model),
            "--beam", str(args.beam), "--num-workers", "0", *work.options,
            *(["--cpu"] if args.device == "cpu" else []),
        ]  # fmt: skip
        found = {name: Measurement() for name in (BASELINE, PATCHED)}
        printed = dict.fromkeys(found, "")
        for turn in range(args.runs if is_fixture else args.slow_runs):
            for name in reversed(found) if turn % 2 else found:
                ms, printed[name] = generate(words, name == PATCHED, args)
                found[name].times_ms.append(ms)
                print(f"{name}: {ms:.3f} ms a sentence", flush=True)
            compare = difference if is_fixture else random_difference
            error, same = compare(printed[BASELINE], printed[PATCHED])
            for measurement in found.values():
                measurement.max_error, measurement.checked = error, same
    tokens = [len(text.split()) for _, text in hypotheses(printed[BASELINE]).values()]
    dtype = torch.float32 if args.device == "cpu" or is_fixture else torch.float16
    case = Case("fairseq_generate", f"{args.model} beam {args.beam}", args.sentences,
                round(work.mean_words), dtype, round(sum(tokens) / len(tokens)))  # fmt: skip
    rows = harness.make_rows(case, found, None, args.device)
    for row in rows:
        row["host"] = f"fairseq {importlib.metadata.version('ve-fairseq')}"
    harness.record(rows, args)
    harness.print_rows(rows)
    return harness.exit_status(rows)


if __name__ == "__main__":
    raise SystemExit(main())
