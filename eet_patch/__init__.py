"""Runs the Transformer models of transformers and fairseq through fused kernels, without changing a
line of them.

    import eet_patch
    eet_patch.enable()

Importing this imports neither host library and starts no CUDA.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from eet_patch import patching
from eet_patch.patching import FallbackError, PatchWarning
from eet_patch.reporting import Report, TargetReport, make_report
from eet_patch.targets import TARGETS

__version__ = "0.1.0"
__all__ = [
    "FallbackError",
    "PatchWarning",
    "Report",
    "TargetReport",
    "disable",
    "enable",
    "enabled",
    "fairseq_dir",
    "report",
    "reset_report",
]

patching.register_targets(TARGETS)


def enable(
    strict: bool = False,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    keep_padding: bool = False,
) -> None:
    """Replace the layers of the host libraries, now or when they are imported.

    May be called before or after the import of transformers or fairseq and before or after a model
    is built; a second call replaces the options of the first.

    Args:
        strict: raise `FallbackError` where a call would run the original code, and not only count
            it.
        only: names of the targets to replace. Default: all of them.
        exclude: names of targets to leave alone.
        keep_padding: compute the padded positions of an encoder's batch too, as the host does. By
            default they cost nothing, and are zeros.
    Raises:
        ValueError: a name that is no target.
    """
    patching.enable(strict, only, exclude, keep_padding)


def disable() -> None:
    """Put the very methods back that stood in the host's classes. Harmless when nothing is
    replaced.
    """
    patching.disable()


def enabled(
    strict: bool = False,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    keep_padding: bool = False,
) -> AbstractContextManager[None]:
    """`enable()` for a `with` block, for the whole process; afterwards what was in force before is
    in force again.

    Args, Raises: as `enable`.
    """
    return patching.enabled(strict, only, exclude, keep_padding)


def report() -> Report:
    """Which targets are replaced, how often, how often not and why, and the memory held; `print()`
    it.
    """
    return make_report()


def reset_report() -> None:
    """Set the report's counters to zero."""
    patching.reset_counters()


def fairseq_dir() -> str:
    """The folder that fairseq's commands take as `--user-dir`, and its
    `from_pretrained(..., user_dir=...)`: it enables the patch, and makes checkpoints of fairseq
    load with torch 2.6 and later.
    """
    return str(Path(__file__).parent / "fairseq_user_dir" / "eet_fairseq_plugin")
