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
from qkern.gguf.quantized import blocks_of
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode
from qkern.schemes import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from qkern.ops.gguf_types import GGUFType

__all__ = ["PlannedTensor", "Written", "write_gguf"]

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
        Returns the tensor, in any float dtype or quantized; called once, when its turn comes.
    importance : Tensor or None
        ``[K]`` weights for the encoder.
    """

    name: str
    source: str
    type: GGUFType
    shape: tuple[int, ...]
    read: Callable[[], Tensor | QuantizedWeight]
    importance: Tensor | None = None

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
    path: Path, architecture: str, tensors: Sequence[PlannedTensor], add_metadata: Callable[[Any], None]
) -> Written:
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

    Returns
    -------
    Written
        The file, and which tensors are exact.

    Raises
    ------
    InputError
        If `path` exists, or a tensor has NaN or Inf values or another shape than planned.
    OutputError
        If the file cannot be written; nothing is left behind.
    """
    import gguf

    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, for example --output {path / 'model.gguf'}")
    if path.exists():
        raise InputError(f"{path} exists: remove it or choose another --output")
    if path.parent.is_file():
        raise InputError(f"{path} cannot be made: {path.parent} is a file; choose another --output")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} of the output file does not exist; make it first")
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
        exact = {}
        for tensor in track(tensors, "Writing GGUF", unit="tensor"):
            blocks, exact[tensor.name] = _encode(tensor)
            writer.write_tensor_data(blocks.numpy())
        writer.close()
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {reason_of(error)}; nothing was left there; {advice_on_writing(error)}"
        ) from error
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return Written(files=[path], exact=exact)


def _encode(tensor: PlannedTensor) -> tuple[Tensor, bool]:
    """Blocks of a tensor, uint8 ``[rows, row bytes]``, and whether they decode to exactly its values."""
    values = tensor.read()
    if tuple(values.shape) != tensor.shape:
        raise InputError(f"{tensor.source} must be {tensor.shape}: got {tuple(values.shape)}")
    made: Tensor | None = None
    if isinstance(values, QuantizedWeight):
        made = blocks_of(values, tensor.type)
        values = dequantize_groupwise(values)
    rows = values.reshape(-1, tensor.shape[-1])
    blocks = (
        torch.empty(len(rows), tensor.row_bytes, dtype=torch.uint8, device="cpu") if made is None else made
    )
    exact = True
    step = max(1, _CHUNK_BYTES // (4 * tensor.shape[-1]))
    for begin in range(0, len(rows), step):
        chunk = rows[begin : begin + step].float()
        if not bool(torch.isfinite(chunk).all()):
            raise InputError(f"{tensor.source} has NaN or Inf values; repair the checkpoint")
        part = blocks[begin : begin + step]
        if made is None:
            try:
                part.copy_(gguf_encode(chunk, tensor.type.name, importance=tensor.importance))
            except InputError as error:
                raise InputError(f"{tensor.source}: {error}") from None
        # Where one chunk was rounded the others need no look.
        exact = exact and torch.equal(gguf_decode(part, tensor.type.name), chunk)
    return blocks, exact
