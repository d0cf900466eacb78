"""Reading a checkpoint: its quantized layers in the neutral form, all other tensors as they are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qkern.checkpoints.folder import TensorFolder, model_folder, read_json
from qkern.checkpoints.registry import detect
from qkern.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from qkern.checkpoints.base import Entry, Format
    from qkern.schemes import QuantizedWeight

__all__ = ["QuantizedCheckpoint", "decode_layer", "read_quantized"]


class QuantizedCheckpoint(Mapping[str, "QuantizedWeight | Tensor"]):
    """A checkpoint's contents by name, read lazily.

    A quantized layer appears once, under the layer's own name (``model.layers.0.mlp.up_proj``), as a
    `QuantizedWeight`; every other tensor under its name, a layer's bias among them. Iteration follows the
    order of the files. A context manager.

    Parameters
    ----------
    path : str or Path
        Folder or hub id.

    Raises
    ------
    InputError
        If there is no such folder.
    FormatError
        If it is incomplete, damaged or of a format that qkern does not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = model_folder(path)
        self.config = read_json(self.folder / "config.json")
        self._add_legacy_config()
        with self._reading_config():
            detected = detect(self.config)
        self.format: Format | None = None
        self.quantization: Mapping[str, Any] = {}
        if detected is not None:
            self.format, self.quantization = detected
        self.tensors = TensorFolder(self.folder)
        self.entries: dict[str, Entry] = {}
        self._names: list[str] = []
        self._list_layers()

    def _add_legacy_config(self) -> None:
        """Take the configuration from its own file, where older writers put it alone."""
        if self.config.get("quantization_config") is not None:
            return
        for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
            if (self.folder / file).exists():
                self.config["quantization_config"] = {"quant_method": method, **read_json(self.folder / file)}
                return

    def _list_layers(self) -> None:
        fmt = self.format
        if fmt is None:
            self._names = list(self.tensors)
            return
        suffix = f".{fmt.marker}"
        layers = [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]
        if not layers:
            raise FormatError(
                f"{self.folder}: config.json says {fmt.name}, but no tensor name ends in {suffix}; "
                "remove quantization_config if the weights are 16-bit"
            )
        with self._reading_config():
            entry_of = fmt.entry_of(self.quantization)
            self.entries = {layer: entry_of(layer) for layer in layers}
        codes = {f"{layer}.weight" for layer, entry in self.entries.items() if entry.in_place}
        strays = []
        for name in self.tensors:
            part = next((part for part in fmt.parts if name.endswith(f".{part}")), None)
            layer = name.removesuffix(f".{part}")
            if name in codes:
                continue
            if part is None:
                self._names.append(name)
            elif layer not in self.entries:
                strays.append(name)
            elif part == fmt.marker:
                self._names.append(layer)
        if strays:
            raise FormatError(f"{self.folder}: {', '.join(strays[:8])} belong to layers without {fmt.marker}")
        plain = set(self._names)
        doubled = [layer for layer in layers if f"{layer}.weight" in plain]
        if doubled:
            raise FormatError(
                f"{self.folder}: {', '.join(sorted(doubled)[:8])} are there both quantized and plain"
            )

    @contextmanager
    def _reading_config(self) -> Iterator[None]:
        """Let errors name the file."""
        try:
            yield
        except FormatError as error:
            raise FormatError(f"{self.folder / 'config.json'}: {error}") from None

    def weight(self, name: str) -> QuantizedWeight:
        """Read a quantized layer.

        Raises
        ------
        FormatError
            If its tensors are missing, contradict each other, or hold NaN or Inf scales.
        """
        assert self.format is not None
        file = self.tensors.file_of(f"{name}.{self.format.marker}")
        try:
            return decode_layer(self.format, name, self.tensors, self.entries[name])
        except FormatError as error:
            raise FormatError(f"{file}: {error}") from None

    def __getitem__(self, name: str) -> QuantizedWeight | Tensor:
        return self.weight(name) if name in self.entries else self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def plain(self) -> list[str]:
        """Names of the tensors that are no part of a quantized weight."""
        return [name for name in self._names if name not in self.entries]

    def close(self) -> None:
        """Close the files; what was read stays valid."""
        self.tensors.close()

    def __enter__(self) -> QuantizedCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def decode_layer(fmt: Format, name: str, tensors: Mapping[str, Tensor], entry: Entry) -> QuantizedWeight:
    """Decode one layer of a file, as `Format.decode`, and look at its scales.

    Raises
    ------
    FormatError
        If tensors are missing, contradict each other, or hold NaN or Inf scales.
    """
    qw = fmt.decode(name, tensors, entry)
    if not bool(torch.isfinite(qw.scales).all()):
        raise FormatError(f"the scales of {name} have NaN or Inf values; the file is damaged")
    return qw


def read_quantized(path: str | Path) -> QuantizedCheckpoint:
    """Open a checkpoint in any format of `FORMATS`.

    Raises
    ------
    InputError
        If there is no such folder.
    FormatError
        If it is damaged or of a format that qkern does not read.
    UnsupportedError
        If it is not quantized.
    """
    checkpoint = QuantizedCheckpoint(path)
    if checkpoint.format is None:
        checkpoint.close()
        raise UnsupportedError(
            f"{checkpoint.folder} is not quantized: config.json has no quantization_config; "
            "quantize it with qkern.quantize (qkern quantize)"
        )
    return checkpoint
