"""The vocabulary of a SentencePiece ``tokenizer.model``, read without the sentencepiece package.

The file is a protocol-buffer message: field 1, repeated, is a piece (1: text, 2: score, 3: type); field 2
says how it was trained (3: algorithm); field 3 how text is normalized (3: a space is put before it).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from qkern.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Pieces", "TokenType", "read_sentencepiece"]

_BPE: Final = 2


class TokenType(IntEnum):
    """What a token is; the numbers are the same in SentencePiece and GGUF."""

    NORMAL = 1
    """Part of text."""
    UNKNOWN = 2
    """Stands for what no token covers."""
    CONTROL = 3
    """Special; never part of text."""
    USER_DEFINED = 4
    """Added; taken whole wherever it stands in text."""
    UNUSED = 5
    """No meaning."""
    BYTE = 6
    """One byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """A SentencePiece vocabulary.

    Parameters
    ----------
    tokens : dict
        Text and type by id.
    scores : dict
        Score by id; a pair with a higher one is merged first.
    adds_space_prefix : bool
        Whether text is taken as if a space stood before it.
    """

    tokens: dict[int, tuple[str, TokenType]]
    scores: dict[int, float]
    adds_space_prefix: bool


def read_sentencepiece(file: Path) -> Pieces:
    """Read the vocabulary of a ``tokenizer.model``.

    Raises
    ------
    FormatError
        If the file is no SentencePiece model.
    UnsupportedError
        If it is no BPE model.
    """
    tokens: dict[int, tuple[str, TokenType]] = {}
    scores: dict[int, float] = {}
    algorithm, prefix = 1, True
    try:
        for field, value in _fields(file.read_bytes()):
            if field == 1:
                piece = dict(_fields(_bytes(value)))
                number = len(tokens)
                tokens[number] = (_bytes(piece[1]).decode("utf-8"), TokenType(_number(piece.get(3, 1))))
                scores[number] = struct.unpack("<f", _bytes(piece.get(2, bytes(4))))[0]
            elif field == 2:
                algorithm = _number(dict(_fields(_bytes(value))).get(3, 1))
            elif field == 3:
                prefix = bool(_number(dict(_fields(_bytes(value))).get(3, 1)))
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise FormatError(f"{file} is no SentencePiece model: {error!r}; fetch it again") from None
    if not tokens:
        raise FormatError(f"{file} is no SentencePiece model: it has no pieces; fetch it again")
    if algorithm != _BPE:
        raise UnsupportedError(
            f"{file} is no BPE model (algorithm {algorithm}): only BPE is exported to GGUF"
        )
    return Pieces(tokens=tokens, scores=scores, adds_space_prefix=prefix)


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes stand where a number belongs")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes belong")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if size > len(data) - at:
            raise ValueError("a field runs past the end")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number has more than 64 bits")
