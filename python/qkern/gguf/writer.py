"""Writing a GGUF one tensor at a time; files appear under their names only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from qkern._progress import track
from qkern.errors import InputError, OutputError, advice_on_writing, reason_of
from qkern.gguf.quantized import blocks_of
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode
from qkern.schemes import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from qkern.ops.gguf_types import GGUFType

__all__ = [
    "PlannedTensor",
    "Written",
    "check_new_file",
    "gguf_bytes",
    "gguf_files",
    "write_gguf",
    "write_whole",
]

# fp32 bytes that are converted at a time: bounds memory beside the tensor itself.
_CHUNK_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor that will be written.

    Parameters
    ----------
    name : str
        llama.cpp's name.
    source : str
        Name in the checkpoint, for messages.
    type : GGUFType
        Its type in the file.
    shape : tuple of int
        As torch has it.
    read : callable
        Returns the tensor, in any float dtype or quantized; called once, when its turn comes.
    importance : Tensor or None
        Weights of the columns for the encoder, ``[K]``, or ``[E, K]`` for a stack of matrices.
    blocks : callable or None
        Returns the blocks themselves, uint8 ``[rows, row bytes]``, where they are chosen elsewhere, or None
        where they are not; called before `read`.
    """

    name: str
    source: str
    type: GGUFType
    shape: tuple[int, ...]
    read: Callable[[], Tensor | QuantizedWeight]
    importance: Tensor | None = None
    blocks: Callable[[], Tensor | None] | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.type.row_bytes(self.shape[-1])

    @property
    def bytes(self) -> int:
        """Size in the file, padding left out."""
        return math.prod(self.shape[:-1]) * self.row_bytes


def check_new_file(path: Path, example: str = "model.gguf") -> None:
    """Refuse a path that no new file can have; `example` is a name that one could have.

    Raises
    ------
    InputError
        If it exists, or its folder does not.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, for example --output {path / example}")
    if path.exists():
        raise InputError(f"{path} exists: remove it or choose another --output")
    if path.parent.is_file():
        raise InputError(f"{path} cannot be made: {path.parent} is a file; choose another --output")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of the output file does not exist; make it first")


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file, which appears under its name only when it is complete.

    Raises
    ------
    OutputError
        If it cannot be written; nothing is left behind.
    """
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _not_written(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write {path}: {reason_of(error)}; nothing was left there; {advice_on_writing(error)}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written.

    Parameters
    ----------
    files : list of Path
        The files.
    exact : dict
        Of each tensor by its name in the file whether it decodes to exactly the values that were read.
    """

    files: list[Path]
    exact: dict[str, bool]


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Sequence[PlannedTensor],
    add_metadata: Callable[[Any], None],
    *,
    max_shard_bytes: int | None = None,
) -> Written:
    """Write a model as a file, or as several with at most so many bytes of tensors each.

    Parameters
    ----------
    path : Path
        Must not exist. Several files are called ``NAME-00001-of-00003.gguf`` and so on, as llama.cpp calls
        them; it loads them all when it is given the first.
    architecture : str
        llama.cpp's name of the architecture.
    tensors : sequence of PlannedTensor
        In the order of the file.
    add_metadata : callable
        Adds keys and values to a ``gguf.GGUFWriter``.
    max_shard_bytes : int, optional
        A larger single tensor gets a file of its own. Default: one file.

    Returns
    -------
    Written
        The files, and which tensors are exact.

    Raises
    ------
    InputError
        If a file exists, or a tensor has NaN or Inf values or another shape than planned.
    OutputError
        If a file cannot be written; nothing is left behind.
    """
    import gguf

    shards = _shards(tensors, max_shard_bytes)
    files = gguf_files(path, tensors, max_shard_bytes=max_shard_bytes)
    for file in (path, *files):
        check_new_file(file)
    partials = [_partial(file) for file in files]
    writers: list[Any] = []
    sizes: list[int] = []

    def begin(number: int) -> None:
        if writers:
            writers[-1].close()
        writers.append(gguf.GGUFWriter(partials[number], architecture))
        _add_metadata(writers[-1], shards, number, add_metadata)
        _write_header(writers[-1], shards[number])
        sizes.append(_padded(writers[-1], writers[-1].fout[0].tell(), shards[number]))

    numbered = [(number, tensor) for number, shard in enumerate(shards) for tensor in shard]
    placed: list[Path] = []
    exact: dict[str, bool] = {}
    try:
        for number, tensor in track(numbered, "Writing GGUF", unit="tensor"):
            if number == len(writers):
                begin(number)
            blocks, exact[tensor.name] = _encode(tensor)
            writers[-1].write_tensor_data(blocks.numpy())
            del blocks  # before the next tensor is read
        writers[-1].close()
        _check_sizes(partials, sizes)
        # The first one last: whoever sees it finds the others.
        for partial, file in reversed(list(zip(partials, files, strict=True))):
            partial.replace(file)
            placed.append(file)
    except OSError as error:
        for file in placed:
            file.unlink(missing_ok=True)
        raise _not_written(path, error) from error
    finally:
        for writer in writers:
            # On a full disk closing fails too, and again.
            with contextlib.suppress(OSError):
                writer.close()
        for partial in partials:
            partial.unlink(missing_ok=True)
    return Written(files=files, exact=exact)


def _shards(tensors: Sequence[PlannedTensor], max_bytes: int | None) -> list[list[PlannedTensor]]:
    """Cut the tensors into runs of at most so many bytes."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if max_bytes is not None and shards[-1] and size + tensor.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def gguf_files(
    path: Path, tensors: Sequence[PlannedTensor], *, max_shard_bytes: int | None = None
) -> list[Path]:
    """Name the files that `write_gguf` writes."""
    count = len(_shards(tensors, max_shard_bytes))
    if count == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def gguf_bytes(
    architecture: str,
    tensors: Sequence[PlannedTensor],
    add_metadata: Callable[[Any], None],
    *,
    max_shard_bytes: int | None = None,
) -> int:
    """Size of the files that `write_gguf` would write; no tensor is read, nothing is written."""
    import gguf

    size = 0
    shards = _shards(tensors, max_shard_bytes)
    for number, shard in enumerate(shards):
        writer = gguf.GGUFWriter(None, architecture)
        _add_metadata(writer, shards, number, add_metadata)
        header = io.BytesIO()
        _write_header(writer, shard, header)
        size += _padded(writer, header.tell(), shard)
    return size


