"""What `report()` returns: which targets are replaced, how often, and why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from eet_patch import patching
from eet_patch.ops._extension import EXTENSION, EXTENSION_ERROR

# Name of a kind of memory that we hold beyond the model and its KV cache -> how many bytes it is
# now.
MEMORY: dict[str, Callable[[], int]] = {}


@dataclass(frozen=True)
class TargetReport:
    """One row of the report.

    Attributes:
        name, module, attribute, requires: as in the table of targets.
        host_version: version of the host library found, or None before its import.
        status: "applied", "waiting for the import of its module", or why it is not applied.
        replaced: calls that ran our code.
        fallbacks: reason -> calls that ran the original for it.
    """

    name: str
    module: str
    attribute: str
    requires: str
    host_version: str | None
    status: str
    replaced: int
    fallbacks: dict[str, int]


@dataclass(frozen=True)
class Report:
    """State of the patch, printable by `print(report())`, and as data by `as_dict()` or by the
    attributes.
    """

    enabled: bool
    extension: dict[str, Any]
    targets: tuple[TargetReport, ...]
    memory: dict[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> TargetReport:
        for target in self.targets:
            if target.name == name:
                return target
        raise KeyError(f"no target {name!r}; there are {', '.join(t.name for t in self.targets)}")

    def as_dict(self) -> dict[str, Any]:
        return {
            "enabled": self.enabled,
            "extension": dict(self.extension),
            "targets": [vars(t) | {"fallbacks": dict(t.fallbacks)} for t in self.targets],
            "memory": dict(self.memory),
        }

    def __str__(self) -> str:
        lines = [f"eet_patch is {'enabled' if self.enabled else 'disabled'}"]
        if self.extension.get("error"):
            lines.append(f"  extension not loaded: {self.extension['error']}")
        else:
            cuda = self.extension["cuda_archs"] if self.extension["cuda"] else "no"
            lines.append(f"  extension: CPU {self.extension['cpu_capability']}, CUDA {cuda}")
        shown = [t for t in self.targets if t.status != "waiting for the import of its module"]
        for target in shown:
            version = f" ({target.host_version})" if target.host_version else ""
            calls = f", {target.replaced} calls replaced" if target.replaced else ""
            lines.append(f"  {target.name}{version}: {target.status}{calls}")
            for reason, count in sorted(target.fallbacks.items(), key=lambda item: -item[1]):
                lines.append(f"    {count} calls ran the original: {reason}")
        waiting = len(self.targets) - len(shown)
        if waiting:
            lines.append(f"  {waiting} targets wait for the import of their module")
        for name, size in self.memory.items():
            lines.append(f"  memory, {name}: {size / 1e6:.1f} MB")
        return "\n".join(lines)


def make_report() -> Report:
    patching.retry_half_imported()
    if EXTENSION is None:
        built: dict[str, Any] = {"loaded": False, "error": EXTENSION_ERROR}
    else:
        built = {"loaded": True, "error": None, **EXTENSION.build_info()}
    rows = []
    for patch in patching.patches():
        target = patch.target
        rows.append(
            TargetReport(
                target.name,
                target.module,
                target.attribute,
                target.requires,
                patch.host_version,
                patch.status,
                patch.calls_replaced(),
                dict(patch.fallbacks),
            )
        )
    memory = {name: size() for name, size in MEMORY.items()}
    return Report(patching.is_enabled(), built, tuple(rows), memory)
