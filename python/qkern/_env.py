"""Every environment variable that qkern reads: name, meaning, default, in one place."""

from __future__ import annotations

import os
from typing import Final

__all__ = ["VARIABLES", "cpu_tier", "disable_progress", "progress_disabled"]

VARIABLES: Final[dict[str, str]] = {
    "QKERN_CPU_TIER": "force one CPU tier (scalar, avx2, avx512vnni, ...); default: the best the machine has",
    "QKERN_NO_PROGRESS": "1 turns progress bars off; default: on when stderr is a terminal",
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
