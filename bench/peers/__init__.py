"""Other libraries' kernels as contestants of the benchmarks: a module each, in a process each.

Beside what contestant.py asks for, a module that multiplies has ``variants(scheme) -> list[str]``: how it
can hold weights comparable with `scheme`. Nothing heavy is imported at the top, because the benchmark
imports the modules too, in an environment that may not have the packages. A case is
``{"variant", "scheme", "N", "K", "M", "rotate", "threads"}``; a result is checked at some rows of the weight,
against a float64 product with the weight as decoded outside the kernel that is measured.
"""

from __future__ import annotations

import re


def grid(scheme: str) -> tuple[int, int | None, bool] | None:
    """``"w4g128z"`` -> bits, group size (None: per channel), zero points; None for a codebook."""
    match = re.fullmatch(r"w([2348])(?:g(\d+))?(z?)", scheme)
    return match and (int(match[1]), int(match[2]) if match[2] else None, bool(match[3]))


def information(scheme: str, N: int, K: int) -> float:
    """Bytes that a weight has to hold, a 16-bit scale a group: what padding and wider scales add is loss."""
    match = re.match(r"(?:w(\d)|[nf][fp]4)(?:g(\d+))?", scheme)
    assert match is not None
    return N * K * (int(match[1] or 4) + 16 / int(match[2] or K)) / 8
