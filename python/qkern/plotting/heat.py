"""Heat maps: one value by row and column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from qkern.errors import InputError, UnsupportedError
from qkern.plotting.style import has_matplotlib, new_axes, save

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["check_picture", "plot_heat"]

_KINDS: Final = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, before the work that it shows.

    Raises
    ------
    InputError
        If its name or folder is unfit, or it exists.
    UnsupportedError
        If matplotlib is missing.
    """
    if path.suffix not in _KINDS:
        raise InputError(f"{path} is no picture: its name ends in {', '.join(_KINDS)}")
    if path.exists():
        raise InputError(f"{path} exists: remove it or choose another name")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of the picture does not exist; make it first")
    if not has_matplotlib():
        raise UnsupportedError("pictures need matplotlib: pip install matplotlib, or leave the picture out")


def plot_heat(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path, *, label: str, rows: str
) -> Path:
    """Draw a map for each title, side by side on one logarithmic scale of colours.

    Parameters
    ----------
    values : mapping
        By title, row and column; all positive, what is missing stays white. All maps have the rows of all, in
        the order in which they come.
    path : Path
        The picture; ``.png``, ``.svg`` or ``.pdf``.
    label : str
        What the colours show.
    rows : str
        What the rows are.

    Returns
    -------
    Path
        `path`.
    """
    from matplotlib.colors import LogNorm

    columns = list(dict.fromkeys(c for map_ in values.values() for row in map_.values() for c in row))
    named = list(dict.fromkeys(row for map_ in values.values() for row in map_))
    every = [v for map_ in values.values() for row in map_.values() for v in row.values() if v > 0]
    low = min(every, default=1e-9)
    norm = LogNorm(low, max(*every, low * 10)) if every else None
    figure, first = new_axes(1.2 + len(values) * (0.6 + 0.32 * len(columns)), 1.8 + 0.22 * len(named))
    first.remove()
    drawn = None
    all_axes = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for axes, (title, map_) in zip(all_axes, values.items(), strict=True):
        grid = [[map_.get(row, {}).get(column, float("nan")) for column in columns] for row in named]
        drawn = axes.imshow(grid, norm=norm, cmap="cividis", aspect="auto")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axes.set_yticks(range(len(named)), named, fontsize=7)
    all_axes[0].set_ylabel(rows)
    if drawn is not None:
        figure.colorbar(drawn, ax=list(all_axes), label=label)
    return save(figure, path)
