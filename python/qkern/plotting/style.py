"""What all pictures share: size, colours, markers, and how they are written."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["COLOURS", "MARKERS", "has_matplotlib", "new_axes", "save"]

COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart."""
MARKERS: Final = "os^Dvp*X"
_DPI: Final = 150


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def new_axes(width: float = 6.0, height: float = 4.0) -> tuple[Any, Any]:
    """Empty figure of that many inches, and its axes; no window and no global state is touched."""
    from cycler import cycler
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(cycler(color=COLOURS))
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    """Write a picture of the kind that the path ends in; it appears when it is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, dpi=_DPI, format=path.suffix.removeprefix("."))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
