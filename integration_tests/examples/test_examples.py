"""The examples run as they are, and say that their answers are right."""

import os
import subprocess
import sys

import pytest
from helpers import REPOSITORY, in_place

EXAMPLES = REPOSITORY / "examples"


def run_example(name, *arguments, timeout=300):
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
    paths = [environment.get("PYTHONPATH"), *in_place()]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_custom_layer():
    """Checked against plain PyTorch, eager and as one graph of torch.compile."""
    assert len((EXAMPLES / "custom_layer.py").read_text().splitlines()) < 60
    said = run_example("custom_layer.py")
    assert "eager" in said and "compiled" in said


def test_bert():
    assert "replaced, fell back: never" in run_example("bert_transformers_example.py")


@pytest.fixture
def serving():
    pytest.importorskip("litserve", reason="the serve extra is not installed")
    pytest.importorskip("prometheus_client", reason="the serve extra is not installed")


@pytest.mark.slow
def test_serving_loses_nothing(serving):
    """Patched and unpatched give the same answers; every request gets one."""
    said = run_example("serve_load_test.py", "--requests", "120", "--rounds", "1")
    assert said.count("lost 0") == 2, said


@pytest.mark.slow
def test_serving_survives_a_worker(serving):
    said = run_example("serve_load_test.py", "--requests", "300", "--kill-worker")
    assert "killing worker" in said and "lost 0" in said, said


@pytest.mark.slow
def test_serving_refuses_what_its_queue_does_not_hold(serving):
    said = run_example("serve_load_test.py", "--requests", "150", "--overload")
    assert "'429'" in said and "lost 0" in said, said
