"""Every environment variable that qkern reads: name, meaning, default, in one place."""

from __future__ import annotations

import os
from typing import Final

__all__ = [
    "VARIABLES",
    "cpu_tier",
    "disable_progress",
    "progress_disabled",
    "triton_autotune",
    "triton_interpreted",
]

VARIABLES: Final[dict[str, str]] = {
    "QKERN_CPU_TIER": "force one CPU tier (scalar, avx2, avx512vnni, ...); default: the best the machine has",
    "QKERN_NO_PROGRESS": "1 turns progress bars off; default: on when stderr is a terminal",
    "QKERN_TRITON_AUTOTUNE": "1 times Triton's tiles on each weight's first calls; default: a table of tiles",
    "TRITON_INTERPRET": "1 runs Triton kernels in its interpreter, on the CPU (read by Triton too)",
}


def cpu_tier() -> str | None:
    """Tier named by ``QKERN_CPU_TIER``, or None."""
    return os.environ.get("QKERN_CPU_TIER") or None


def progress_disabled() -> bool:
    """Whether ``QKERN_NO_PROGRESS`` turns bars off."""
    return os.environ.get("QKERN_NO_PROGRESS", "") not in ("", "0")


def disable_progress() -> None:
    """Turn bars off in this process and those it starts."""
    os.environ["QKERN_NO_PROGRESS"] = "1"


def triton_autotune() -> bool:
    """Whether ``QKERN_TRITON_AUTOTUNE`` asks for candidates to be timed."""
    return os.environ.get("QKERN_TRITON_AUTOTUNE", "") not in ("", "0")


def triton_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` asks for Triton's interpreter, in the spellings that Triton takes."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
