"""Finished layers on disk, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qkern.checkpoints import read_json
from qkern.errors import FormatError, InputError, OutputError, QkernError, advice_on_writing, reason_of
from qkern.nn.state import FORM, form_of, weight_of
from qkern.pipelines.layerwise import Finished, LayerRecord
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

__all__ = ["Partial", "partial_folder"]

logger = logging.getLogger(__name__)

_KEY_FILE: Final = "run.json"
_LOCK_FILE: Final = ".lock"
# Hashes say nothing to a reader.
_HASHES: Final = {
    "weights": "of a model with other weights",
    "config": "of a model with another config.json",
    "sha256": "with other calibration tokens",
}

# What reading a file that something else wrote to may end in.
_DAMAGE: Final = (
    OSError,
    SafetensorError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def partial_folder(output: Path) -> Path:
    """Where the finished layers of a run with this output are: ``<output>.partial``."""
    return output.with_name(f"{output.name}.partial")


class Partial:
    """A folder with one file for each finished layer; a context manager.

    Inside the block no other run can use the folder: a lock is held that the system takes back when the
    process ends, however it ends.

    Parameters
    ----------
    folder : Path
        The folder, which need not be there.
    key : mapping
        Everything that the layers depend on; layers of a run with another key are not used.
    resume : bool
        Use what is there. False removes it.
    contents : str
        What its files are, in messages.
    elsewhere : str
        What to choose another of, to use another folder.

    Raises
    ------
    InputError
        If another run holds the folder, or it belongs to a run with another key, or to nobody that qkern
        knows.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        *,
        resume: bool = True,
        contents: str = "finished layers",
        elsewhere: str = "output",
    ) -> None:
        self.folder = folder
        self.contents = contents
        self.elsewhere = elsewhere
        self._refuse_strangers()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK_FILE).open("ab")
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            self._take_lock()
            if not resume:
                self._empty()
            self._take_key(dict(key))
        except BaseException:
            self._lock.close()
            raise

    def _empty(self) -> None:
        try:
            for file in self.folder.iterdir():
                if file.name != _LOCK_FILE:
                    file.unlink()
        except OSError as error:  # such as a folder, which no run makes
            raise InputError(
                f"cannot empty {self.folder}: {error.filename}: {reason_of(error)}; remove it yourself"
            ) from error

    def _take_lock(self) -> None:
        """Hold the folder until the file is closed."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): start no second run to it", self.folder, reason_of(error)
            )
            return
        else:
            # A run that ended just now took the folder with it.
            taken = os.fstat(self._lock.fileno()).st_nlink == 0
        if taken:
            raise InputError(
                f"another run is at work in {self.folder}: wait until it has ended, or choose another "
                f"{self.elsewhere}"
            )

    def _take_key(self, key: dict[str, Any]) -> None:
        """Write the key of a new run, or compare it with that of the earlier one."""
        key_file = self.folder / _KEY_FILE
        if not key_file.is_file():
            try:
                self._replace(_KEY_FILE, json.dumps(key, indent=2) + "\n")
            except OSError as error:
                self.remove()
                raise self._cannot_write(error) from error
            return
        try:
            before = read_json(key_file)
        except FormatError as error:
            raise InputError(
                f"{self.folder} holds {self.contents} of a run that cannot be told ({error}): remove the "
                "folder, or start afresh with resume=False (--no-resume)"
            ) from None
        differing = [name for name in key if before.get(name) != key[name]]
        if differing:
            name = differing[0]
            raise InputError(
                f"{self.folder} holds {self.contents} of another run "
                f"({_change(name, before.get(name), key[name])}): repeat that run, choose another "
                f"{self.elsewhere}, or empty the folder with resume=False (--no-resume)"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.close()

    def save(self, name: str, finished: Finished) -> None:
        """Write a layer; it appears under its name only when it is complete.

        Raises
        ------
        OutputError
            If the disk is full.
        """
        tensors = {f"tensor:{key}": value.contiguous() for key, value in finished.tensors.items()}
        for key, weight in finished.weights.items():
            for part, value in form_of(weight).items():
                if value is not None:
                    tensors[f"{part}:{key}"] = value.contiguous()
        facts = {
            "weights": {key: [str(w.scheme), list(w.shape)] for key, w in finished.weights.items()},
            "records": {key: asdict(record) for key, record in finished.records.items()},
        }
        temporary = self.folder / f".{name}.tmp"
        try:
            save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})
            temporary.replace(self.path(name))
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise self._cannot_write(error) from error

    def load(self, name: str) -> Finished | None:
        """Read a finished layer; None if it was not finished."""
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return _finished(facts, tensors)
        except _DAMAGE as error:
            raise QkernError(f"{path} is damaged ({error}): remove it and run again") from error

    @property
    def count(self) -> int:
        """Number of finished layers."""
        return len(list(self.folder.glob("*.safetensors")))

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _refuse_strangers(self) -> None:
        """Leave alone what only happens to have the folder's name: the end of a run removes it."""
        if not self.folder.exists() or (self.folder / _KEY_FILE).is_file():
            return
        # A run that was killed before its first layer leaves this much.
        if self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= {
            _LOCK_FILE,
            f".{_KEY_FILE}.tmp",
        }:
            return
        raise InputError(
            f"{self.folder} is where {self.contents} are kept, but what is there is not from a run of qkern "
            f"(no {_KEY_FILE}): move it away or choose another {self.elsewhere}"
        )

    def path(self, name: str) -> Path:
        """File of a finished layer."""
        return self.folder / f"{name}.safetensors"

    def _replace(self, name: str, text: str) -> None:
        temporary = self.folder / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(self.folder / name)

    def _cannot_write(self, error: Exception) -> OutputError:
        return OutputError(
            f"cannot write {self.folder}: {reason_of(error)}; no output was made; {advice_on_writing(error)}"
            f"{self.kept()}"
        )

    def kept(self) -> str:
        """Say, as the end of a sentence, what a run that stops now leaves for the next; may be empty."""
        if self.count == 0:
            return ""
        return (
            f"; {self.count} {self.contents} are kept in {self.folder}: the same command goes on from there, "
            "or remove the folder"
        )


def _finished(facts: Any, tensors: Mapping[str, Tensor]) -> Finished:
    """Undo `Partial.save`."""
    weights = {}
    for key, (scheme, shape) in facts["weights"].items():
        form = {part: tensors.get(f"{part}:{key}") for part in FORM}
        weights[key] = weight_of(form, tuple(shape), Scheme.parse(scheme))
    return Finished(
        weights=weights,
        tensors={k.removeprefix("tensor:"): t for k, t in tensors.items() if k.startswith("tensor:")},
        records={
            key: LayerRecord(**{**record, "notes": tuple(record["notes"])})
            for key, record in facts["records"].items()
        },
    )


def _change(name: str, before: Any, now: Any) -> str:
    """Name what differs between two runs, as narrowly as possible."""
    if name in _HASHES:
        return _HASHES[name]
    if isinstance(before, dict) and isinstance(now, dict):
        for part in now:
            if before.get(part) != now[part]:
                return _change(part, before.get(part), now[part])
    if name == "shape":
        return f"with {_sequences(before)} of calibration, now {_sequences(now)}"
    return f"{name} was {before!r}, now {now!r}"


def _sequences(shape: Any) -> str:
    return " x ".join(map(str, shape)) + " tokens" if isinstance(shape, list) else str(shape)
