"""Names of modules, the patterns that choose among them, and those that never are quantized by default."""

from __future__ import annotations

import fnmatch
import re
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = ["ROUTERS", "lies_in", "name_matches", "places", "role"]

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
