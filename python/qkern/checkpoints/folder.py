"""A model folder: finding it, its JSON files, and its safetensors read lazily.

Everything in it may be truncated or hostile; what does not fit raises a FormatError that names the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open

from qkern.errors import FormatError, InputError, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = [
    "DTYPE_NAMES",
    "INDEX_NAME",
    "SINGLE_NAME",
    "TensorFolder",
    "model_folder",
    "open_safetensors",
    "read_json",
]

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
DTYPE_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Never weights in other formats, never code.
_HUB_FILES: Final = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def model_folder(path: str | Path, *, fetch: bool = True) -> Path:
    """Return the folder of a model: `path` itself, or the local copy of the hub model it names.

    Parameters
    ----------
    path : str or Path
        Folder or hub id.
    fetch : bool
        Fetch a hub model that is not on this disk.

    Raises
    ------
    InputError
        If there is no such folder and no such hub model.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{folder} is a file: a folder with config.json and safetensors is needed")
    # "owner/name" is a hub id, unless "owner" is a folder here: then a folder name was mistyped.
    if not _HUB_ID.fullmatch(str(path)) or folder.parent.is_dir():
        raise InputError(f"model folder {folder} does not exist; check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(_HUB_FILES), local_files_only=not fetch))
    except (OSError, ValueError, RuntimeError) as error:
        if not fetch:
            raise InputError(
                f"{path} is no folder here, and no hub model that is on this disk: fetch it first, "
                f"hf download {path}"
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is no folder here, and the hub does not give it: {first}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    FormatError
        If the file is missing, unreadable, or no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (file.parent / "adapter_config.json").is_file():
            raise FormatError(
                f"{file} is missing: the folder is an adapter of PEFT, no model; load the model that it was "
                "trained on, and then peft.PeftModel.from_pretrained(model, folder)"
            ) from None
        raise FormatError(f"{file} is missing: the model folder is incomplete") from None
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {reason_of(error)}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise FormatError(f"{file} must hold a JSON object: got {type(content).__name__}")
    return content


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file: a handle with ``keys``, ``get_tensor`` and ``get_slice``.

    Raises
    ------
    FormatError
        If it is missing, truncated or of another kind.
    """
    try:
        return safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise FormatError(f"{file} is missing: the index lists it; fetch it again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error


class TensorFolder(Mapping[str, "Tensor"]):
    """Tensors of a folder's safetensors by name; each is read when it is asked for.

    Parameters
    ----------
    folder : Path
        With ``model.safetensors``, or shards and their index.

    Raises
    ------
    FormatError
        If a file is missing, truncated or contradicts the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = folder / INDEX_NAME
        # As transformers: what a folder has beside the one file, such as an older index, does not count.
        sharded = index.exists() and not (folder / SINGLE_NAME).exists()
        for name in self._files_of_index(index) if sharded else [self._single()]:
            for tensor in self._handle(name).keys():  # noqa: SIM118 - a safetensors handle is no mapping
                if tensor in self._file_of:
                    raise FormatError(
                        f"{folder}: tensor {tensor} is in {self._file_of[tensor]} and in {name}"
                    )
                self._file_of[tensor] = name
        if sharded:
            self._check_index(index)

    def _single(self) -> str:
        if (self.folder / SINGLE_NAME).exists():
            return SINGLE_NAME
        others = sorted(file.name for file in self.folder.glob("*.safetensors"))
        if len(others) == 1:
            return others[0]
        if others:
            raise FormatError(
                f"{self.folder} has {len(others)} safetensors files and no {INDEX_NAME}, which says which of "
                "them are the model's: fetch it again"
            )
        hint = "; convert its pytorch_model.bin first" if any(self.folder.glob("*.bin")) else ""
        raise FormatError(
            f"{self.folder} has no safetensors file: {SINGLE_NAME} or {INDEX_NAME} is needed{hint}"
        )

    @staticmethod
    def _weight_map(index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise FormatError(f"{index} must map tensor names to file names under 'weight_map'")
        return weight_map

    def _files_of_index(self, index: Path) -> list[str]:
        names = sorted(set(self._weight_map(index).values()))
        for name in names:
            # A name with a folder in it could point anywhere on this machine.
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise FormatError(f"{index} names {name!r}: a safetensors file of the same folder is needed")
        return names

    def _check_index(self, index: Path) -> None:
        listed = self._weight_map(index)
        absent = sorted(name for name, file in listed.items() if self._file_of.get(name) != file)
        extra = sorted(set(self._file_of) - set(listed))
        if absent or extra:
            raise FormatError(
                f"{index} and the shards disagree: missing are {_few(absent)}, left over are {_few(extra)}"
            )

    def _handle(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = open_safetensors(self.folder / name)
        return self._open[name]

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        try:
            tensor: Tensor = self._handle(file).get_tensor(name)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise FormatError(f"{self.folder / file}: tensor {name} cannot be read ({error})") from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def file_of(self, name: str) -> Path:
        """File that holds the tensor `name`."""
        return self.folder / self._file_of[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header alone."""
        return tuple(self._handle(self._file_of[name]).get_slice(name).get_shape())

    def header(self, name: str) -> Tensor:
        """Return a tensor on the meta device: its shape and dtype, read from the header alone.

        Raises
        ------
        FormatError
            If it is of a dtype that is not read.
        """
        kind = self._handle(self._file_of[name]).get_slice(name).get_dtype()
        dtype = next((dtype for dtype, spelling in DTYPE_NAMES.items() if spelling == kind), None)
        if dtype is None:
            raise FormatError(f"{self.file_of(name)}: tensor {name} is of dtype {kind}, which is not read")
        return torch.empty(self.shape(name), dtype=dtype, device="meta")

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        self._open.clear()


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
