"""The one progress seam: bars on a terminal, log lines elsewhere.

Library code calls `track` or `task` and never asks where the output goes. A bar is drawn by rich when
stderr is a terminal and ``QKERN_NO_PROGRESS`` is not set; otherwise the same facts are logged at INFO, at
most once in a few seconds. Bars that are open at the same time share one display.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sized
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from qkern import _env

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import Console
    from rich.progress import Progress

__all__ = ["Task", "console", "enabled", "task", "track"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOG_INTERVAL_SECONDS: Final = 5.0


def enabled() -> bool:
    """Whether bars are drawn: stderr is a terminal and ``QKERN_NO_PROGRESS`` is not set."""
    return not _env.progress_disabled() and sys.stderr.isatty()


@cache
def console() -> Console:
    """Rich console on stderr that bars and the command line's log lines share."""
    from rich.console import Console

    return Console(stderr=True)


class Task(ABC):
    """Progress of one activity; `task` makes it.

    Parameters
    ----------
    description : str
        What is being done, for example ``"Quantizing"``.
    total : int or None
        Steps in all, if known.
    unit : str
        Name of a step, singular.
    """

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.done = 0
        self.note = ""
        self._started = time.monotonic()

    def advance(self, steps: int = 1, *, note: str | None = None) -> None:
        """Count `steps` as done; `note` replaces the text shown beside the count."""
        self.done += steps
        if note is not None:
            self.note = note
        self._show()

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the mean time of a step so far; None before the first step or without a total."""
        if self.total is None or self.done == 0:
            return None
        return (time.monotonic() - self._started) / self.done * max(self.total - self.done, 0)

    @abstractmethod
    def _show(self) -> None:
        """Bring what the user sees up to date."""

    @abstractmethod
    def _close(self) -> None:
        """Take it off the screen, or say the last of it."""


class _LogTask(Task):
    def __init__(self, description: str, total: int | None, unit: str) -> None:
        super().__init__(description, total, unit)
        self._logged_at = self._started
        self._logged_done = 0

    def _show(self) -> None:
        if time.monotonic() - self._logged_at >= LOG_INTERVAL_SECONDS:
            self._log()

    def _close(self) -> None:
        if self.done != self._logged_done:
            self._log()

    def _log(self) -> None:
        self._logged_at, self._logged_done = time.monotonic(), self.done
        of = "" if self.total is None else f"/{self.total}"
        left = self.seconds_left
        tail = f", {_clock(left)} left" if left else f", took {_clock(self._logged_at - self._started)}"
        note = f" ({self.note})" if self.note else ""
        logger.info("%s: %s %d%s%s%s", self.description, self.unit, self.done, of, note, tail)


class _BarTask(Task):
    def __init__(self, display: _Display, description: str, total: int | None, unit: str) -> None:
        super().__init__(description, total, unit)
        self._display = display
        self._handle = display.progress.add_task(description, total=total, unit=unit, note="")

    def _show(self) -> None:
        self._display.progress.update(self._handle, completed=self.done, note=self.note)

    def _close(self) -> None:
        self._display.progress.remove_task(self._handle)


class _Display:
    """The rich display that all open bars share; it lives from the first bar to the last."""

    lock = threading.Lock()
    current: _Display | None = None

    def __init__(self) -> None:
        self.users = 0
        self.progress = _make_progress()

    @classmethod
    def enter(cls) -> _Display:
        with cls.lock:
            if cls.current is None:
                cls.current = cls()
                cls.current.progress.start()
            cls.current.users += 1
            return cls.current

    @classmethod
    def leave(cls, display: _Display) -> None:
        with cls.lock:
            display.users -= 1
            if display.users == 0:
                display.progress.stop()
                cls.current = None


def _make_progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[note]}"),
    )
    return Progress(*columns, console=console(), transient=True)


@contextmanager
def task(description: str, *, total: int | None = None, unit: str = "step") -> Iterator[Task]:
    """Show progress of the enclosed block, which calls ``advance`` on what it is given.

    Parameters
    ----------
    description : str
        What is being done.
    total : int, optional
        Steps in all; without it no time left is shown.
    unit : str
        Name of a step, singular.

    Yields
    ------
    Task
        Its ``advance(steps=1, note=...)`` counts steps.
    """
    if not enabled():
        quiet = _LogTask(description, total, unit)
        try:
            yield quiet
        finally:
            quiet._close()
        return
    display = _Display.enter()
    bar = _BarTask(display, description, total, unit)
    try:
        yield bar
    finally:
        bar._close()
        _Display.leave(display)


def track(
    iterable: Iterable[T], description: str, *, total: int | None = None, unit: str = "step"
) -> Iterator[T]:
    """Yield the items of `iterable`, counting each as a step once it has been worked on.

    Parameters
    ----------
    iterable : iterable
        What to walk through.
    description : str
        What is being done.
    total : int, optional
        Items in all; default: ``len(iterable)`` where there is one.
    unit : str
        Name of a step, singular.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with task(description, total=total, unit=unit) as progress:
        for item in iterable:
            yield item
            progress.advance()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
