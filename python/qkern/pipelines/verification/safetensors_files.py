"""A folder's safetensors read from the bytes of the files, in plain numpy, and everything wrong with them.

A file is eight bytes with the length of its header, the header in JSON (name to dtype, shape and first and
last byte of the data), and the data without gaps. This reader shares nothing with `qkern.checkpoints`, so
that neither hides an error of the other; and where that one stops at the first error, it goes on.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["StoredTensor", "read_folder", "read_json_object"]

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_HEADER_LIMIT: Final = 100 << 20
# numpy has no bf16 and no fp8: their bits.
_DTYPES: Final = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
_FLOATS: Final = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file.

    Parameters
    ----------
    name : str
        Its name.
    file : Path
        Where it is.
    dtype : str
        As safetensors spells it, for example ``"BF16"``.
    shape : tuple of int
        Its shape.
    start : int
        First byte of its data in the file.
    data : ndarray
        Bytes of the file, mapped.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    data: NDArray[np.uint8] = field(repr=False, compare=False)

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers that `floats` reads."""
        return self.dtype in _FLOATS

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize

    def array(self) -> NDArray[Any]:
        """Return the values as stored; of bf16 and fp8 their bits."""
        dtype = np.dtype(_DTYPES[self.dtype])
        return self.data[self.start : self.start + self.nbytes].view(dtype).reshape(self.shape)

    def floats(self) -> NDArray[np.float32]:
        """Return floating-point values in fp32, which holds fp16 and bf16 exactly."""
        stored = self.array()
        if self.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)


def read_json_object(file: Path) -> tuple[dict[str, Any], str | None]:
    """Return the object in a JSON file, empty if there is none, and what is wrong with it."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}, f"{file.name} is missing"
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"{file.name} is no JSON: {error}"
    if not isinstance(found, dict):
        return {}, f"{file.name} holds no JSON object"
    return found, None


def read_folder(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Find every readable tensor of a folder.

    Parameters
    ----------
    folder : Path
        With ``model.safetensors``, or shards and their index.

    Returns
    -------
    tensors : dict
        By name.
    problems : list of str
        What is missing, damaged, or contradicts the index.
    """
    index, single = folder / _INDEX, folder / _SINGLE
    content, problem = read_json_object(index) if index.exists() else ({}, None)
    listed = content.get("weight_map")
    if single.exists() or not index.exists():
        files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            return {}, [f"{_INDEX} is missing, and there are {len(files)} safetensors files"]
        tensors, problems = _read_file(files[0])
        if isinstance(listed, dict) and set(map(str, listed.values())) != {_SINGLE}:
            problems.append(
                f"{_SINGLE} lies beside an index of other files: transformers and qkern read {_SINGLE}, "
                "others what the index names; remove one of the two"
            )
        return {tensor.name: tensor for tensor in tensors}, problems
    if problem is not None or not isinstance(listed, dict):
        return {}, [problem or f"{_INDEX} has no weight_map"]
    return _read_shards(folder, listed)


def _read_shards(folder: Path, listed: dict[str, Any]) -> tuple[dict[str, StoredTensor], list[str]]:
    # Writers disagree on what the index's total_size counts, and no reader needs it.
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    damaged = set()
    for name in sorted({str(file) for file in listed.values()}):
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            problems.append(f"{_INDEX} names {name!r}, which is no safetensors file of the folder")
            damaged.add(name)
            continue
        tensors, wrong = _read_file(folder / name)
        problems += wrong
        damaged |= {name} if wrong else set()
        for tensor in tensors:
            if tensor.name in found:
                problems.append(f"{tensor.name} is in {found[tensor.name].file.name} and in {name}")
            found[tensor.name] = tensor
    for tensor_name, file in listed.items():
        there = found.get(tensor_name)
        if there is None and str(file) not in damaged:
            problems.append(f"{tensor_name} is not in {file}, where the index has it")
        elif there is not None and there.file.name != file:
            problems.append(f"{tensor_name} is in {there.file.name}, but the index has it in {file}")
    problems += [
        f"{name} is in {found[name].file.name}, but not in the index" for name in found.keys() - listed
    ]
    return found, problems


def _numbers(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(size) is int and 0 <= size < 1 << 62 for size in found):
        raise ValueError(f"{found!r:.60} are no sizes")
    return tuple(found)


def _entry(name: str, fields: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, dtype, shape, and first and last byte of what a header says of a tensor."""
    dtype, offsets = fields["dtype"], _numbers(fields["data_offsets"])
    if not isinstance(dtype, str) or len(offsets) != 2:
        raise ValueError(f"{name} has dtype {dtype!r:.60} and data_offsets {list(offsets)}")
    return name, dtype, _numbers(fields["shape"]), *offsets


def _read_file(file: Path) -> tuple[list[StoredTensor], list[str]]:
    """Tensors of one file, those that lie within it."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                return [], [f"{file.name} is truncated: its header has {length} bytes, the file {size}"]
            header = json.loads(stream.read(length))
        # Mapped once: a file has thousands of tensors.
        data = np.asarray(np.memmap(file, np.uint8, mode="r"))
        entries = [_entry(name, fields) for name, fields in header.items() if name != "__metadata__"]
    except FileNotFoundError:
        return [], [f"{file.name} is missing"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [], [f"{file.name} has no readable header: {type(error).__name__}: {error}"]
    tensors, problems, end = [], [], 0
    for name, dtype, shape, first, last in sorted(entries, key=lambda entry: (entry[3], entry[4])):
        if dtype not in _DTYPES:
            problems.append(f"{name} in {file.name} has the unknown dtype {dtype!r}")
            end = last
            continue
        start = 8 + length + first
        tensor = StoredTensor(name=name, file=file, dtype=dtype, shape=shape, start=start, data=data)
        if first != end or last - first != tensor.nbytes:
            problems.append(
                f"{name} in {file.name} takes bytes {first} to {last}: expected {tensor.nbytes} from {end} on"
            )
        end = last
        if 8 + length + last > size:
            problems.append(f"{file.name} is truncated: {name} ends at byte {8 + length + last} of {size}")
        elif last - first == tensor.nbytes:
            tensors.append(tensor)
    if not problems and 8 + length + end != size:
        problems.append(f"{file.name} has {size - 8 - length - end} bytes after its last tensor")
    return tensors, problems
