"""Train small fairseq models that write number, date and time words as digits: a minute on two
cores.

    python examples/train_tiny_fairseq.py                # prints the folder
    python examples/train_tiny_fairseq.py --name post_norm --out DIR

    the third of may nineteen eighty four and half past seven  ->  0 3 . 0 5 . 1 9 8 4 ; 0 7 : 3 0

The corpus is made by this script, so that there is nothing to download, and a minute of training is
enough for a model that is mostly right: its hypotheses end, differ in length and are far apart in
score, which those of random weights are not. Everything runs through fairseq's own commands
(fairseq-preprocess, fairseq-train).
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

DEFAULT_OUT = Path.home() / ".cache" / "eet_patch" / "tiny_fairseq"
# test1 is a second, small test set, which fairseq names so.
SIZES = {"train": 16000, "valid": 200, "test": 300, "test1": 48}
SEED = 0

ONES = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
MONTHS = (
    "january february march april may june july august september october november december"
).split()
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth "
    "fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
).split()

SEQ2SEQ = ["--task", "translation", "--arch", "transformer"]
SMALL = "--encoder-layers 2 --decoder-layers 2".split()
EMBED_96 = (
    "--encoder-embed-dim 96 --encoder-ffn-embed-dim 192 --encoder-attention-heads 4 "
    "--decoder-embed-dim 96 --decoder-ffn-embed-dim 192 --decoder-attention-heads 4"
).split()
# The encoder's width is not the decoder's, and positions are learned.
EMBED_96_64 = (
    "--encoder-embed-dim 96 --encoder-ffn-embed-dim 160 --encoder-attention-heads 4 "
    "--decoder-embed-dim 64 --decoder-ffn-embed-dim 160 --decoder-attention-heads 4 "
    "--encoder-learned-pos --decoder-learned-pos --max-source-positions 128 "
    "--max-target-positions 128"
).split()
BART = (
    "--encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --encoder-attention-heads 4 "
    "--decoder-embed-dim 64 --decoder-ffn-embed-dim 128 --decoder-attention-heads 4 "
    "--max-source-positions 128 --max-target-positions 128"
).split()
LM = (
    "--task language_modeling --arch transformer_lm --decoder-layers 2 --decoder-embed-dim 64 "
    "--decoder-ffn-embed-dim 160 --decoder-attention-heads 4 --tokens-per-sample 64 "
    "--sample-break-mode none --share-decoder-input-output-embed"
).split()
# Name of a model -> (arguments that make it, updates, learning rate).
MODELS = {
    "pre_norm": (
        [*SEQ2SEQ, *SMALL, *EMBED_96, "--encoder-normalize-before", "--decoder-normalize-before"],
        700,
        "7e-3",
    ),
    "post_norm": ([*SEQ2SEQ, *SMALL, *EMBED_96_64, "--activation-fn", "gelu"], 300, "4e-3"),
    "bart": (["--task", "translation", "--arch", "bart_base", *SMALL, *BART], 500, "2e-3"),
    "lm": (LM, 300, "4e-3"),
}
SHARED = (
    "--optimizer adam --adam-betas (0.9,0.98) --lr-scheduler inverse_sqrt "
    "--warmup-updates 150 --dropout 0 --attention-dropout 0 --activation-dropout 0 --max-epoch 20 "
    "--max-tokens 1000 --required-batch-size-multiple 1 --num-workers 0 --seed 1 "
    "--no-epoch-checkpoints --no-last-checkpoints --disable-validation --log-format none --cpu "
    # Its reader thread aborts the process at the end of training on Python 3.11.
    "--data-buffer-size 0"
).split()


# --- the corpus ----------------------------------------------------------------------------------


def below_100(number: int) -> list[str]:
    if number < 10:
        return [ONES[number]]
    if number < 20:
        return [TEENS[number - 10]]
    tens, ones = divmod(number, 10)
    return [TENS[tens - 2], *([ONES[ones]] if ones else [])]


def number_item(rng: random.Random) -> tuple[list[str], str]:
    number = rng.randrange(10 ** rng.randint(1, 6))
    words: list[str] = []
    thousands, rest = divmod(number, 1000)
    for part, unit in ((thousands, ["thousand"]), (rest, [])):
        hundreds, small = divmod(part, 100)
        if hundreds:
            words += [ONES[hundreds], "hundred"]
        if small or not (part or words or unit):
            words += below_100(small)
        if part:
            words += unit
    return words or [ONES[0]], str(number)


def date_item(rng: random.Random) -> tuple[list[str], str]:
    day, month, year = rng.randint(1, 20), rng.randrange(12), rng.randint(1910, 1999)
    words = ["the", ORDINALS[day - 1], "of", MONTHS[month], *below_100(year // 100)]
    return [*words, *below_100(year % 100)], f"{day:02d}.{month + 1:02d}.{year}"


def time_item(rng: random.Random) -> tuple[list[str], str]:
    hour = rng.randint(1, 12)
    kind = rng.randrange(3)
    if kind == 0:
        return ["half", "past", *below_100(hour)], f"{hour:02d}:30"
    if kind == 1:
        return [*below_100(hour), "o'clock"], f"{hour:02d}:00"
    minute = rng.randint(1, 29)
    return [*below_100(minute), "past", *below_100(hour)], f"{hour:02d}:{minute:02d}"


def sentence_pair(rng: random.Random) -> tuple[str, str]:
    items = [rng.choice((number_item, date_item, time_item))(rng) for _ in range(rng.randint(1, 4))]
    words = " and ".join(" ".join(words) for words, _ in items)
    return words, " ; ".join(" ".join(digits) for _, digits in items)


def write_corpus(folder: Path) -> None:
    """Writes train, valid and test as .words and .digits files, one sentence a line."""
    rng = random.Random(SEED)
    for split, size in SIZES.items():
        pairs = [sentence_pair(rng) for _ in range(size)]
        for side, lines in zip(("words", "digits"), zip(*pairs, strict=True), strict=True):
            (folder / f"{split}.{side}").write_text("\n".join(lines) + "\n")


# --- fairseq's commands --------------------------------------------------------------------------


def command(name: str) -> list[str]:
    """The command `name` ("fairseq-train") of the environment whose Python this is."""
    script = Path(sys.executable).with_name(name)
    if script.exists():
        return [str(script)]
    return [sys.executable, "-m", f"fairseq_cli.{name.removeprefix('fairseq-').replace('-', '_')}"]


def run(name: str, *args: object, **environment: str) -> None:
    # These sizes gain nothing from threads, and threads that wait take time from each other.
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    words = [*command(name), *map(str, args)]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words)}\nended with {done.returncode}:\n{done.stderr[-3000:]}"
        )


def preprocess(raw: Path, out: Path) -> None:
    def prefixes(suffix: str) -> list[str]:
        return [
            f"--trainpref={raw}/train{suffix}",
            f"--validpref={raw}/valid{suffix}",
            f"--testpref={raw}/test{suffix},{raw}/test1{suffix}",
        ]

    run("fairseq-preprocess", "-s", "words", "-t", "digits", "--joined-dictionary", *prefixes(""),
        "--destdir", out / "data")  # fmt: skip
    # The language model reads words, by the same dictionary.
    run("fairseq-preprocess", "--only-source", "--srcdict", out / "data" / "dict.words.txt",
        *prefixes(".words"), "--destdir", out / "data_lm")  # fmt: skip


def data_folder(name: str) -> str:
    return "data_lm" if name == "lm" else "data"


def build_data(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch)
        write_corpus(folder)
        preprocess(folder, folder / "out")
        for split in SIZES:
            for side in ("words", "digits"):
                shutil.copy(folder / f"{split}.{side}", folder / "out")
        move(folder / "out", out)


def train(name: str, data: Path, out: Path) -> None:
    arguments, updates, rate = MODELS[name]
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch) / "out"
        run(
            "fairseq-train", data / data_folder(name), *arguments, *SHARED,
            "--max-update", updates, "--lr", rate, "--save-dir", folder,
            *([] if name == "lm" else ["--criterion", "label_smoothed_cross_entropy",
                                       "--label-smoothing", "0.1"]),
            "--save-interval-updates", updates, "--keep-interval-updates", "1",
        )  # fmt: skip
        (checkpoint,) = folder.glob(f"checkpoint_*_{updates}.pt")
        checkpoint.rename(folder / "model.pt")
        for other in folder.glob("checkpoint*.pt"):
            other.unlink()
        move(folder, out)


def move(source: Path, target: Path) -> None:
    """Puts a finished folder where it belongs, at once and whole; another process may be first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():
            raise


def recipe() -> str:
    """Short hash of this script: another recipe gets another folder."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def tiny_fairseq_path(*names: str, out: str | os.PathLike[str] = DEFAULT_OUT) -> Path:
    """The folder that holds corpus/ (as text, and as data/ and data_lm/) and `name`/model.pt of
    each name; makes what is not there yet, two models at a time.
    """
    folder = Path(out) / recipe()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "corpus").is_dir():
        build_data(folder / "corpus")
    missing = [name for name in names if not (folder / name).is_dir()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: train(name, folder / "corpus", folder / name), missing))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", choices=MODELS, default="pre_norm", help="which model")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of data and models")
    args = parser.parse_args()
    started = time.perf_counter()
    path = tiny_fairseq_path(args.name, out=args.out)
    print(f"{path} (ready after {time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
