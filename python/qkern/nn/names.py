"""Names of modules, the patterns that choose among them, and those that never are quantized by default."""

from __future__ import annotations

import fnmatch
import re
from itertools import accumulate
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from qkern.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

__all__ = ["ROUTERS", "FirstMatch", "FirstPart", "lies_in", "name_matches", "places", "role"]

Value = TypeVar("Value")

ROUTERS: Final = ("gate", "router", "shared_expert_gate", "wg")
"""Last name components of linears that choose experts; they are tiny and sensitive."""


def name_matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name is one of `patterns`, ends with one at a dot, or fits one as a glob."""
    return any(
        name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def lies_in(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module of this name, or one that it is a part of, fits `patterns` as in `name_matches`."""
    owners = accumulate(name.split("."), "{}.{}".format)
    return any(name_matches(owner, patterns) for owner in owners)


# A name with what needs it escaped, and nothing after it.
_ONE_NAME: Final = re.compile(r"\^?((?:[\w/-]|\\\W)*)\$")


class FirstMatch(Generic[Value]):
    """Values by regular expressions of a configuration, which match at the start of a name; the first counts.

    Files name each of thousands of layers by a pattern: those that fit one name only are looked up.

    Parameters
    ----------
    patterns : iterable of (str, value)
        In the order in which they are tried.

    Raises
    ------
    FormatError
        If one is no regular expression.
    """

    def __init__(self, patterns: Iterable[tuple[str, Value]]) -> None:
        self._names: dict[str, tuple[int, Value]] = {}
        self._patterns: list[tuple[int, re.Pattern[str], Value]] = []
        for number, (pattern, value) in enumerate(patterns):
            only = _ONE_NAME.fullmatch(pattern)
            if only is not None:
                self._names.setdefault(re.sub(r"\\(\W)", r"\1", only[1]), (number, value))
                continue
            try:
                self._patterns.append((number, re.compile(pattern), value))
            except re.error as error:
                raise FormatError(
                    f"quantization_config: {pattern!r} is no regular expression ({error})"
                ) from None

    def __call__(self, name: str) -> Value | None:
        """Value of the first pattern that matches; None if none does."""
        place, value = self._names.get(name, (None, None))
        for number, pattern, other in self._patterns:
            if place is not None and place < number:
                break
            if pattern.match(name):
                return other
        return value


class FirstPart:
    """Which of many strings a name contains.

    Parameters
    ----------
    parts : iterable of str
        The strings.
    """

    def __init__(self, parts: Iterable[str]) -> None:
        self._of_length: dict[int, set[str]] = {}
        for part in parts:
            self._of_length.setdefault(len(part), set()).add(part)

    def __call__(self, name: str) -> str | None:
        """One of the strings that is a part of the name; None if none is."""
        for length, parts in self._of_length.items():
            for start in range(len(name) - length + 1):
                if name[start : start + length] in parts:
                    return name[start : start + length]
        return None


def role(name: str) -> str:
    """Name with ``#`` for its numbers: experts of a layer that do the same have the same."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)


def places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Parents and attribute names of every module, by the module's id: a shared module has several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        # Not named_children, which names a child once however often the parent holds it.
        for attribute, child in parent._modules.items():
            found.setdefault(id(child), []).append((parent, attribute))
    return found
