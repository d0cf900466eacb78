"""The GGUF tensor types that are encoded and decoded: one table for both ops and for the file code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qkern.errors import InputError, UnsupportedError

__all__ = ["GGUF_TYPES", "GGUFType", "gguf_type", "gguf_type_by_id"]


@dataclass(frozen=True, slots=True)
class GGUFType:
    """One tensor type of GGUF; the numbers equal those of csrc/include/qkern/gguf_blocks.h.

    Parameters
    ----------
    name : str
        Name in lower case, for example ``"q4_k"``.
    id : int
        Number in the file.
    block : int
        Weights in a block; a row must be a multiple of it.
    bytes : int
        Bytes of a block.
    """

    name: str
    id: int
    block: int
    bytes: int

    def row_bytes(self, K: int) -> int:
        """Bytes of a row of K weights; K must be a multiple of the block."""
        return K // self.block * self.bytes


_ALL: Final = (
    GGUFType("f32", 0, 1, 4),
    GGUFType("f16", 1, 1, 2),
    GGUFType("q4_0", 2, 32, 18),
    GGUFType("q4_1", 3, 32, 20),
    GGUFType("q5_0", 6, 32, 22),
    GGUFType("q5_1", 7, 32, 24),
    GGUFType("q8_0", 8, 32, 34),
    GGUFType("q2_k", 10, 256, 84),
    GGUFType("q3_k", 11, 256, 110),
    GGUFType("q4_k", 12, 256, 144),
    GGUFType("q5_k", 13, 256, 176),
    GGUFType("q6_k", 14, 256, 210),
    GGUFType("iq4_nl", 20, 32, 18),
    GGUFType("iq4_xs", 23, 256, 136),
    GGUFType("bf16", 30, 1, 2),
)
# Types of llama.cpp's that nothing here encodes or decodes; a name says more than an unknown number.
_NOT_OFFERED: Final = {
    "q8_1": 9,
    "q8_k": 15,
    "iq2_xxs": 16,
    "iq2_xs": 17,
    "iq3_xxs": 18,
    "iq1_s": 19,
    "iq3_s": 21,
    "iq2_s": 22,
    "i8": 24,
    "i16": 25,
    "i32": 26,
    "i64": 27,
    "f64": 28,
    "iq1_m": 29,
    "tq1_0": 34,
    "tq2_0": 35,
    "mxfp4": 39,
    "nvfp4": 40,
    "q1_0": 41,
}
GGUF_TYPES: Final[dict[str, GGUFType]] = {kind.name: kind for kind in _ALL}
_BY_ID: Final[dict[int, GGUFType]] = {kind.id: kind for kind in _ALL}


def gguf_type(name: str) -> GGUFType:
    """Look a type up by its name, in any case.

    Raises
    ------
    UnsupportedError
        If it is a type of llama.cpp's that qkern neither encodes nor decodes.
    InputError
        If there is no such type.
    """
    lower = name.lower()
    kind = GGUF_TYPES.get(lower)
    if kind is not None:
        return kind
    allowed = ", ".join(GGUF_TYPES)
    if lower in _NOT_OFFERED:
        raise UnsupportedError(f"GGUF tensor type not offered: got {name!r}, allowed are {allowed}")
    raise InputError(f"unknown GGUF tensor type: got {name!r}, allowed are {allowed}")


def gguf_type_by_id(number: int) -> GGUFType:
    """Look a type up by its number in the file.

    Raises
    ------
    UnsupportedError
        If qkern does not decode it.
    """
    kind = _BY_ID.get(number)
    if kind is None:
        names = [name for name, other in _NOT_OFFERED.items() if other == number]
        named = f"{number} ({names[0]})" if names else str(number)
        allowed = ", ".join(f"{kind.id} ({kind.name})" for kind in _ALL)
        raise UnsupportedError(f"GGUF tensor type {named} is not decoded: allowed are {allowed}")
    return kind
