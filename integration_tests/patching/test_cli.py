"""The command line: `info`, `run script.py`, `run -m module`, `--report`."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from helpers import REPOSITORY, in_place, tiny_bert, tiny_gpt2

import eet_patch
from eet_patch.cli import main

SCRIPT = """
import sys
import torch
assert __name__ == "__main__" and sys.argv[1:] == ["--report", "-m", "x"], sys.argv
assert "transformers" not in sys.modules
from transformers import BertConfig, BertModel
import neighbour
model = BertModel(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2,
                             num_attention_heads=2, intermediate_size=16)).eval()
with torch.no_grad():
    model(torch.arange(6)[None])
print("said", neighbour.VALUE, sys.argv[0].endswith({name!r}))
if {fail}:
    raise SystemExit(7)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 42\n")
    for name, fail in (("script.py", False), ("failing.py", True)):
        (tmp_path / name).write_text(textwrap.dedent(SCRIPT.format(name=name, fail=fail)))
    return tmp_path


def command(*args, cwd):
    env = dict(os.environ, OMP_NUM_THREADS="2")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), *in_place()]))
    return subprocess.run(
        [sys.executable, "-m", "eet_patch", *args],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=str(cwd),
        env=env,
    )


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"eet_patch {eet_patch.__version__}" in text
    assert f"torch {torch.__version__}" in text
    assert f"transformers {transformers.__version__}" in text
    assert "extension: CPU" in text
    for target in eet_patch.TARGETS:
        if target.host == "transformers":
            assert f"{target.name} ({transformers.__version__}): applied" in text
    assert not eet_patch.report().enabled


def test_run_a_script(folder):
    done = command("run", "--report", "script.py", "--report", "-m", "x", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "said 42 True\n"
    assert f"bert_model ({transformers.__version__}): applied, 1 calls replaced" in done.stderr


def test_run_a_script_from_elsewhere_without_report(folder):
    done = command(
        "run",
        str(folder / "script.py"),
        "--report",
        "-m",
        "x",
        cwd=REPOSITORY / "integration_tests",
    )
    assert (done.returncode, done.stdout) == (0, "said 42 True\n")
    assert "eet_patch is" not in done.stderr


def test_run_a_module_keeps_its_exit_code(folder):
    done = command("run", "--report", "-m", "failing", "--report", "-m", "x", cwd=folder)
    assert done.returncode == 7, done.stderr
    assert done.stdout == "said 42 True\n"
    assert "1 calls replaced" in done.stderr


def test_run_strict(tmp_path, monkeypatch):
    """In this process: --strict reaches enable()."""
    script = tmp_path / "strict.py"
    script.write_text(
        "import torch\n"
        "from helpers import tiny_bert, token_ids\n"
        "tiny_bert()(token_ids(1, 4))\n"  # outside no_grad
    )
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(eet_patch.FallbackError, match="gradients are needed"):
        main(["run", "--strict", str(script)])
    with pytest.warns(eet_patch.PatchWarning):
        assert main(["run", str(script)]) == 0


def test_a_missing_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    assert main(["run", str(tmp_path / "gone.py")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["run"], ["walk"], ["run", "-m"]])
def test_wrong_usage(args, capsys):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_bench(tmp_path, monkeypatch, capsys, device, kind):
    """Checks the answers, times both, writes the chart as text and picture."""
    monkeypatch.chdir(tmp_path)
    model = tiny_bert() if kind == "bert" else tiny_gpt2()
    model.save_pretrained(tmp_path / "model")
    options = ["--batch", "2", "--length", "7", "--new-tokens", "5", "--seconds", "0.1"]
    options += ["--dtype", "float32", "--device", device.type]
    assert main(["bench", "--model", str(tmp_path / "model"), *options]) == 0
    said = capsys.readouterr().out
    assert "agree" in said and "model, 2 x 7" + (" + 5" if kind == "gpt2" else "") in said
    assert (tmp_path / "eet_patch_bench.txt").read_text() in said
    assert (tmp_path / "eet_patch_bench.png").read_bytes().startswith(b"\x89PNG")
    assert not eet_patch.report().enabled


def test_bench_does_not_count_what_was_not_replaced(tmp_path, monkeypatch, capsys):
    """A model that runs the original is no result, and the reason is said."""
    monkeypatch.chdir(tmp_path)
    model = tiny_bert(hidden_act="gelu_10")
    model.save_pretrained(tmp_path / "model")
    options = ["--batch", "1", "--length", "5", "--seconds", "0.1", "--device", "cpu"]
    assert main(["bench", "--model", str(tmp_path / "model"), *options]) == 1
    said = capsys.readouterr().out
    assert "DO NOT COUNT" in said and "no kernel for the activation" in said
