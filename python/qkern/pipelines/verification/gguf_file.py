"""A GGUF under verification, read with the gguf package alone: its reader, and its own dequantizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from qkern.calibration import meta_model
from qkern.errors import FormatError, QkernError, UnsupportedError, reason_of
from qkern.gguf import GGUFFile, read_tokenizer
from qkern.gguf.checkpoint import GGUFCheckpoint
from qkern.gguf.reader import gguf_parts
from qkern.ops.gguf_types import GGUF_TYPES, gguf_type
from qkern.pipelines.export_gguf import planned_export
from qkern.pipelines.history import GGUF_KEY, parse_grids
from qkern.pipelines.verification.original import Matrix

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from qkern.gguf import PlannedTensor
    from qkern.pipelines.history import Grid
    from qkern.pipelines.verification.report import Findings

__all__ = ["GGUFSubject", "original_tensors"]

_FLOATS: Final = ("f32", "f16", "bf16", "f64")
_READ: Final = {*GGUF_TYPES, *_FLOATS}


class GGUFSubject:
    """A GGUF file, or all parts of a split one.

    Parameters
    ----------
    path : str or Path
        The file, or one of its parts.
    findings : Findings
        Takes what is wrong with files, configuration, tensors and values.

    Attributes
    ----------
    format : str
        ``"gguf"``.
    runtime : str
        The runtime that it is for where none is named.
    choices : dict of str to str
        Type of every quantized matrix, by llama.cpp's name.
    model : PreTrainedModel or None
        The model without weights; None if `qkern.load` does not read it.
    tokenizer : PreTrainedTokenizer or None
        None if it is not read here.
    why_not_loaded : str or None
        Why `qkern.load` does not read such a model, if it does not.

    Raises
    ------
    InputError
        If there is no such file.
    UnsupportedError
        If tensors are of types that are not read here.
    """

    format = "gguf"
    runtime = "gguf"

    def __init__(self, path: Path, findings: Findings) -> None:
        self._findings = findings
        self._tensors: dict[str, Any] = {}
        self._grids: dict[str, tuple[Grid, ...]] = {}
        self.config: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.model: Any = None
        self.tokenizer: Any = None
        self.why_not_loaded: str | None = None
        self._architecture: Any = None
        try:
            GGUFFile(path).close()  # says which bytes are wrong, where the package's reader fails on them
            for part in gguf_parts(path):
                self._open(part)
        except FormatError as error:
            findings.add("files", str(error))
            return
        self._refuse_types()
        self._match_tensors(path)
        self._check_values()
        self._read_tokenizer(path)

    def _open(self, part: Path) -> None:
        import gguf

        try:
            reader = gguf.GGUFReader(part)
        except Exception as error:  # it has none of its own
            self._findings.add("files", f"{part.name} is not read by the gguf package: {reason_of(error)}")
            return
        self._tensors |= {tensor.name: tensor for tensor in reader.tensors}
        if GGUF_KEY in reader.fields:
            try:
                self._grids = parse_grids(reader.fields[GGUF_KEY].contents(), GGUF_KEY)
            except FormatError as error:
                self._findings.add("config", str(error))
        self._findings.count("files")

    def _refuse_types(self) -> None:
        others = {name: kind for name in self._tensors if (kind := self._kind(name)) not in _READ}
        if others:
            name, kind = next(iter(others.items()))
            raise UnsupportedError(
                f"verify does not read {len(others)} tensors of the GGUF types "
                f"{', '.join(sorted(set(others.values())))} (first: {name}, {kind}): it reads "
                f"{', '.join(sorted(_READ))}; nothing was checked"
            )

    def _match_tensors(self, path: Path) -> None:
        """Compare tensors with those of the architecture; `qkern.load`'s reader knows which these are."""
        self._findings.count("tensors", len(self._tensors))
        try:
            with GGUFCheckpoint(path) as checkpoint:
                self.config = checkpoint.config
                self._architecture = checkpoint.file.architecture
                self.names = self._architecture.names(self.config)
                self.model = meta_model(checkpoint.transformers_config())
        except UnsupportedError as error:
            self.why_not_loaded = str(error)
        except QkernError as error:
            self._findings.add("tensors", str(error))

    def _read_tokenizer(self, path: Path) -> None:
        try:
            self.tokenizer = read_tokenizer(path)
        except UnsupportedError as error:
            self._findings.note("config", str(error))
        except FormatError as error:
            self._findings.add("config", str(error))

    def _check_values(self) -> None:
        for name in self._tensors:
            values = self._decoded(name)
            if values is None:
                continue
            broken = int((~values.isfinite()).sum())
            if broken:
                self._findings.add("values", f"{name} has {broken} NaN or Inf values")
            elif values.dim() > 1 and bool((values == 0).all()):
                self._findings.add("values", f"{name} is zero throughout")
            self._findings.count("values")

    def _decoded(self, name: str) -> Tensor | None:
        """Weights fp32 by the package's own dequantizer; None for a type that it has none for."""
        import gguf

        tensor = self._tensors[name]
        shape = tuple(int(size) for size in reversed(tensor.shape))
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:  # what the package raises for such types
            self._findings.add("values", f"{name} cannot be read: {reason_of(error)}")
            return None
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)

    def _kind(self, name: str) -> str:
        return str(self._tensors[name].tensor_type.name).lower()

    @property
    def choices(self) -> dict[str, str]:
        """Type of every quantized matrix of a type that qkern knows."""
        kinds = {name: self._kind(name) for name in self._tensors}
        return {name: kind for name, kind in kinds.items() if kind in GGUF_TYPES and kind not in _FLOATS}

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a matrix, experts one below the other."""
        columns, *rows = (int(size) for size in self._tensors[name].shape)
        return int(np.prod(rows)), columns

    @property
    def matrices(self) -> Iterator[str]:
        """llama.cpp's names of the quantized matrices, and of those that were quantized before."""
        choices = self.choices
        return (
            name
            for name, tensor in self._tensors.items()
            if name in choices or (self._passed(name) and len(tensor.shape) > 1)
        )

    def matrix(self, name: str) -> Matrix:
        """Decode a matrix."""
        values = self._decoded(name)
        assert values is not None
        rows = values.flatten(0, -2)  # experts one below the other
        return Matrix.on(rows, gguf_type(self._kind(name)), self._passed(name))

    def _passed(self, name: str) -> tuple[Grid, ...] | None:
        return self._grids.get(name.removesuffix(".weight"))

    def in_model(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor that `qkern.load` reads, by transformers' name, rows in the model's order."""
        for name, file_name in self.names.items():
            values = self._decoded(file_name) if file_name in self._tensors else None
            if values is not None:
                yield name, self._architecture.from_file_order(name, values, self.config)

    @property
    def plain(self) -> Mapping[str, Tensor]:
        """Tensors that are not quantized, by llama.cpp's name, in the dtype that they are stored in."""
        dtypes = {"f16": torch.float16, "bf16": torch.bfloat16}
        matrices = set(self.matrices)
        found = {name: self._decoded(name) for name in self._tensors if name not in matrices}
        return {
            name: value.to(dtypes.get(self._kind(name), torch.float32))
            for name, value in found.items()
            if value is not None
        }


def original_tensors(against: str | Path) -> dict[str, PlannedTensor]:
    """Tensors of the original as an export would write them, by llama.cpp's name; values are read on demand.

    Raises
    ------
    QkernError
        If the original is not there, or cannot be exported.
    """
    planned, *_ = planned_export(against, "f32")
    return {tensor.name: tensor for tensor in planned}
