"""fairseq's commands as a user runs them, with and without `--user-dir $(python -m eet_patch
fairseq-dir)`.
"""

import filecmp
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq_helpers import (
    DECODER,
    ENCODER,
    SEARCH,
    WHOLE_ENCODER,
    assert_same,
    parse,
    run_both,
    run_command,
)
from helpers import REPOSITORY, in_place

import eet_patch


def assert_replaced(rows, *names):
    for name in names:
        assert rows[name]["status"] == "applied"
        assert rows[name]["replaced"] > 0 and rows[name]["fallbacks"] == {}


def losses(done):
    """The losses that a command reports in its last lines."""
    found = re.findall(r"(?:Loss \(base 2\): |\| loss )([\d.]+)", done.stdout + done.stderr)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return [float(loss) for loss in found]


def test_the_folder_stands_alone():
    """fairseq puts the folder's parent first on sys.path: nothing in it may hide another module."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), *in_place()]))
    done = subprocess.run(
        [sys.executable, "-m", "eet_patch", "fairseq-dir"],
        capture_output=True,
        text=True,
        env=env,
        cwd=str(Path(__file__).parents[1]),
    )
    folder = Path(done.stdout.removesuffix("\n"))
    assert done.returncode == 0 and folder.is_dir() and str(folder) == eet_patch.fairseq_dir()
    assert [path.name for path in folder.parent.iterdir()] == ["eet_fairseq_plugin"]
    assert (folder / "__init__.py").is_file()


def test_generate(trained, tmp_path):
    own, out, rows = run_both(
        tmp_path, "fairseq-generate", trained / "corpus" / "data",
        "--path", trained / "pre_norm" / "model.pt", "--beam", "4", "--nbest", "2",
    )  # fmt: skip
    assert_same(parse(out.stdout), parse(own.stdout))
    assert_replaced(rows, WHOLE_ENCODER, SEARCH)
    assert "PatchWarning" not in out.stderr


def test_interactive(trained, tmp_path):
    lines = (trained / "corpus" / "test.words").read_text().splitlines(keepends=True)[:9]
    own, out, rows = run_both(
        tmp_path, "fairseq-interactive", trained / "corpus" / "data",
        "--path", trained / "post_norm" / "model.pt", "--beam", "3", "--buffer-size", "4",
        "--max-tokens", "400", stdin="".join(lines),
    )  # fmt: skip
    assert len(parse(own.stdout).hypotheses) == 9
    assert_same(parse(out.stdout), parse(own.stdout))
    assert_replaced(rows, WHOLE_ENCODER, SEARCH)


def test_eval_lm(trained, tmp_path):
    own, out, rows = run_both(
        tmp_path, "fairseq-eval-lm", trained / "corpus" / "data_lm",
        "--path", trained / "lm" / "model.pt", "--gen-subset", "test", "--max-tokens", "1000",
        "--tokens-per-sample", "64",
    )  # fmt: skip
    assert losses(out) == pytest.approx(losses(own), abs=1e-3)  # printed with three digits
    assert_replaced(rows, DECODER)
    assert rows[WHOLE_ENCODER]["replaced"] == 0


def test_validate(trained, tmp_path):
    own, out, rows = run_both(
        tmp_path, "fairseq-validate", trained / "corpus" / "data",
        "--path", trained / "bart" / "model.pt", "--max-tokens", "1000", "--task", "translation",
    )  # fmt: skip
    assert losses(out) == pytest.approx(losses(own), abs=1e-3)
    assert_replaced(rows, ENCODER, DECODER)


def test_preprocess(trained, tmp_path):
    for name, flag in (("own", []), ("out", ["--user-dir", eet_patch.fairseq_dir()])):
        run_command(
            "fairseq-preprocess", "-s", "words", "-t", "digits",
            "--trainpref", trained / "corpus" / "test1", "--destdir", tmp_path / name, *flag,
        )  # fmt: skip
    made = sorted(path.name for path in (tmp_path / "own").iterdir() if path.suffix != ".log")
    assert len(made) == 6
    same, different, missing = filecmp.cmpfiles(tmp_path / "own", tmp_path / "out", made, False)
    assert (sorted(same), different, missing) == (made, [], [])


def test_training_is_left_alone(trained, tmp_path):
    """The same weights, bit for bit, and nothing of fairseq replaced."""
    models = []
    for name in ("own", "out"):
        report = tmp_path / "report.json"
        flag = ["--user-dir", eet_patch.fairseq_dir()] if name == "out" else []
        run_command(
            "fairseq-train", trained / "corpus" / "data", "--arch", "transformer",
            "--encoder-layers", "1", "--decoder-layers", "1", "--encoder-embed-dim", "32",
            "--decoder-embed-dim", "32", "--optimizer", "adam", "--lr", "1e-3", "--max-update", "4",
            "--batch-size", "8", "--valid-subset", "test1", "--validate-interval-updates", "2",
            "--max-epoch", "1", "--seed", "3", "--data-buffer-size", "0", "--num-workers", "0",
            "--save-dir", tmp_path / name, *flag, EET_REPORT=str(report),
        )  # fmt: skip
        checkpoint = tmp_path / name / "checkpoint_last.pt"
        models.append(torch.load(checkpoint, weights_only=False)["model"])
        assert report.is_file() == (name == "out")
    written = json.loads(report.read_text())
    assert not written["enabled"] and all(row["replaced"] == 0 for row in written["targets"])
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_the_readmes_own_line(trained, tmp_path):
    """`fairseq-generate ...` of README.md, as it stands, where its files are."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^fairseq-generate .*$", text, re.M)
    (tmp_path / "data-bin").symlink_to(trained / "corpus" / "data")
    (tmp_path / "model.pt").symlink_to(trained / "pre_norm" / "model.pt")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "EET_REPORT": str(tmp_path / "report.json")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), *in_place()]))
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    words = f"{line} --gen-subset test1 --max-tokens 600 --cpu"
    done = subprocess.run(
        ["bash", "-c", words], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((tmp_path / "report.json").read_text())["targets"]
    assert_replaced({row["name"]: row for row in rows}, WHOLE_ENCODER, SEARCH)
