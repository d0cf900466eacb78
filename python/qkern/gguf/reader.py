"""Reading a GGUF: metadata, tensors, and a state dict in transformers' names. Trusts nothing in the file.

Every count, length and offset is checked against the file's size before anything is read or allocated, so a
hostile file costs a FormatError and no more memory than a few times its own size.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.gguf.architectures import ARCHITECTURES, GGUFArchitecture
from qkern.gguf.cursor import Cursor
from qkern.gguf.tensors import GGUFTensor
from qkern.ops.gguf_types import GGUFType, gguf_type_by_id

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["GGUFFile", "TensorInfo", "gguf_parts"]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MAX_DIMENSIONS: Final = 4
_DEFAULT_ALIGNMENT: Final = 32
# Far beyond any model: what Python keeps of an entry is a multiple of its bytes in the file.
_MAX_ENTRIES: Final = 1 << 16
_MAX_TENSORS: Final = 1 << 17
_MAX_LAYERS: Final = 1024
_SHARD: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies in the file.

    Parameters
    ----------
    name : str
        llama.cpp's name.
    type_id : int
        Number of its type; it may be one that qkern does not decode.
    shape : tuple of int
        As torch has it.
    offset : int
        First byte, from the start of the file.
    part : int
        Which file of a split model, from 0.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int
    part: int = 0

    @property
    def type(self) -> GGUFType:
        """Its type; UnsupportedError if qkern does not decode it."""
        return gguf_type_by_id(self.type_id)

    @property
    def bytes(self) -> int:
        """Its size in the file, padding left out; of types too that qkern does not decode."""
        return _tensor_bytes(self.name, self.shape, self.type_id)


class GGUFFile(Mapping[str, GGUFTensor]):
    """The tensors of a GGUF by llama.cpp's names, read when they are asked for; a context manager.

    Parameters
    ----------
    path : str or Path
        The file; of a split model (``name-00001-of-00003.gguf``) any part, and all of them are read.

    Raises
    ------
    InputError
        If there is no such file.
    FormatError
        If it is truncated, hostile or no GGUF, or a part is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"no GGUF file at {self.path}; name an existing .gguf file")
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._data: list[Any] = []
        parts = gguf_parts(self.path)
        self._count = len(parts)
        for part in parts:
            try:
                self._read(part)
            except FormatError as error:
                raise FormatError(
                    f"{part} is not a readable GGUF: {error}; fetch or export it again"
                ) from None
        count = self.metadata.get("split.tensors.count", len(self.tensors))
        if count != len(self.tensors):
            raise FormatError(
                f"{self.path}: the parts have {len(self.tensors)} tensors, but split.tensors.count is "
                f"{count!r:.20}; fetch them again"
            )

    def _read(self, path: Path) -> None:
        size = path.stat().st_size
        # An empty file cannot be mapped.
        data: Any = np.memmap(path, mode="r") if size else np.empty(0, np.uint8)
        self._data.append(data)
        self._parse(Cursor(memoryview(data)))

    def _parse(self, cursor: Cursor) -> None:
        if bytes(cursor.take(4)) != _MAGIC:
            raise FormatError("it does not begin with GGUF")
        version = cursor.number("<I")
        if version not in _VERSIONS:
            raise FormatError(f"version {version}, allowed are {_VERSIONS}")
        tensors = _at_most(_MAX_TENSORS, cursor.count(24, "tensors"), "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(_at_most(_MAX_ENTRIES, cursor.count(13, "metadata entries"), "metadata entries")):
            key = cursor.name()
            if key in metadata:
                raise FormatError(f"metadata key {key!r} twice")
            metadata[key] = cursor.value(cursor.number("<I"))
        self._check_part(metadata)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise FormatError(f"alignment {alignment!r:.20} is no power of two")
        found = [self._tensor(cursor) for _ in range(tensors)]
        start = -(-cursor.at // alignment) * alignment
        self._place(found, start, alignment, len(cursor.data))

    def _check_part(self, metadata: dict[str, Any]) -> None:
        """Compare what a part says of itself with its name, and take the first one's metadata."""
        number, count = metadata.get("split.no", 0), metadata.get("split.count", 0)
        named = (len(self._data) - 1, self._count)
        if (number, count) != named and not (self._count == 1 and (number, count) == (0, 0)):
            raise FormatError(
                f"by its metadata it is part {number!r:.20} of {count!r:.20} (from 0), by its name part "
                f"{named[0]} of {named[1]}; keep the names NAME-00001-of-00002.gguf of a split model"
            )
        if len(self._data) == 1:
            self.metadata = metadata

    @staticmethod
    def _tensor(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.name()
        dimensions = cursor.number("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise FormatError(
                f"tensor {name!r} has {dimensions} dimensions, allowed are 1 to {_MAX_DIMENSIONS}"
            )
        shape = tuple(int(cursor.number("<Q")) for _ in range(dimensions))
        if 0 in shape or math.prod(shape) >= 2**63:
            raise FormatError(f"tensor {name!r} has the shape {shape}")
        return name, shape[::-1], int(cursor.number("<I")), int(cursor.number("<Q"))

    def _place(
        self, found: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int
    ) -> None:
        """Check that the tensors lie within the file and do not overlap, and enter them."""
        part = len(self._data) - 1
        ends: list[tuple[int, int, str]] = []
        for name, shape, type_id, offset in found:
            if name in self.tensors:
                raise FormatError(f"tensor {name!r} twice")
            if offset % alignment:
                raise FormatError(f"tensor {name!r} is not aligned to {alignment} bytes")
            begin = start + offset
            end = begin + _tensor_bytes(name, shape, type_id)
            if end > size:
                raise FormatError(f"truncated: tensor {name!r} ends at byte {end} of {size}")
            ends.append((begin, end, name))
            self.tensors[name] = TensorInfo(name=name, type_id=type_id, shape=shape, offset=begin, part=part)
        ends.sort()
        for (_, end, first), (begin, _, second) in itertools.pairwise(ends):
            if begin < end:
                raise FormatError(f"tensors {first!r} and {second!r} overlap")

    def __getitem__(self, name: str) -> GGUFTensor:
        info = self.tensors[name]
        kind = info.type
        count = math.prod(info.shape[:-1]) * kind.row_bytes(info.shape[-1])
        raw = np.array(self._data[info.part][info.offset : info.offset + count])
        return GGUFTensor(raw=torch.from_numpy(raw), type=kind.name, shape=info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def architecture(self) -> GGUFArchitecture:
        """The architecture; a Mistral file calls itself llama, which is what it computes.

        Raises
        ------
        UnsupportedError
            If it is not one that qkern reads.
        """
        name = self.metadata.get("general.architecture")
        has_experts = f"{name}.expert_count" in self.metadata
        for architecture in ARCHITECTURES.values():
            if architecture.name == name and architecture.has_experts == has_experts:
                return architecture
        known = sorted({architecture.name for architecture in ARCHITECTURES.values()})
        raise UnsupportedError(f"{self.path} has architecture {name!r}: read are {', '.join(known)}")

    @property
    def layers(self) -> int:
        """Number of layers.

        Raises
        ------
        FormatError
            If it is missing, or more than the tensors can be or any model has.
        """
        layers = self._integer("block_count")
        if layers > len(self.tensors):
            raise FormatError(f"{self.path}: {layers} layers, but only {len(self.tensors)} tensors")
        if layers > _MAX_LAYERS:
            raise FormatError(f"{self.path}: {layers} layers, allowed are {_MAX_LAYERS}")
        return layers

    def _integer(self, key: str, default: int | None = None) -> int:
        name = f"{self.metadata['general.architecture']}.{key}"
        value = self.metadata.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise FormatError(f"{self.path}: {name} must be a positive number: got {value!r:.60}")
        return value

    def state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight in fp32 under transformers' name, one at a time.

        Raises
        ------
        UnsupportedError
            If the architecture or a tensor's type is not read.
        FormatError
            If the tensors are not those of the architecture.
        """
        architecture = self.architecture
        heads = self._integer("attention.head_count")
        layers = self.layers
        hidden = self._integer("embedding_length")
        config = {
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            # Files of models without grouped queries may leave it out.
            "num_key_value_heads": self._integer("attention.head_count_kv", default=heads),
            "hidden_size": hidden,
            "intermediate_size": self._integer("feed_forward_length"),
            "vocab_size": 1,
            "head_dim": self._integer("attention.key_length", default=hidden // heads),
            "attention_bias": True,
            "mlp_bias": True,
            "qkv_bias": True,
        }
        names = {file_name: name for name, file_name in architecture.names(config).items()}
        for file_name in self.tensors:
            if file_name.startswith("rope_"):  # follows from the configuration
                continue
            if file_name not in names:
                raise FormatError(
                    f"{self.path}: tensor {file_name!r} is no part of a {architecture.name} model"
                )
            name = names[file_name]
            weight = self[file_name].decode()
            try:
                weight = architecture.from_file_order(name, weight, config)
            except RuntimeError as error:
                raise FormatError(f"{self.path}: {file_name} {tuple(weight.shape)}: {error}") from None
            pieces = architecture.pieces(name, len(weight))
            yield from zip(pieces, [weight] if pieces == [name] else weight, strict=True)

    def close(self) -> None:
        """Drop the mapping; tensors that were read stay valid."""
        self._data = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def gguf_parts(path: Path) -> list[Path]:
    """All files of the model that `path` is, or is a part of.

    Raises
    ------
    FormatError
        If a part is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    stem, count = match[1], int(match[3])
    parts = []
    for number in range(1, count + 1):
        part = path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf")
        if not part.is_file():
            raise FormatError(f"{path} is one of {count} parts, and {part.name} is missing; fetch it")
        parts.append(part)
    return parts or [path]


def _at_most(limit: int, count: int, what: str) -> int:
    if count > limit:
        raise FormatError(f"{count} {what}, allowed are {limit}")
    return count


def _tensor_bytes(name: str, shape: tuple[int, ...], type_id: int) -> int:
    """Bytes of a tensor, of every type that the gguf package knows."""
    import gguf

    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)]
    except ValueError:
        raise FormatError(f"tensor {name!r} has the unknown type {type_id}") from None
    if shape[-1] % block:
        raise FormatError(f"tensor {name!r} has rows of {shape[-1]}, which blocks of {block} do not divide")
    return math.prod(shape) // int(block) * int(size)
