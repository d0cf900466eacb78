"""Importance matrices in llama.cpp's two file forms: how strongly each column of a matrix is driven.

The GGUF form holds ``<tensor>.in_sum2``, sums of squared activations, and ``<tensor>.counts``, of how many
tokens. The old binary form holds means times a number of chunks, one number for a whole tensor::

    int32 entries, then for each: int32 length, name, int32 chunks, int32 values, float32[values]
    int32 chunks of the run, int32 length, name of the text        (files of the first versions end before)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from qkern.errors import FormatError, InputError
from qkern.gguf.cursor import Cursor
from qkern.gguf.reader import GGUFFile
from qkern.gguf.writer import PlannedTensor, check_new_file, write_gguf, write_whole
from qkern.ops.gguf_types import gguf_type

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Imatrix", "ImatrixEntry", "check_imatrix_output", "read_imatrix", "write_imatrix"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS: Final = "imatrix.datasets"
_CHUNK_COUNT: Final = "imatrix.chunk_count"
_CHUNK_SIZE: Final = "imatrix.chunk_size"
_MAX_INT: Final = 2**31 - 1
_SUFFIXES: Final = (".gguf", ".dat")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImatrixEntry:
    """What one matrix, or each of a stack of experts, was multiplied with.

    Parameters
    ----------
    sums : Tensor
        fp32 ``[E, K]``: sums of the squared activations of each column.
    counts : Tensor
        int64 ``[E]``: tokens that were summed. One count may stand for a stack; then `sums` is
        ``[1, E * K]``.
    """

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean squares, fp32 of the shape of `sums`; 0 for an expert that no token reached."""
        counts = self.counts.float()[:, None]
        return torch.where(counts > 0, self.sums / counts.clamp(min=1), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Imatrix:
    """An importance matrix: entries by llama.cpp's names of the tensors, and where they come from.

    Parameters
    ----------
    entries : dict of str to ImatrixEntry
        For example ``"blk.0.attn_q.weight"``.
    datasets : tuple of str
        Texts that were read.
    chunk_count : int
        Sequences that were read.
    chunk_size : int
        Tokens of a sequence. The old form does not know it: there a chunk is counted as one token.
    """

    entries: Mapping[str, ImatrixEntry]
    datasets: tuple[str, ...] = ()
    chunk_count: int
    chunk_size: int

    def importance(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Weights of the columns of a tensor, or None if there is no such entry.

        Parameters
        ----------
        name : str
            llama.cpp's name.
        shape : tuple of int
            As torch has it.

        Returns
        -------
        Tensor or None
            fp32 ``[K]``, or ``[E, K]`` for a stack of matrices.

        Raises
        ------
        InputError
            If the entry is of another size.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        matrices = math.prod(shape[:-2])
        if entry.sums.numel() != matrices * shape[-1] or len(entry.counts) not in (1, matrices):
            raise InputError(
                f"the importance matrix was made for another model: {name} is {shape}, which needs "
                f"{matrices} x {shape[-1]} values, but it has {len(entry.counts)} x {entry.sums.shape[1]}"
            )
        return entry.mean.reshape(*shape[:-2], shape[-1])


def read_imatrix(path: str | Path) -> Imatrix:
    """Read an importance matrix of either form.

    Raises
    ------
    InputError
        If there is no such file.
    FormatError
        If it is truncated, hostile or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no importance matrix at {path}; name an existing file, or make it: qkern imatrix")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return _read_gguf(path)
    try:
        return _parse_binary(Cursor(memoryview(path.read_bytes())))
    except FormatError as error:
        raise FormatError(
            f"{path} is no importance matrix, neither a GGUF nor of llama.cpp's old form: {error}; fetch it "
            "again, or make it anew: qkern imatrix"
        ) from None


def _read_gguf(path: Path) -> Imatrix:
    with GGUFFile(path) as file:
        try:
            return _parse_gguf(file)
        except FormatError as error:
            raise FormatError(
                f"{path} is a GGUF, but no importance matrix: {error}; make one with: qkern imatrix"
            ) from None


def _parse_gguf(file: GGUFFile) -> Imatrix:
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise FormatError(f"general.type is {kind!r}, expected 'imatrix'")
    datasets = file.metadata.get(_DATASETS, [])
    if isinstance(datasets, str) or not isinstance(datasets, Sequence):
        raise FormatError(f"{_DATASETS} must be a list of names: got {datasets!r:.60}")
    sums = _with_ending(file, _SUMS)
    counts = _with_ending(file, _COUNTS)
    if not sums or sums.keys() != counts.keys():
        odd = sorted(sums.keys() ^ counts.keys())[:4]
        raise FormatError(f"it needs pairs of {_SUMS} and {_COUNTS}: got {len(sums)}, incomplete are {odd}")
    return Imatrix(
        entries={name: _entry(name, sums[name], counts[name]) for name in sums},
        datasets=tuple(map(str, datasets)),
        chunk_count=_metadata_count(file, _CHUNK_COUNT),
        chunk_size=_metadata_count(file, _CHUNK_SIZE),
    )


def _with_ending(file: GGUFFile, ending: str) -> dict[str, Tensor]:
    """Tensors whose names end so, by the rest of the name; others (newer files have them) are left alone."""
    found = {}
    for name, info in file.tensors.items():
        if name.endswith(ending):
            if info.type_id != gguf_type("f32").id:
                raise FormatError(f"tensor {name!r} must be f32: its type is {info.type_id}")
            found[name.removesuffix(ending)] = file[name].decode()
    return found


def _metadata_count(file: GGUFFile, key: str) -> int:
    value = file.metadata.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise FormatError(f"{key} must be a count: got {value!r:.60}")
    return value


def _entry(name: str, sums: Tensor, counts: Tensor) -> ImatrixEntry:
    for what, values in ((_SUMS, sums), (_COUNTS, counts)):
        if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
            raise FormatError(f"{name}{what} has NaN, Inf or negative values")
    matrices = counts.numel()
    if sums.numel() % matrices:
        raise FormatError(f"{name} has {sums.numel()} sums, which {matrices} counts do not divide")
    # A count in fp32 is below 2^63 only by the file's good will.
    whole = counts.reshape(matrices).double().round().clamp(max=2.0**62).long()
    return ImatrixEntry(sums=sums.reshape(matrices, -1), counts=whole)


def _parse_binary(cursor: Cursor) -> Imatrix:
    entries: dict[str, ImatrixEntry] = {}
    for _ in range(_positive(cursor, "number of entries")):
        name = _text(cursor, _positive(cursor, "length of a name"))
        if name in entries:
            raise FormatError(f"entry {name!r} twice")
        # Files are about that say 0; only the ratios of the values count.
        chunks = max(1, _positive(cursor, f"number of chunks of {name!r}", least=0))
        count = _positive(cursor, f"number of values of {name!r}")
        values = np.frombuffer(cursor.take(4 * count), "<f4").astype(np.float32)
        entries[name] = _entry(name, torch.from_numpy(values), torch.tensor([float(chunks)]))
    chunk_count = max(int(entry.counts.max()) for entry in entries.values())
    datasets: tuple[str, ...] = ()
    if _rest(cursor):
        chunk_count = _positive(cursor, "number of chunks", least=0)
    if _rest(cursor):
        datasets = (_text(cursor, _positive(cursor, "length of the text's name", least=0)),)
    if _rest(cursor):
        raise FormatError(f"{_rest(cursor)} bytes after its end")
    return Imatrix(
        entries=entries, datasets=tuple(filter(None, datasets)), chunk_count=chunk_count, chunk_size=1
    )


def _rest(cursor: Cursor) -> int:
    return len(cursor.data) - cursor.at


def _positive(cursor: Cursor, what: str, *, least: int = 1) -> int:
    number = int(cursor.number("<i"))
    if number < least:
        raise FormatError(f"{what} is {number}")
    return number


def _text(cursor: Cursor, count: int) -> str:
    raw = bytes(cursor.take(count))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{raw[:40]!r} is no name") from None


def check_imatrix_output(path: Path) -> None:
    """Refuse a file that `write_imatrix` would refuse, before the work.

    Raises
    ------
    InputError
        If its ending is neither ``.gguf`` nor ``.dat``, or it exists, or its folder does not.
    """
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"an importance matrix is written as .gguf, or as .dat in llama.cpp's old form: got {path.name}"
        )
    check_new_file(path)


def write_imatrix(path: str | Path, imatrix: Imatrix) -> None:
    """Write an importance matrix as llama.cpp's own tool does.

    Parameters
    ----------
    path : str or Path
        Must not exist. ``.gguf``: the GGUF form; ``.dat``: the old binary form, which gives experts that no
        token reached the value 1 and keeps one number of chunks for all experts.
    imatrix : Imatrix
        What to write.

    Raises
    ------
    InputError
        If the path cannot be.
    OutputError
        If the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    check_imatrix_output(path)
    if path.suffix == ".gguf":
        _write_gguf(path, imatrix)
        return
    write_whole(path, _binary(imatrix))


def _write_gguf(path: Path, imatrix: Imatrix) -> None:
    kind = gguf_type("f32")
    tensors = []
    for name, entry in sorted(imatrix.entries.items()):
        for ending, values in ((_SUMS, entry.sums), (_COUNTS, entry.counts.float()[:, None])):
            # A last dimension of 1 is not stored.
            value = values[0] if len(values) == 1 else values
            full = f"{name}{ending}"
            tensors.append(
                PlannedTensor(
                    name=full,
                    source=full,
                    type=kind,
                    shape=tuple(value.shape),
                    read=lambda value=value: value,  # type: ignore[misc]
                )
            )

    def add_metadata(writer: Any) -> None:
        writer.add_type("imatrix")
        writer.add_array(_DATASETS, list(imatrix.datasets))
        writer.add_uint32(_CHUNK_COUNT, imatrix.chunk_count)
        writer.add_uint32(_CHUNK_SIZE, imatrix.chunk_size)

    write_gguf(path, "", tensors, add_metadata)  # it belongs to no architecture


def _binary(imatrix: Imatrix) -> bytes:
    parts = [struct.pack("<i", len(imatrix.entries))]
    for name, entry in sorted(imatrix.entries.items()):
        chunks = min(-(-int(entry.counts.max()) // max(1, imatrix.chunk_size)), _MAX_INT)
        mean = torch.where(entry.counts[:, None] > 0, entry.mean, 1.0)
        if not bool((mean * chunks).isfinite().all()):
            chunks = 1  # only ratios count
        values = (mean * chunks).numpy().astype("<f4").tobytes()
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", chunks, len(values) // 4), values]
    # It has room for one text.
    dataset = (imatrix.datasets or ("",))[-1].encode()
    parts += [struct.pack("<ii", min(imatrix.chunk_count, _MAX_INT), len(dataset)), dataset]
    return b"".join(parts)
