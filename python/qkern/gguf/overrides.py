"""Types of single tensors, by patterns of their names: what ``--tensor-type PATTERN=TYPE`` means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qkern.errors import InputError
from qkern.ops.gguf_types import GGUFType, gguf_type

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Override", "check_overrides", "override_for", "parse_overrides"]


@dataclass(frozen=True, slots=True)
class Override:
    """A type for the tensors whose name a pattern is found in.

    Parameters
    ----------
    pattern : re.Pattern
        Searched in llama.cpp's name, such as ``blk.0.ffn_down.weight``.
    type : GGUFType
        The type they get.
    """

    pattern: re.Pattern[str]
    type: GGUFType

    def __str__(self) -> str:
        return f"--tensor-type {self.pattern.pattern}={self.type.name}"

    def checked_type(self, name: str, K: int) -> GGUFType:
        """Return the type.

        Raises
        ------
        InputError
            If its blocks do not divide rows of K weights.
        """
        if K % self.type.block:
            raise InputError(
                f"{self}: rows of {name} have {K} weights, which blocks of {self.type.block} do not divide; "
                "choose another type, or a pattern that leaves it out"
            )
        return self.type


def parse_overrides(types: Mapping[str, str]) -> tuple[Override, ...]:
    """Compile patterns and look types up.

    Parameters
    ----------
    types : mapping
        From regular expression to type, such as ``{"ffn_down": "q6_k"}``; the first that matches wins.

    Raises
    ------
    InputError
        If a pattern is no regular expression, or a type is unknown.
    """
    overrides = []
    for pattern, kind in types.items():
        try:
            overrides.append(Override(re.compile(pattern), gguf_type(kind)))
        except re.error as error:
            raise InputError(
                f"--tensor-type {pattern}={kind}: {pattern!r} is no regular expression ({error}); "
                r"put \ before signs that mean themselves"
            ) from None
    return tuple(overrides)


def override_for(name: str, overrides: Sequence[Override]) -> Override | None:
    """Return the first override whose pattern is found in a name; None without one."""
    return next((override for override in overrides if override.pattern.search(name)), None)


def check_overrides(overrides: Sequence[Override], names: Mapping[str, bool]) -> None:
    """Refuse overrides that decide nothing.

    Parameters
    ----------
    overrides : sequence of Override
        In the order in which they are tried.
    names : mapping
        From every tensor's name to whether it is stored in fewer bits at all.

    Raises
    ------
    InputError
        If an override matches no tensor, or only such as stay f32, or such as earlier ones decide.
    """
    for override in overrides:
        matched = [name for name in names if override.pattern.search(name)]
        if not matched:
            raise InputError(f"{override}: the pattern is in no tensor's name; {_some(names)}")
        quantized = [name for name in matched if names[name]]
        if not quantized:
            raise InputError(
                f"{override}: vectors, norms, routers and positions stay f32, and the pattern is found in no "
                f"other name than {', '.join(matched[:3])}; leave it out"
            )
        if all(override_for(name, overrides) is not override for name in quantized):
            raise InputError(
                f"{override}: earlier patterns decide every tensor that this one matches, such as "
                f"{quantized[0]}; put it before them, or leave it out"
            )


def _some(names: Mapping[str, bool]) -> str:
    kinds = dict.fromkeys(re.sub(r"^blk\.\d+\.", "blk.0.", name) for name, fewer in names.items() if fewer)
    return f"there are {', '.join(kinds)}"
