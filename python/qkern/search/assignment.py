"""`MixedPrecision`: which tensor is stored how, as a plain mapping that every path takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qkern.errors import InputError, OutputError, UnsupportedError, advice_on_writing, reason_of
from qkern.nn import name_matches
from qkern.ops.gguf_types import GGUF_TYPES, GGUFType, gguf_type
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["KEPT", "Choice", "MixedPrecision", "parse_choice", "spell_choice"]

_GLOB: Final = frozenset("*?[")
KEPT: Final = "16"
"""Spelling of a tensor that stays as it is."""
Choice = Scheme | GGUFType | None
"""How a tensor is stored; None: as it is."""


def parse_choice(spelling: str) -> Choice:
    """Read ``"16"``, a scheme such as ``"w4g128"`` or a GGUF type such as ``"q4_k"``.

    Raises
    ------
    InputError
        If it is none of these.
    """
    if spelling == KEPT:
        return None
    if isinstance(spelling, str) and spelling.lower() in GGUF_TYPES:
        return gguf_type(spelling)
    try:
        return Scheme.parse(spelling)
    except (InputError, TypeError) as error:
        raise InputError(
            f"not a scheme, a GGUF type or {KEPT!r}: got {spelling!r}; schemes look like w4g128 (of 2, 3, 4 "
            f"or 8 bits), GGUF types are {', '.join(GGUF_TYPES)}"
        ) from error


def spell_choice(choice: Choice) -> str:
    """Return what `parse_choice` reads as this choice."""
    return KEPT if choice is None else choice.name if isinstance(choice, GGUFType) else str(choice)


@dataclass(frozen=True, slots=True)
class MixedPrecision:
    """An assignment of schemes or GGUF types to tensors.

    Parameters
    ----------
    choices : mapping of str to str
        Pattern to `parse_choice`'s spelling. A pattern is the name of a linear (or embedding) in the model,
        the end of one at a dot, or a glob. Linears that no pattern matches stay as they are.

    Raises
    ------
    InputError
        On an empty assignment, a choice that is not understood, or schemes and GGUF types in one.
    """

    choices: Mapping[str, str]

    def __post_init__(self) -> None:
        _check_mapping(self.choices)
        if not self.choices:
            raise InputError("the assignment is empty: it maps names of tensors to schemes or GGUF types")
        spelled = {pattern: _spelled(pattern, choice) for pattern, choice in self.choices.items()}
        kinds = {type(parse_choice(choice)) for choice in spelled.values()} - {type(None)}
        if len(kinds) > 1:
            first = {
                kind: next(p for p, c in spelled.items() if type(parse_choice(c)) is kind) for kind in kinds
            }
            raise InputError(
                "an assignment has schemes or GGUF types, not both: got "
                + " and ".join(f"{pattern!r}: {spelled[pattern]!r}" for pattern in sorted(first.values()))
            )
        object.__setattr__(self, "choices", spelled)

    @classmethod
    def read(cls, path: str | Path) -> MixedPrecision:
        """Read a JSON object of patterns and choices.

        Raises
        ------
        InputError
            If the file is missing, no such object, or has a key twice.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"cannot read the assignment {path}: {reason_of(error)}") from error
        if not isinstance(found, dict):
            raise InputError(
                f"{path} is no assignment but {_shown(found)}: one JSON object of names and choices, "
                f'such as {{"*.mlp.down_proj": "w4g128"}}'
            )
        try:
            return cls(found)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def of(cls, given: MixedPrecision | Mapping[str, Any] | str | Path) -> MixedPrecision:
        """Return `given` itself, or what a file or a mapping (of `Scheme` and `GGUFType` too) says."""
        if isinstance(given, MixedPrecision):
            return given
        if isinstance(given, (str, Path)):
            return cls.read(given)
        _check_mapping(given)
        return cls(
            {
                pattern: spell_choice(choice) if isinstance(choice, Choice) else choice
                for pattern, choice in given.items()
            }
        )

    def write(self, path: str | Path) -> Path:
        """Write the JSON object; the file appears when it is complete.

        Raises
        ------
        OutputError
            If it cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.write_text(json.dumps(dict(self.choices), indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(
                f"cannot write {path}: {reason_of(error)}; {advice_on_writing(error)}"
            ) from error
        return path

    def resolve(self, names: Iterable[str]) -> dict[str, Choice]:
        """Choice of every name that is matched; the others are not in the result.

        Parameters
        ----------
        names : iterable of str
            Everything that could be assigned.

        Raises
        ------
        InputError
            If a pattern matches no name, or two match the same.
        """
        names = list(names)
        by: dict[str, str] = {}
        ending: dict[str, list[str]] = {}  # so that an assignment of every expert takes no look at each pair
        for name in names:
            for end in _ends(name):
                ending.setdefault(end, []).append(name)
        for pattern in self.choices:
            matched = ending.get(pattern, [])
            if _GLOB.intersection(pattern):
                matched = [name for name in names if name_matches(name, (pattern,))]
            if not matched:
                raise InputError(
                    f"the assignment's {pattern!r} names no tensor that could be quantized here; there are "
                    f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} (as the model names them, a "
                    "glob fits whole names; norms stay 16-bit, outside a GGUF embeddings too; a tied head is "
                    "its embedding)"
                )
            for name in matched:
                if name in by:
                    raise InputError(
                        f"the assignment names {name} twice: by {by[name]!r} and by {pattern!r}; leave it to "
                        "one of them"
                    )
                by[name] = pattern
        return {name: parse_choice(self.choices[by[name]]) for name in names if name in by}

    def schemes(self, names: Iterable[str]) -> dict[str, Scheme]:
        """`resolve` for what takes schemes: the quantized names alone.

        Raises
        ------
        UnsupportedError
            If the assignment has GGUF types.
        """
        for name, spelling in self.choices.items():
            if isinstance(parse_choice(spelling), GGUFType):
                raise UnsupportedError(
                    f"the assignment gives {name} the GGUF type {spelling}, which modules and checkpoint "
                    "formats do not hold: use it with export-gguf, or give schemes such as w4g128"
                )
        found = self.resolve(names)
        return {name: choice for name, choice in found.items() if isinstance(choice, Scheme)}

    def gguf_types(self, names: Iterable[str]) -> dict[str, GGUFType | None]:
        """`resolve` for what takes GGUF types; None stays as it is.

        Raises
        ------
        UnsupportedError
            If the assignment has schemes.
        """
        for name, spelling in self.choices.items():
            if isinstance(parse_choice(spelling), Scheme):
                raise UnsupportedError(
                    f"the assignment gives {name} the scheme {spelling}, which GGUF does not hold: use it "
                    "with quantize, or give GGUF types such as q4_k"
                )
        found = self.resolve(names)
        return {name: choice for name, choice in found.items() if not isinstance(choice, Scheme)}


def _check_mapping(given: Any) -> None:
    if not isinstance(given, Mapping):
        raise InputError(
            f"an assignment is a mapping of names and choices, or a JSON file of one: got {_shown(given)}"
        )


def _spelled(pattern: str, choice: Any) -> str:
    if not (isinstance(pattern, str) and isinstance(choice, str)):
        raise InputError(
            f"an assignment has names and choices, strings such as {KEPT!r} or 'w4g128': got "
            f"{_shown(choice)} for {pattern!r}"
        )
    try:
        return spell_choice(parse_choice(choice))
    except InputError as error:
        raise InputError(f"{pattern!r}: {error}") from error


def _shown(value: Any) -> str:
    """Show a value as JSON has it, where it is short and can be in a file."""
    try:
        shown = json.dumps(value)
    except (TypeError, ValueError):
        shown = repr(value)
    return shown if len(shown) <= 40 else f"a long {type(value).__name__}"


def _ends(name: str) -> Iterator[str]:
    """Yield a dotted name and what follows each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse what a JSON object would otherwise drop in silence."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found
