"""What a verification found: one entry a check, each with the names of what is wrong."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CHECKS", "Check", "Findings", "Verification"]

CHECKS: Final = {
    "files": "shards and index are whole and agree",
    "config": "the configuration is read, and fits which tensors are there",
    "tensors": "every tensor is there in the right dtype and shape, and none is left over",
    "values": "numbers are finite, scales not zero, zero points and group indices as configured or noted",
    "weights": "qkern.load computes with the weights that an independent reader finds",
    "generation": "the loaded model gives finite logits, token by token",
    "runtime": "the runtime has kernels for every layer, and what it fuses is alike",
    "original": "names, shapes and unquantized tensors are those of the original",
    "error": "every matrix is as far from the original's as its grid explains",
    "kl": "KL(original || model) is within its limit",
}
"""The checks in the order of the report, and what each of them says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check.

    Parameters
    ----------
    name : str
        A key of `CHECKS`.
    count : int
        How many tensors, layers, tokens or positions were looked at.
    problems : tuple of str
        What is wrong, each beginning with the name of the file, tensor or layer.
    notes : tuple of str
        What is not wrong, but not what one would expect either.
    skipped : str or None
        Why the check was not run; None if it was.
    value : float or None
        What was measured, for ``kl`` the mean in nats.
    """

    name: str
    count: int = 0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: str | None = None
    value: float | None = None

    @property
    def status(self) -> str:
        """``"passed"``, ``"failed"`` or ``"skipped"``."""
        if self.problems:
            return "failed"
        return "passed" if self.skipped is None else "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Result of `verify`.

    Parameters
    ----------
    path : str
        What was verified.
    format : str or None
        Its format; None if that could not be told.
    runtime : str
        Whose rules were looked at.
    against : str or None
        The original that it was compared with.
    checks : tuple of Check
        In the order of `CHECKS`.
    errors : mapping of str to float
        Of every matrix that was compared with the original the relative error, ``|W' - W| / |W|``.
    """

    path: str
    format: str | None
    runtime: str
    against: str | None
    checks: tuple[Check, ...]
    errors: dict[str, float] = field(repr=False)

    @property
    def is_sound(self) -> bool:
        """Whether no check failed."""
        return not any(check.problems for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        found = asdict(self)
        for check, entry in zip(self.checks, found["checks"], strict=True):
            entry["status"] = check.status
        return {**found, "is_sound": self.is_sound}


class Findings:
    """Problems gathered while checks are made; what no check entered was not looked at."""

    def __init__(self) -> None:
        self._problems: dict[str, list[str]] = {}
        self._notes: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._skipped: dict[str, str] = {}
        self._values: dict[str, float] = {}

    def count(self, check: str, number: int = 1) -> None:
        """Say that something was looked at."""
        self._counts[check] = self._counts.get(check, 0) + number

    def add(self, check: str, *problems: str) -> None:
        """Enter problems."""
        self._problems.setdefault(check, []).extend(problems)

    def note(self, check: str, *notes: str) -> None:
        """Enter what is no problem."""
        self._notes.setdefault(check, []).extend(notes)

    def measured(self, check: str, value: float) -> None:
        """Enter what was measured."""
        self._values[check] = value

    def skip(self, checks: Iterable[str], reason: str) -> None:
        """Say why checks were not made; the first reason of each is kept."""
        for check in checks:
            self._skipped.setdefault(check, reason)

    def has(self, *checks: str) -> bool:
        """Whether one of the checks found a problem."""
        return any(self._problems.get(check) for check in checks)

    def checks(self) -> tuple[Check, ...]:
        """Every check of `CHECKS`."""
        return tuple(
            Check(
                name=name,
                count=self._counts.get(name, 0),
                problems=tuple(self._problems.get(name, ())),
                notes=tuple(self._notes.get(name, ())),
                skipped=self._skipped.get(name),
                value=self._values.get(name),
            )
            for name in CHECKS
        )
