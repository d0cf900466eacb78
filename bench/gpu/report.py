"""What a child process of bench_gpu.py says: where it is, what it measured, what it could not."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import statistics
from typing import TYPE_CHECKING, Any, TextIO

from gpu import timer

if TYPE_CHECKING:
    from collections.abc import Iterator

Record = dict[str, Any]


class OtherScheme(Exception):
    """A library does not have this scheme, dtype or shape: no news."""


class Broken(Exception):
    """The device answers no more: only a new process can go on."""


class Report:
    """Writes a JSON object a line: ``{"at": name}``, ``{"record": {...}}``, ``{"done": i}``."""

    def __init__(self, stream: TextIO, shared: Record) -> None:
        self.stream, self.shared = stream, shared
        self.task: Record = {}
        self.skipped: set[str] = set()

    def say(self, **message: Any) -> None:
        """Write a line that the parent reads at once."""
        self.stream.write(json.dumps(message) + "\n")
        self.stream.flush()

    def begin(self, task: Record, skipped: set[str]) -> None:
        """Start a task; contestants that are `skipped` brought down an earlier process in it."""
        self.task, self.skipped = task, skipped

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Prepare a contestant: whatever it raises is a line in the report.

        Raises
        ------
        Broken
            If the device does not survive it.
        """
        self.say(at=name)
        try:
            yield
            timer.synchronize()
        except OtherScheme:
            return
        except Exception as problem:
            text = " ".join(str(problem).split())[:300]
            reason = f"failed: {type(problem).__name__}: {text}"
            if isinstance(problem, ImportError):
                reason = f"not installed: {text}"
            self.absent(name, reason)
            try:
                timer.synchronize()
            except Exception as lost:
                raise Broken(name) from lost

    def record(self, name: str, **content: Any) -> None:
        """Write what is known of a contestant in this task."""
        case = {key: value for key, value in self.task.items() if key not in ("op", "scheme", "shape")}
        named = {key: self.task[key] for key in ("op", "scheme", "shape") if key in self.task}
        self.say(
            record={**self.shared, **named, "module": "gpu", "contestant": name, "case": case, **content}
        )

    def absent(self, name: str, reason: str) -> None:
        """Write why there is no time of a contestant."""
        self.record(name, version="", absent=reason)

    def times(self, name: str, times: list[float], **content: Any) -> None:
        """Write the times of a contestant."""
        shared = {
            "bytes": 0,
            "operations": 0,
            "error": 0.0,
            "facts": {},
            "version": version(name),
        }
        measured = {
            "seconds": statistics.median(times),
            "spread": round(timer.spread(times), 4),
            "rounds": [float(f"{seconds:.5g}") for seconds in times],
        }
        self.record(name, **{**shared, **measured, **content})

    def race(self, entries: dict[str, tuple[Any, int]], facts: dict[str, Record]) -> None:
        """Time calls beside a copy from device to device; `facts` goes with each one's record."""
        if not entries:
            return
        self.say(at="copy")
        replay, nbytes = timer.copy()
        warm = {"copy": (replay, 1)}
        for name, (call, count) in entries.items():
            with self.attempt(name):
                call()
                timer.synchronize()
                warm[name] = call, count
        self.say(at="all together")
        times = timer.race(warm)
        copied = times.pop("copy")
        self.times("copy", copied, module="roofline", bytes=nbytes)
        for name, seconds in times.items():
            content = dict(facts.get(name, {}))
            if content.get("bytes"):
                pairs = zip(seconds, copied, strict=True)
                share = statistics.median(content["bytes"] / ours * its / nbytes for ours, its in pairs)
                content["of_copy"] = round(share, 4)
            self.times(name, seconds, **content)


def version(name: str) -> str:
    """Package of a contestant and its version."""
    package = {"Humming": "humming-kernels"}.get(name, name.split()[0])
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"{package} {importlib.metadata.version(package)}"
    return package
