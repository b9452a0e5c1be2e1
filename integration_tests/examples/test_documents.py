"""Every code block of README.md, README_zh.md, CONTRIBUTING.md and docs/ is run as it stands.

Python blocks run in order, those of a file in one interpreter. Commands run in a folder that has
what they name: a script, a package, a model. What installs, builds or tests everything is run by CI
itself, and here only asked whether it would.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, in_place, tiny_bert

README = REPOSITORY / "README.md"
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "README_zh.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def blocks(path, language):
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [code for kind, code in found if kind == language]


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def environment():
    found = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
    found["PYTHONPATH"] = os.pathsep.join(filter(None, [found.get("PYTHONPATH"), *in_place()]))
    found["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), found["PATH"]])
    return found


def run(command, cwd):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=cwd, env=environment()
    )
    said = done.stdout[-2000:] + done.stderr[-3000:]
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{said}"
    return done.stdout


def test_there_is_nothing_but_what_is_run():
    for path in DOCUMENTS:
        kinds = {kind for kind, _ in BLOCK.findall(path.read_text(encoding="utf-8"))}
        assert kinds <= {"python", "bash"}, f"{name_of(path)} has blocks of {kinds}"
    assert len(blocks(README, "python")) >= 3 and len(blocks(README, "bash")) >= 4


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if blocks(p, "python")], ids=name_of)
def test_python_blocks(path, tmp_path):
    """A block may build on those above it."""
    parts = [f"print('# block {i}', flush=True)\n{c}" for i, c in enumerate(blocks(path, "python"))]
    (tmp_path / "blocks.py").write_text("\n".join(parts), encoding="utf-8")
    run([sys.executable, "blocks.py"], tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands of the documents name."""
    made = tmp_path_factory.mktemp("commands")
    (made / "your_script.py").write_text("import sys\nprint(sys.argv[1:])\n")
    (made / "package").mkdir()
    (made / "package" / "__init__.py").touch()
    (made / "package" / "module.py").write_text("import sys\nprint(sys.argv[1:])\n")
    tiny_bert().save_pretrained(made / "your" / "model")
    return made


def commands(path):
    """Its shell lines, without comments."""
    lines = "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [stripped for line in lines if (stripped := re.sub(r"(^|\s)#.*", "", line).strip())]


def project_extras():
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"]


def check_install(words):
    """The project's own extras exist; packages are named in what our environments install."""
    listed = " ".join(p.read_text() for p in REPOSITORY.glob("requirements*.txt"))
    listed += (REPOSITORY / "Makefile").read_text() + (REPOSITORY / "pyproject.toml").read_text()
    for word in words:
        if word.startswith("-"):
            continue
        match = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word)
        if match:
            assert set((match[1] or "").split(",")) - {""} <= project_extras().keys(), word
        else:
            assert word in listed, f"{word} is installed by none of our environments"


def check_command(line, folder):
    words = shlex.split(line)
    match words:
        case ["pip", "install", *rest]:
            check_install(rest)
        case ["make", *targets]:
            assert run(["make", "-n", *targets], REPOSITORY)
        case ["python", "-m", "eet_patch", *_] | ["eet-patch", *_]:
            if "bench" in words:
                line += " --batch 1 --length 5 --seconds 0.1"
            assert run(["bash", "-c", line], folder)
        case ["python", script, *_] if (REPOSITORY / script).exists():
            run([sys.executable, str(REPOSITORY / script), "--help"], folder)
        case ["bash", script, *_]:
            run(["bash", "-n", str(REPOSITORY / script)], folder)
        case [program, *_] if program.startswith("fairseq-"):
            pass  # integration_tests/fairseq/test_commands.py runs the README's own line
        case [".venv/bin/python", "setup.py", *_]:
            pass  # how the extension under test was built
        case ["docker", *_]:
            assert (REPOSITORY / "Dockerfile").exists()
        case _:
            raise AssertionError(f"no rule runs {line!r}")


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if blocks(p, "bash")], ids=name_of)
def test_commands(path, folder):
    for line in commands(path):
        if "examples/serve" in line:
            pytest.importorskip("litserve", reason="the serve extra is not installed")
        check_command(line, folder)


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{name_of(path)} links to {target}"
