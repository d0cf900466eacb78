"""JSON files beside a model: what is wrong with one is said with its name."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qkern.errors import FormatError, QkernError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["reading"]


@contextmanager
def reading(file: Path, kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Iterator[Any]:
    """Give the content of a file, empty if there is none; what does not fit in it is damage of the file.

    Parameters
    ----------
    file : Path
        The file.
    kind : type
        ``dict`` or ``list``: what it must hold.

    Raises
    ------
    FormatError
        If it is no JSON of that kind, or the block inside stumbles over what is in it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else kind()
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file} cannot be read ({error}); fetch it again") from None
    if not isinstance(content, kind):
        raise FormatError(
            f"{file} must hold a JSON {'object' if kind is dict else 'list'}: got {type(content).__name__}; "
            "fetch it again"
        )
    try:
        yield content
    except QkernError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise FormatError(
            f"{file} is not as its library writes it ({type(error).__name__}: {error!s:.100}); fetch it again"
        ) from None
