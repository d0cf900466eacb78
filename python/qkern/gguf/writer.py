"""Writing a GGUF one tensor at a time; the file appears under its name only when it is complete."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from qkern._progress import track
from qkern.errors import InputError, OutputError, advice_on_writing, reason_of
from qkern.ops.gguf_encode import gguf_encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from qkern.ops.gguf_types import GGUFType

__all__ = ["PlannedTensor", "check_new_file", "write_gguf"]

# fp32 bytes that are converted at a time: bounds memory beside the tensor itself.
_CHUNK_BYTES: Final = 64 << 20


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
        Returns the tensor in any float dtype; called once, when its turn comes.
    importance : Tensor or None
        Weights of the columns for the encoder, ``[K]``, or ``[E, K]`` for a stack of matrices.
    blocks : callable or None
        Returns the blocks themselves, uint8 ``[rows, row bytes]``, where they are chosen elsewhere: `read` is
        not called then.
    """

    name: str
    source: str
    type: GGUFType
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    importance: Tensor | None = None
    blocks: Callable[[], Tensor] | None = None

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


def check_new_file(path: Path) -> None:
    """Refuse a path that no new file can have.

    Raises
    ------
    InputError
        If it exists, or its folder does not.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, for example --output {path / 'model.gguf'}")
    if path.exists():
        raise InputError(f"{path} exists: remove it or choose another --output")
    if path.parent.is_file():
        raise InputError(f"{path} cannot be made: {path.parent} is a file; choose another --output")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of the output file does not exist; make it first")


def write_gguf(
    path: Path, architecture: str, tensors: Sequence[PlannedTensor], add_metadata: Callable[[Any], None]
) -> None:
    """Write a file.

    Parameters
    ----------
    path : Path
        Must not exist.
    architecture : str
        llama.cpp's name of the architecture.
    tensors : sequence of PlannedTensor
        In the order of the file.
    add_metadata : callable
        Adds keys and values to a ``gguf.GGUFWriter``.

    Raises
    ------
    InputError
        If `path` exists, or a tensor has NaN or Inf values or another shape than planned.
    OutputError
        If the file cannot be written; nothing is left behind.
    """
    import gguf

    check_new_file(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, architecture)
    try:
        add_metadata(writer)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType(tensor.type.id)
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in track(tensors, "Writing GGUF", unit="tensor"):
            writer.write_tensor_data(_encode(tensor).numpy())
        writer.close()
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {reason_of(error)}; nothing was left there; {advice_on_writing(error)}"
        ) from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


def _encode(tensor: PlannedTensor) -> Tensor:
    """Blocks of a tensor, uint8 ``[rows, row bytes]``."""
    if tensor.blocks is not None:
        return tensor.blocks()
    values = tensor.read()
    if tuple(values.shape) != tensor.shape:
        raise InputError(f"{tensor.source} must be {tensor.shape}: got {tuple(values.shape)}")
    rows = values.reshape(-1, tensor.shape[-1])
    blocks = torch.empty(len(rows), tensor.row_bytes, dtype=torch.uint8, device="cpu")
    for begin, end, importance in _chunks(tensor, len(rows)):
        chunk = rows[begin:end].float()
        if not bool(torch.isfinite(chunk).all()):
            raise InputError(f"{tensor.source} has NaN or Inf values; repair the checkpoint")
        try:
            blocks[begin:end] = gguf_encode(chunk, tensor.type.name, importance=importance)
        except InputError as error:
            raise InputError(f"{tensor.source}: {error}") from None
    return blocks


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
