"""What fairseq imports for `--user-dir $(python -m eet_patch fairseq-dir)`: from here on the models
of the command run patched.

It also lets fairseq 0.12 run with today's torch and numpy, which its commands need patched or not.
Training is left as it is: fairseq-train gets the second part alone.

Environment:
    EET_REPORT  1: print `eet_patch.report()` to stderr when the command ends; anything else: the
                file that it is written to then, as JSON.

This folder stands alone in its parent, because fairseq puts the parent first on `sys.path`.
"""

import argparse
import atexit
import json
import os
import sys
import types

import numpy
import torch

import eet_patch


def let_fairseq_load() -> None:
    """Undoes what was taken away under fairseq 0.12: from 2.6 on torch refuses the options that
    its checkpoints hold, and from 2.0 on numpy has no `compat.long`, which its LM data sets name.
    """
    torch.serialization.add_safe_globals([argparse.Namespace])
    if not hasattr(numpy, "compat"):
        compat = types.ModuleType("numpy.compat")
        compat.long = int  # type: ignore[attr-defined]
        numpy.compat = compat  # type: ignore[attr-defined]


def is_training() -> bool:
    """Whether the running command is fairseq-train or fairseq-hydra-train, however it was
    started.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    running = {"fairseq_cli.train", "fairseq_cli.hydra_train"}
    return not running.isdisjoint(sys.modules) or getattr(spec, "name", None) in running


def leave_report(where: str) -> None:
    report = eet_patch.report()
    if where == "1":
        print(report, file=sys.stderr)
        return
    with open(where, "w") as file:
        json.dump(report.as_dict(), file, indent=1)


let_fairseq_load()
if not is_training():
    eet_patch.enable()
if os.environ.get("EET_REPORT"):
    atexit.register(leave_report, os.environ["EET_REPORT"])
