"""What was evaluated before is never evaluated again, not even by a run that goes on after a killed one."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Final, Protocol

from qkern.errors import InputError, OutputError, advice_on_writing, reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from qkern.search.space import Genome, Space

__all__ = ["CachedLosses", "Evaluates"]

# Genomes that are evaluated before their losses are written: a killed run loses at most so many.
_PORTION: Final = 20


class Evaluates(Protocol):
    """What an `Evaluator` offers."""

    chunks: list[int]

    def kl(self, genomes: Sequence[Genome], chunks: slice = ...) -> list[float]:
        """Losses of genomes over some chunks of the text."""
        ...

    def perplexity(self, genomes: Sequence[Genome]) -> list[float]:
        """Perplexities of genomes over the text."""
        ...


class CachedLosses:
    """Losses of genomes, over the first chunks of the text or over all of it.

    Parameters
    ----------
    evaluator : Evaluates
        Is asked what is not known yet, chunks that a genome went through left out.
    space : Space
        Of the genomes.
    path : Path, optional
        File to read known losses from and to add new ones to, a JSON array a line. It must be of the same
        evaluator: genomes are written in the spelling of their alleles, nothing else is checked.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """

    def __init__(self, evaluator: Evaluates, space: Space, path: Path | None = None) -> None:
        self._evaluator = evaluator
        self._space = space
        self._path = path
        self._known: dict[str, dict[tuple[int, int], float]] = {}
        # How far each genome was asked for by this run, whatever earlier ones know of it.
        self._asked: dict[Genome, int] = {}
        if path is not None:
            self._read(path)

    @property
    def evaluated(self) -> int:
        """Genomes that were asked for, each once, whether or not an earlier run had evaluated them."""
        return len(self._asked)

    def best(self, count: int) -> list[Genome]:
        """Genomes that were asked for over all of the text, the least losses first."""
        whole = sorted(genome for genome, stop in self._asked.items() if stop == self.chunks)
        ranked = sorted(zip(self(whole), whole, strict=True))
        return [genome for _, genome in ranked[:count]]

    @property
    def tokens(self) -> list[int]:
        """Tokens of each chunk of the text."""
        return self._evaluator.chunks

    @property
    def chunks(self) -> int:
        """Chunks of the text."""
        return len(self.tokens)

    def __call__(
        self,
        genomes: Sequence[Genome],
        stop: int | None = None,
        *,
        see: Callable[[int], None] | None = None,
    ) -> list[float]:
        """Loss of each genome over the first `stop` chunks (None: all); `see` is told how many came new."""
        stop = self.chunks if stop is None else min(stop, self.chunks)
        for genome in genomes:
            self._asked[genome] = max(stop, self._asked.get(genome, 0))
        for start in range(stop):
            # Those that have gone as far as `start` and no further, whatever they were asked for before.
            missing = [g for g in dict.fromkeys(genomes) if self._reached(g, stop) == start]
            for first in range(0, len(missing), _PORTION):
                some = missing[first : first + _PORTION]
                found = self._evaluator.kl(some, slice(start, stop))
                broken = [genome for genome, loss in zip(some, found, strict=True) if not math.isfinite(loss)]
                if broken:
                    raise InputError(
                        f"the loss of an assignment is not finite ({self._spelled(broken[0])[:200]}): "
                        "activations overflow; leave smaller alleles out, or check the model"
                    )
                self._add(some, (start, stop), found)
                if see is not None:
                    see(len(some))
        tokens = self.tokens
        result = []
        for genome in genomes:
            parts = self._known[self._spelled(genome)]
            losses, start = 0.0, 0
            while start < stop:
                end = max(end for begin, end in parts if begin == start and end <= stop)
                losses += parts[start, end] * sum(tokens[start:end])
                start = end
            result.append(losses / sum(tokens[:stop]))
        return result

    def perplexity(self, genomes: Sequence[Genome]) -> list[float]:
        """Perplexities, not cached: they are asked for at the end."""
        return self._evaluator.perplexity(genomes)

    def _reached(self, genome: Genome, stop: int) -> int:
        """Return the chunk up to which the losses of a genome are known in parts that `stop` can use."""
        parts = self._known.get(self._spelled(genome), {})
        at = 0
        while ends := [end for begin, end in parts if begin == at and end <= stop]:
            at = max(ends)
        return at

    def _spelled(self, genome: Genome) -> str:
        """Alleles in one string; of a genome with originals in it too."""
        return " ".join(
            gene.alleles[allele] if allele >= 0 else "-"
            for gene, allele in zip(self._space.genes, genome, strict=True)
        )

    def _add(self, genomes: Sequence[Genome], part: tuple[int, int], losses: Sequence[float]) -> None:
        lines = []
        for genome, loss in zip(genomes, losses, strict=True):
            spelled = self._spelled(genome)
            self._take(spelled, part, loss)
            lines.append(json.dumps([spelled, *part, loss]) + "\n")
        if self._path is not None:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            except OSError as error:
                raise OutputError(
                    f"cannot write {self._path}: {reason_of(error)}; {advice_on_writing(error)}"
                ) from error

    def _take(self, spelled: str, part: tuple[int, int], loss: float) -> None:
        self._known.setdefault(spelled, {})[part] = loss

    def _read(self, path: Path) -> None:
        if not path.is_file():
            return
        try:
            content = path.read_bytes()
            whole, newline, rest = content.rpartition(b"\n")
            if rest:
                # The line that a killed run was writing.
                os.truncate(path, len(whole + newline))
        except OSError as error:
            raise OutputError(
                f"cannot go on in {path}: {reason_of(error)}; {advice_on_writing(error)}"
            ) from error
        for line in whole.splitlines():
            try:
                spelled, start, stop, loss = json.loads(line)
                is_part = type(start) is type(stop) is int and 0 <= start < stop <= self.chunks
                if not (is_part and math.isfinite(loss)):
                    raise ValueError("numbers out of range")
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                shown = line[:80].decode(errors="replace")
                raise InputError(
                    f"{path} is damaged: {shown!r} is no evaluation; remove the file, its evaluations are "
                    "then made again"
                ) from error
            self._take(str(spelled), (start, stop), float(loss))
