"""`python -m eet_patch info`, `run script.py args...`, `run -m module args...`, `bench`,
`fairseq-dir`.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import platform
import runpy
import sys
from collections.abc import Sequence

import eet_patch
from eet_patch import bench


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eet_patch", description=eet_patch.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="versions, devices, what the extension holds, which targets apply"
    )
    run = commands.add_parser(
        "run",
        help="run an unchanged script or module, patched",
        usage="%(prog)s [--report] [--strict] (script.py | -m module) [args ...]",
    )
    run.add_argument("--report", action="store_true", help="print the report at exit")
    run.add_argument("--strict", action="store_true", help="raise where the original would run")
    run.add_argument("-m", dest="module", action="store_true", help="what follows names a module")
    run.add_argument("target", help="the script, or the module after -m")
    run.add_argument("args", nargs=argparse.REMAINDER, help="its arguments, passed on as they are")
    commands.add_parser("fairseq-dir", help="the folder that fairseq's commands take as --user-dir")
    timing = commands.add_parser(
        "bench", help="time your model unpatched and patched, check its answers, draw a chart"
    )
    bench.add_arguments(timing)
    options = parser.parse_args(argv)
    if options.command == "bench":
        return bench.run(options)
    if options.command == "info":
        print(info())
        return 0
    if options.command == "fairseq-dir":
        print(eet_patch.fairseq_dir())
        return 0
    return run_script(options)


def info() -> str:
    """What a bug report needs: versions, devices, the build, and each target's status."""
    import torch

    lines = [
        f"eet_patch {eet_patch.__version__}, Python {platform.python_version()}",
        platform.platform(),
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"cuda:{index} {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    else:
        lines.append("no CUDA device")
    for host in ("transformers", "fairseq"):
        try:
            # A folder of that name on the path imports as an empty package, without a version.
            version = importlib.import_module(host).__version__
            lines.append(f"{host} {version}")
        except (ImportError, AttributeError) as error:
            lines.append(f"{host} is not there ({error})")
    with eet_patch.enabled():
        for target in eet_patch.report().targets:
            try:
                importlib.import_module(target.module)
            except ImportError:
                pass  # the report tells: it goes on waiting
        lines.append(str(eet_patch.report()))
    return "\n".join(lines)


def run_script(options: argparse.Namespace) -> int:
    """Runs the script as `python script.py args` would, with the patch enabled before its first
    line.
    """
    eet_patch.enable(strict=options.strict)
    if options.report:
        atexit.register(lambda: print(eet_patch.report(), file=sys.stderr))
    sys.argv = [options.target, *options.args]
    if options.module:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(options.target, run_name="__main__", alter_sys=True)
    else:
        if not os.path.exists(options.target):
            print(f"python -m eet_patch run: there is no file {options.target!r}", file=sys.stderr)
            return 2
        sys.path.insert(0, os.path.dirname(os.path.abspath(options.target)))
        runpy.run_path(options.target, run_name="__main__")
    return 0
