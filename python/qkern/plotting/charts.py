"""Points with names, and groups of bars."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from qkern.plotting.style import MARKERS, new_axes, save

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["plot_bars", "plot_points"]


def plot_points(
    groups: Mapping[str, Sequence[tuple[str, float, float]]],
    path: Path,
    *,
    x: str,
    y: str,
    is_log: bool = False,
) -> Path:
    """Draw named points; each group has its marker and its line in the legend.

    Parameters
    ----------
    groups : mapping
        From the group's name to name, x and y of each point.
    path : Path
        The picture; ``.png``, ``.svg`` or ``.pdf``.
    x, y : str
        What the axes show.
    is_log : bool
        Logarithmic y.

    Returns
    -------
    Path
        `path`.
    """
    figure, axes = new_axes()
    for (group, points), marker in zip(groups.items(), cycle(MARKERS), strict=False):
        axes.plot([point[1] for point in points], [point[2] for point in points], marker, label=group)
        for name, at, value in points:
            axes.annotate(name, (at, value), xytext=(4, 4), textcoords="offset points", fontsize=7)
    if is_log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(x=0.15)
    axes.legend()
    return save(figure, path)


def plot_bars(groups: Mapping[str, Mapping[str, float]], path: Path, *, x: str, y: str) -> Path:
    """Draw bars side by side, one colour a series; a series that a group lacks leaves a gap.

    Parameters
    ----------
    groups : mapping
        From the group's name to the height of each series.
    path : Path
        The picture; ``.png``, ``.svg`` or ``.pdf``.
    x, y : str
        What groups and heights are; `x` may be empty.

    Returns
    -------
    Path
        `path`.
    """
    series = list(dict.fromkeys(name for heights in groups.values() for name in heights))
    figure, axes = new_axes()
    width = 0.8 / max(len(series), 1)
    for number, name in enumerate(series):
        drawn = [(at, heights[name]) for at, heights in enumerate(groups.values()) if name in heights]
        places = [at + (number - (len(series) - 1) / 2) * width for at, _ in drawn]
        axes.bar(places, [height for _, height in drawn], width, label=name)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=7)
    return save(figure, path)
