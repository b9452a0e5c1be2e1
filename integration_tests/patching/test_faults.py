"""Faults: memory that runs out, a build without its tools, settings that nobody knows."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import REPOSITORY, tiny_gpt2, token_ids
from transformers import DynamicCache

import eet_patch
from eet_patch.ops import blocks

NAME = "gpt2_block"


@pytest.mark.parametrize("function", ["attention_block", "ffn"])
def test_out_of_memory_runs_the_original_once(monkeypatch, device, function):
    """The failing call leaves the cache as it was, so that the original's tokens stay right."""
    model, ids = tiny_gpt2(device), token_ids(2, 5, device)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    own = model.generate(ids, past_key_values=DynamicCache(), **settings)
    kernel, calls = getattr(blocks, function), []

    def runs_out(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 5):
            raise torch.OutOfMemoryError("made up")
        return kernel(*args, **kwargs)

    monkeypatch.setattr(blocks, function, runs_out)
    with eet_patch.enabled(exclude="gpt2_sample"):
        out = model.generate(ids, past_key_values=DynamicCache(), **settings)
    assert torch.equal(out, own)
    row = eet_patch.report()[NAME]
    assert row.fallbacks == {"out of memory": 2} and row.replaced == 10


def test_out_of_memory_after_the_hosts_update_is_the_users(monkeypatch, device):
    """A static cache has taken the tokens: running the original would write them twice."""
    model, ids = tiny_gpt2(device), token_ids(2, 5, device)

    def runs_out(*args, **kwargs):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(blocks, "ffn", runs_out)
    with eet_patch.enabled(), pytest.raises(torch.OutOfMemoryError, match="made up"):
        model.generate(
            ids, max_new_tokens=2, do_sample=False, pad_token_id=0, cache_implementation="static"
        )


def build(tmp_path, **environment):
    """Runs setup.py's build of the extension and returns the finished process."""
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "EET_CUDA", "EET_CUDA_ARCHS")}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-temp",
        str(tmp_path / "temp"),
    ]
    command += ["--build-lib", str(tmp_path / "lib")]
    return subprocess.run(
        command,
        cwd=str(REPOSITORY),
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_missing_compiler_says_what_to_install(tmp_path):
    pytest.importorskip("pybind11")
    done = build(tmp_path, PATH=str(tmp_path))
    assert done.returncode != 0 and "no C++ compiler found. Install one" in done.stderr


def test_a_missing_nvcc_says_what_to_set(tmp_path):
    pytest.importorskip("pybind11")
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    if os.path.exists("/usr/local/cuda/bin/nvcc"):
        pytest.skip("there is an nvcc at its usual place")
    done = build(tmp_path, PATH=str(tmp_path), EET_CUDA="1")
    assert done.returncode != 0 and "no nvcc was found. Install the CUDA toolkit" in done.stderr
