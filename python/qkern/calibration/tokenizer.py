"""The tokenizer of a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qkern.errors import FormatError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["has_tokenizer", "load_tokenizer"]

_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether files of a tokenizer lie in a folder, to be read or damaged."""
    return any((folder / file).is_file() for file in _FILES)


def load_tokenizer(folder: Path) -> Any:
    """Tokenizer that lies beside a model; no code of the folder runs.

    Raises
    ------
    FormatError
        If there is none that transformers reads.
    """
    from transformers import AutoTokenizer

    # transformers makes an empty tokenizer of a folder that has none.
    if not has_tokenizer(folder):
        raise FormatError(f"{folder} has no tokenizer: one of {', '.join(_FILES)} is needed; copy it there")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its files are read by several libraries, each with errors of its own
        raise FormatError(
            f"{folder} has no tokenizer that transformers reads ({error}); fetch its files again"
        ) from error
