"""What measurements say of the machine: its name, memory that is free, memory that a process has used."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Final

import torch

from qkern.ops._native import core

__all__ = ["available_bytes", "machine", "peak_bytes"]

_CGROUP: Final = Path("/sys/fs/cgroup")


def machine() -> str:
    """Processor, threads and torch in one line."""
    return (
        f"{platform.machine()}, CPU tier {core().active_tier()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )


def peak_bytes() -> int:
    """Most memory that this process ever held at once."""
    # getrusage would count what the parent held when it started this process.
    if (peak := _of_table(Path("/proc/self/status"), "VmHWM")) is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def available_bytes() -> int:
    """Memory that a process may still take, by the system and by the container's limit."""
    free = _of_table(Path("/proc/meminfo"), "MemAvailable")
    if free is None:  # no Linux: what there is at all
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return free
    # What the container keeps of files goes when memory is needed.
    files = [_of_table(_CGROUP / "memory.stat", name) or 0 for name in ("active_file", "inactive_file")]
    return max(0, min(free, limit - used + sum(files)))


def _of_table(file: Path, name: str) -> int | None:
    """Bytes that a line such as ``VmHWM:  1234 kB`` or ``active_file 1234`` says."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    rows = (line.split() for line in lines)
    found = next((row for row in rows if row and row[0].rstrip(":") == name), None)
    return None if found is None else int(found[1]) << (10 if found[-1] == "kB" else 0)


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None
