"""Times as a user waits for them: host clock, the device synchronised."""

from __future__ import annotations

import contextlib
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch


def clock(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call as its caller waits for it."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) * 1e3


def device_name(device: str) -> str:
    """The device as its driver names it; a CPU with its number of threads."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = found[1] if found else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
