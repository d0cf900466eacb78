"""What the original says at every position, in a file: models are compared with it in other processes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from qkern.errors import InputError, OutputError, advice_on_writing, reason_of
from qkern.evaluation.kl import check_finite, divergence, kl_rows, with_rest
from qkern.evaluation.windows import log_probabilities

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["ReferenceReader", "ReferenceWriter"]

_FACTS: Final = ".json"


class ReferenceWriter:
    """Writes the rows of logits that it is called with; a context manager.

    All logits are kept in fp32 where that takes at most `limit` bytes. Else the log-probabilities of as many
    of each position's likeliest tokens are, and readers take all others for one outcome.

    Parameters
    ----------
    path : Path
        The file. What says that it is complete is written beside it, at the end.
    positions : int
        Rows that will come.
    limit : int
        Bytes of the file.

    Raises
    ------
    OutputError
        If the disk is full.
    """

    def __init__(self, path: Path, positions: int, limit: int) -> None:
        self._path, self._positions, self._limit = path, positions, limit
        self._file: Any = path.open("wb")
        self._vocabulary = self._kept = 0

    def __call__(self, logits: Tensor) -> None:
        """Take the next rows ``[P, V]``."""
        try:
            self._write(logits)
        except OSError as error:
            raise OutputError(
                f"cannot write {self._path}: {reason_of(error)}; {advice_on_writing(error)}"
            ) from error

    def _write(self, logits: Tensor) -> None:
        if not self._kept:
            self._vocabulary = logits.shape[-1]
            fits = 4 * self._positions * self._vocabulary <= self._limit
            # Of one of the likeliest, its token is kept too.
            self._kept = self._vocabulary if fits else max(1, self._limit // (8 * self._positions))
        if self._kept == self._vocabulary:
            logits.float().cpu().numpy().tofile(self._file)
            return
        for _, log_probs in log_probabilities(logits):
            # Sorting would take as long again as finding them, which for large vocabularies is long.
            top, tokens = log_probs.float().topk(self._kept, sorted=False)
            row = torch.cat([top.view(torch.int32), tokens.int()], -1)
            row.cpu().numpy().tofile(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._file.close()
        if kind is None:
            facts = {"vocabulary": self._vocabulary, "kept": self._kept}
            self._path.with_suffix(_FACTS).write_text(json.dumps(facts))


class ReferenceReader:
    """Compares the rows of logits that it is called with against those of the file, in their order.

    Parameters
    ----------
    path : Path
        A file of `ReferenceWriter`.

    Attributes
    ----------
    vocabulary, kept : int
        Logits of the original, and how many of each position are in the file.
    """

    def __init__(self, path: Path) -> None:
        facts = json.loads(path.with_suffix(_FACTS).read_text())
        self.vocabulary: int = facts["vocabulary"]
        self.kept: int = facts["kept"]
        self._path, self._done = path, 0
        self._kl: list[NDArray[np.float64]] = []
        self._agreed = 0

    @staticmethod
    def is_there(path: Path) -> bool:
        """Whether a file was written to its end."""
        return path.with_suffix(_FACTS).is_file()

    def __call__(self, logits: Tensor) -> None:
        """Compare the next rows ``[P, V]``.

        Raises
        ------
        InputError
            If the vocabularies differ.
        """
        if logits.shape[-1] != self.vocabulary:
            raise InputError(
                f"the models must share a vocabulary: got {self.vocabulary} and {logits.shape[-1]} logits"
            )
        likeliest, kl = self._full(logits) if self.kept == self.vocabulary else self._top(logits)
        self._kl.append(kl)
        self._agreed += int((likeliest == logits.argmax(-1).cpu()).sum())

    def _full(self, logits: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
        expected = self._read(logits, np.float32, self.vocabulary)
        return expected.argmax(-1), kl_rows(expected.to(logits.device), logits)

    def _top(self, logits: Tensor) -> tuple[Tensor, NDArray[np.float64]]:
        stored = self._read(logits, np.int32, 2 * self.kept)
        expected, tokens = stored[:, : self.kept].contiguous().view(torch.float32), stored[:, self.kept :]
        blocks = []
        for rows, q in log_probabilities(logits):
            p, chosen = expected[rows].to(q), tokens[rows].long().to(q.device)
            blocks.append(divergence(with_rest(p), with_rest(q.gather(-1, chosen))))
        likeliest = tokens.gather(-1, expected.argmax(-1, keepdim=True))
        return likeliest[:, 0], torch.cat(blocks).numpy()

    def _read(self, logits: Tensor, dtype: Any, width: int) -> Tensor:
        values = np.fromfile(self._path, dtype=dtype, count=len(logits) * width, offset=self._done)
        self._done += values.nbytes
        return torch.from_numpy(values.reshape(len(logits), width))

    @property
    def kl(self) -> NDArray[np.float64]:
        """KL(original || model) in nats of every position so far.

        Raises
        ------
        InputError
            If one is NaN or Inf.
        """
        values = np.concatenate(self._kl)
        check_finite(values)
        return values

    @property
    def agreement(self) -> float:
        """Share of the positions at which both find the same token likeliest."""
        return self._agreed / sum(map(len, self._kl))
