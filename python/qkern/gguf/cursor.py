"""Numbers, strings and arrays off a buffer that may be hostile.

Nothing is made that is much larger than its bytes in the file: arrays stay in the buffer, and their items are
made when they are asked for.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from qkern.errors import FormatError

__all__ = ["Cursor", "MetadataArray"]

_SCALARS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING: Final = 8
_ARRAY: Final = 9
_LENGTH: Final = struct.Struct("<Q")
# What the format allows for a key; a longer name would only make every message about it long.
_MAX_NAME: Final = 65535


class MetadataArray(Sequence[Any]):
    """An array of a file's metadata: numbers, or strings that are decoded when they are asked for.

    It equals a list of the same items, and a slice of it is a list.

    Parameters
    ----------
    items : numpy.ndarray or array
        The numbers, or where each string begins.
    data : memoryview, optional
        The file, for strings.
    """

    __slots__ = ("_data", "_items")

    def __init__(self, items: Any, data: memoryview | None = None) -> None:
        self._items = items
        self._data = data

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        item = self._items[index]
        return item.item() if self._data is None else _text(self._data, item)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"[{shown}{f', ... {len(self)} items' if len(self) > 3 else ''}]"


class Cursor:
    """Reads numbers and strings off a buffer, and never past its end.

    Parameters
    ----------
    data : memoryview
        The bytes of the file.
    """

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes.

        Raises
        ------
        FormatError
            As every method: if they are not there.
        """
        if count > len(self.data) - self.at:
            raise FormatError(f"truncated: {count} bytes wanted at {self.at} of {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> Any:
        """Read one number of a form of `struct`."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, least_bytes: int, what: str) -> int:
        """Read a 64-bit count of items that take at least `least_bytes` each."""
        count = int(self.number("<Q"))
        if count * least_bytes > len(self.data) - self.at:
            raise FormatError(f"{count} {what} do not fit in the rest of the file")
        return count

    def string(self) -> str:
        """Read a string of a length up to the rest of the file."""
        begin = self.at + _LENGTH.size
        self.take(self.count(1, "bytes of a string"))
        return _text(self.data, begin)

    def name(self) -> str:
        """Read a key or the name of a tensor."""
        begin = self.at
        name = self.string()
        if self.at - begin - _LENGTH.size > _MAX_NAME:
            raise FormatError(f"a name of {self.at - begin - _LENGTH.size} bytes, allowed are {_MAX_NAME}")
        return name

    def value(self, kind: int) -> Any:
        """Read a metadata value of a type by its number in the file."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise FormatError(f"unknown metadata type {kind}")
        item = self.number("<I")
        if item in _SCALARS:
            form = _SCALARS[item]
            size = struct.calcsize(form)
            raw = self.take(self.count(size, "numbers") * size)
            return MetadataArray(np.frombuffer(raw, dtype=np.dtype(form[1:]).newbyteorder("<")))
        if item != _STRING:  # llama.cpp reads no arrays in arrays either
            raise FormatError(f"an array of the unknown type {item}")
        return self._strings()

    def _strings(self) -> MetadataArray:
        count = self.count(_LENGTH.size, "strings")
        begins = array("q")
        # By hand: a vocabulary is a large part of what it takes to open a file.
        at, end, length_of = self.at, len(self.data), _LENGTH.unpack_from
        for _ in range(count):
            at += 8
            if at > end:
                raise FormatError(f"truncated: a string begins at {at} of {end}")
            begins.append(at)
            at += length_of(self.data, at - 8)[0]
        if at > end:
            raise FormatError(f"truncated: a string ends at {at} of {end}")
        self.at = at
        return MetadataArray(begins, self.data)


def _text(data: memoryview, begin: int) -> str:
    """Decode the string whose bytes begin there, behind their count."""
    (count,) = _LENGTH.unpack_from(data, begin - _LENGTH.size)
    return str(data[begin : begin + count], "utf-8", "replace")
