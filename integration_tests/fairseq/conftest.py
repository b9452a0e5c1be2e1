"""Fixtures of the tests against fairseq: its commands as they are, and models that are trained once
and kept.

They run in an environment of their own (`make test-fairseq`); without fairseq nothing here is
collected.
"""

import argparse
import importlib.metadata
import logging
import os
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

try:
    importlib.metadata.version("ve-fairseq")
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]
else:
    # What the plug-in does for fairseq's commands, for those that run in this process unpatched.
    torch.serialization.add_safe_globals([argparse.Namespace])
    if not hasattr(numpy, "compat"):
        numpy.compat = types.SimpleNamespace(long=int)
    logging.getLogger("fairseq").setLevel(logging.ERROR)
    logging.getLogger("fairseq_cli").setLevel(logging.ERROR)


def pytest_configure(config):
    """fairseq speaks to an older hydra, which says so in every test."""
    for module in ("hydra", "torch.utils.data", "torch.nn.functional"):
        config.addinivalue_line("filterwarnings", f"ignore::UserWarning:{module}")
    config.addinivalue_line("filterwarnings", "ignore:\\s*(In )?'config':UserWarning")


@pytest.fixture(scope="session")
def trained():
    """The folder of the trained models and their data; two minutes if nobody has trained them
    yet.
    """
    from train_tiny_fairseq import MODELS, tiny_fairseq_path

    return tiny_fairseq_path(*MODELS)


@pytest.fixture(autouse=True)
def one_thread():
    """At these sizes threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("EET_TEST_THREADS", "1")))
    yield
    torch.set_num_threads(before)
