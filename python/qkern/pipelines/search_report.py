"""What `sensitivity` and `search_assignment` report."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkern.errors import InputError, OutputError, advice_on_writing, reason_of
from qkern.gguf.writer import check_new_file, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qkern.search import Generation, MixedPrecision

__all__ = [
    "Assigned",
    "Finalist",
    "SearchReport",
    "Sensitivity",
    "SensitivityReport",
    "check_apart",
    "new_file",
    "new_folder",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What quantizing some linears alone does.

    Parameters
    ----------
    names : tuple of str
        Linears that share a choice.
    layer : int
        Their decoder layer.
    kind : str
        Their names inside it.
    weights : int
        Their weights.
    bits : dict
        By allele, bits per weight with scales and zero points.
    kl : dict
        By allele, KL(original || model with these linears in this allele) in nats.
    error : dict
        By allele, squared error of the linears' outputs over the calibration, relative; the mean over them.
    """

    names: tuple[str, ...]
    layer: int
    kind: str
    weights: int
    bits: dict[str, float]
    kl: dict[str, float]
    error: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityReport:
    """How much each allele of each linear costs.

    Parameters
    ----------
    runtime, method : str
        What would load the result, and how codes were chosen.
    tokens : int
        Tokens that KL was measured on; none of them was used for choosing codes, unless by `text`.
    genes : tuple of Sensitivity
        In the order of the layers.
    kept : dict
        Linears that were left alone, and why.
    seconds : float
        Time of the whole run.
    """

    runtime: str
    method: str
    tokens: int
    genes: tuple[Sensitivity, ...]
    kept: dict[str, str]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    """One assignment and what is known of it.

    Parameters
    ----------
    found_by : str
        ``"genetic"``, ``"lagrangian"``, ``"greedy"``, ``"random"``, ``"pareto"``, or ``"uniform w3g128"``.
    kl : float
        Over the search's own text: more text tells how much of a difference is left. Of finalists and the
        Lagrangian search by the codes that are written; of the others by candidates, see `search_assignment`.
    perplexity : float
        Over the same.
    bytes : int
        All tensors of the written model; of a GGUF the whole file.
    bpw_file, bpw_linear : float
        Bits per weight of everything, and of the linears without the head.
    assignment : MixedPrecision
        The assignment.
    """

    found_by: str
    kl: float
    perplexity: float
    bytes: int
    bpw_file: float
    bpw_linear: float
    assignment: MixedPrecision

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "assignment": dict(self.assignment.choices)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """One of the best assignments of a search, quantized by itself.

    Parameters
    ----------
    found_by : str
        ``"genetic"``, or ``"lagrangian"`` for the optimum that candidates were made behind.
    kl : float
        By its own codes, as they will be written: the least is the result.
    by_candidates : float
        What the search went by.
    assignment : MixedPrecision
        The assignment.
    """

    found_by: str
    kl: float
    by_candidates: float
    assignment: MixedPrecision

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "assignment": dict(self.assignment.choices)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchReport:
    """What a search found.

    Parameters
    ----------
    best : Assigned or None
        The result; None of a whole front.
    others : tuple of Assigned
        What simpler searches found within the same size; of a front its points, and those of simpler
        searches.
    perplexity : float
        Of the original over the same text.
    target : str
        What was asked for.
    runtime, method : str
        What loads the result, and how codes were chosen.
    samples : int
        Calibration sequences: `qkern.quantize` with as many of the same text writes the codes that were
        scored. Fewer than were asked for if the text is too short to set others aside.
    tokens, evaluations, seed : int
        Tokens that assignments were scored on, assignments that were scored, seed.
    history : tuple of Generation
        Best and mean loss by generation, by candidates.
    finalists : tuple of Finalist
        What the result was chosen from, see `search_assignment`; none without finalists.
    kept : dict
        Linears that were left alone, and why.
    seconds : float
        Time of the whole run.
    output : Path or None
        What was written.
    """

    best: Assigned | None
    others: tuple[Assigned, ...]
    perplexity: float
    target: str
    runtime: str
    method: str
    samples: int
    tokens: int
    evaluations: int
    seed: int
    history: tuple[Generation, ...] = ()
    finalists: tuple[Finalist, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    output: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self) | {
            "best": None if self.best is None else self.best.as_dict(),
            "others": [other.as_dict() for other in self.others],
            "history": [{"number": g.number, "kl": g.loss, "mean": g.mean} for g in self.history],
            "finalists": [finalist.as_dict() for finalist in self.finalists],
            "output": None if self.output is None else str(self.output),
        }

    def write(self, path: Path) -> None:
        """Write the assignment, or a folder of the whole front."""
        if self.best is not None:
            self.best.assignment.write(path)
            return
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            front = [point for point in self.others if point.found_by == "pareto"]
            for index, point in enumerate(front):
                point.assignment.write(temporary / f"{index:03}-{point.bpw_linear:.3f}.json")
            write_whole(temporary / "front.json", (json.dumps(self.as_dict(), indent=2) + "\n").encode())
            if path.is_dir():
                path.rmdir()  # empty, as was checked
            temporary.replace(path)
        except OSError as error:
            raise OutputError(
                f"cannot write {path}: {reason_of(error)}; {advice_on_writing(error)}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def new_file(output: str | Path | None, store: str | Path | None = None) -> Path | None:
    """Return the path of a file to write, if any; refuse one that no new file can have, or is the store's."""
    if output is None:
        return None
    check_apart({"output (--output)": output, "store (--store)": store})
    check_new_file(Path(output), "report.json")
    return Path(output)


def new_folder(output: str | Path | None, store: str | Path | None = None) -> Path | None:
    """Return the path of a folder to write, if any; refuse one that holds something, or is the store's."""
    if output is None:
        return None
    check_apart({"output (--output)": output, "store (--store)": store})
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is no empty folder: remove it or choose another --output")
    return path


def check_apart(paths: Mapping[str, str | Path | None]) -> None:
    """Refuse files and folders to write, by what they are, of which one is another or inside it.

    Raises
    ------
    InputError
        That names both.
    """
    given = {what: Path(path).resolve() for what, path in paths.items() if path is not None}
    for (first, one), (second, other) in itertools.combinations(given.items(), 2):
        if one == other:
            raise InputError(f"{first} and {second} are both {one}: choose two paths")
        if one in other.parents or other in one.parents:
            raise InputError(
                f"{first} and {second} are one inside the other, {one} and {other}: choose paths apart"
            )
