"""Writing sharded safetensors one tensor at a time, so that no shard has to fit in memory.

A safetensors file starts with its table of contents, which is known only when the shard is full. Data
goes to a spool file first; when the shard closes, the header is written and the data copied behind it,
tensors with wide elements first, so that every tensor is aligned to its element.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Final

import torch

from qkern.checkpoints.folder import DTYPE_NAMES, INDEX_NAME, SINGLE_NAME
from qkern.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["ShardWriter", "parse_size"]

_UNITS: Final = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_COPY_BYTES: Final = 8 << 20


def parse_size(size: int | str) -> int:
    """Bytes of ``5000000``, ``"5GB"`` (decimal) or ``"5GiB"`` (binary).

    Raises
    ------
    InputError
        If it is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    count = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if count < 1:
        raise InputError(f"max_shard_size must be a size such as '5GB' or '500MB': got {size!r}")
    return int(count)


class ShardWriter:
    """Safetensors shards of a folder, and their index.

    Parameters
    ----------
    folder : Path
        Where the files go; must exist.
    max_bytes : int
        Data bytes of a shard; a larger single tensor gets its own.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._shard_of: dict[str, int] = {}
        self._shards = 0
        self._total_bytes = 0
        self._spool: IO[bytes] | None = None
        self._entries: list[tuple[str, Tensor, int]] = []  # name, meta tensor, offset in the spool
        self._used = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; it may be freed afterwards.

        Raises
        ------
        InputError
            If the name was used or safetensors has no such dtype.
        OSError
            If the disk is full.
        """
        if name in self._shard_of:
            raise InputError(f"tensor {name} was written twice")
        if tensor.dtype not in DTYPE_NAMES:
            raise InputError(f"tensor {name}: safetensors has no {tensor.dtype}")
        if self._spool is not None and self._used + tensor.nbytes > self._max_bytes:
            self._close_shard()
        if self._spool is None:
            self._spool = (self._folder / f"spool-{self._shards}").open("w+b")
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            self._spool.write(flat.view(torch.uint8).numpy().data)
        self._entries.append((name, tensor.detach().to("meta"), self._used))
        self._shard_of[name] = self._shards
        self._used += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def _close_shard(self) -> None:
        if self._spool is None:
            return
        order = sorted(self._entries, key=lambda entry: (-entry[1].element_size(), entry[0]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, meta, _ in order:
            header[name] = {
                "dtype": DTYPE_NAMES[meta.dtype],
                "shape": list(meta.shape),
                "data_offsets": [offset, offset + meta.nbytes],
            }
            offset += meta.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (self._folder / f"shard-{self._shards}").open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _, meta, start in order:
                self._copy(out, start, meta.nbytes)
        spool = self._spool
        spool.close()
        (self._folder / f"spool-{self._shards}").unlink()
        self._spool, self._entries, self._used = None, [], 0
        self._shards += 1

    def _copy(self, out: IO[bytes], start: int, count: int) -> None:
        assert self._spool is not None
        self._spool.seek(start)
        while count:
            chunk = self._spool.read(min(count, _COPY_BYTES))
            if not chunk:
                raise OSError(f"spool of shard {self._shards} ended early")
            out.write(chunk)
            count -= len(chunk)

    def close(self) -> None:
        """Write the last shard, give the files their names, write the index when there are several."""
        if self._spool is None and self._shards == 0:
            raise InputError("a checkpoint without tensors cannot be written")
        self._close_shard()
        if self._shards == 1:
            (self._folder / "shard-0").rename(self._folder / SINGLE_NAME)
            return
        names = [
            f"model-{number + 1:05d}-of-{self._shards:05d}.safetensors" for number in range(self._shards)
        ]
        for number, name in enumerate(names):
            (self._folder / f"shard-{number}").rename(self._folder / name)
        index = {
            "metadata": {"total_size": self._total_bytes},
            "weight_map": {name: names[shard] for name, shard in self._shard_of.items()},
        }
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def abandon(self) -> None:
        """Close the spool; the folder's owner removes the files."""
        if self._spool is not None:
            with suppress(OSError):  # closing flushes, which fails again on a full disk
                self._spool.close()
            self._spool = None