def _padded(writer: Any, header: int, tensors: Sequence[PlannedTensor]) -> int:
    """Size of a file."""
    parts = (header, *(tensor.bytes for tensor in tensors))
    return sum(int(writer.ggml_pad(part, writer.data_alignment)) for part in parts)


def _check_sizes(files: Sequence[Path], sizes: Sequence[int]) -> None:
    """Refuse a file that is shorter than what was written: a disk may say so too late for numpy."""
    for file, size in zip(files, sizes, strict=True):
        stored = file.stat().st_size
        if stored != size:
            raise OSError(errno.EIO, f"{stored} of {size} bytes were stored")


def _add_metadata(
    writer: Any,
    shards: Sequence[Sequence[PlannedTensor]],
    number: int,
    add_metadata: Callable[[Any], None],
) -> None:
    if number == 0:
        add_metadata(writer)
    if len(shards) > 1:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(shards))
        writer.add_int32("split.tensors.count", sum(map(len, shards)))


def _write_header(writer: Any, tensors: Sequence[PlannedTensor], stream: io.BytesIO | None = None) -> None:
    """Write all that comes before the first tensor's blocks, padding left out, to `stream` or the file."""
    import gguf

    for tensor in tensors:
        kind = gguf.GGMLQuantizationType(tensor.type.id)
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=kind)
    if stream is not None:
        writer.fout, writer.state = [stream], gguf.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _encode(tensor: PlannedTensor) -> tuple[Tensor, bool]:
    """Blocks of a tensor, uint8 ``[rows, row bytes]``, and whether they decode to exactly its values."""
    made = None if tensor.blocks is None else tensor.blocks()
    values = tensor.read()
    if tuple(values.shape) != tensor.shape:
        raise InputError(f"{tensor.source} must be {tensor.shape}: got {tuple(values.shape)}")
    if isinstance(values, QuantizedWeight):
        made = blocks_of(values, tensor.type)
        values = dequantize_groupwise(values)
    rows = values.reshape(-1, tensor.shape[-1])
    shape = (len(rows), tensor.row_bytes)
    if made is not None and (made.dtype != torch.uint8 or tuple(made.shape) != shape):
        raise InputError(
            f"the blocks of {tensor.source} must be uint8 {shape}: got {made.dtype} {tuple(made.shape)}"
        )
    blocks = torch.empty(shape, dtype=torch.uint8, device="cpu") if made is None else made
    exact = True
    for begin, end, importance in _chunks(tensor, len(rows)):
        chunk = rows[begin:end].float()
        if not bool(torch.isfinite(chunk).all()):
            raise InputError(f"{tensor.source} has NaN or Inf values; repair the checkpoint")
        part = blocks[begin:end]
        if made is None:
            try:
                part.copy_(gguf_encode(chunk, tensor.type.name, importance=importance))
            except InputError as error:
                raise InputError(f"{tensor.source}: {error}") from None
        # Where one chunk was rounded the others need no look.
        exact = exact and torch.equal(gguf_decode(part, tensor.type.name), chunk)
    return blocks, exact


def _chunks(tensor: PlannedTensor, rows: int) -> Iterator[tuple[int, int, Tensor | None]]:
    """Cut rows into runs to encode at a time, each with its importance; a stack has one a matrix."""
    importance = tensor.importance
    stacked = importance is not None and importance.dim() > 1
    height = tensor.shape[-2] if stacked else rows
    step = max(1, _CHUNK_BYTES // (4 * tensor.shape[-1]))
    for top in range(0, rows, max(1, height)):
        weights = importance[top // height] if importance is not None and stacked else importance
        for begin in range(top, top + height, step):
            yield begin, min(begin + step, top + height), weights
