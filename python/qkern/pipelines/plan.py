"""The verb `plan`: what a run would write, need and take, and what could not be loaded, before any work."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern.checkpoints import check_output, parse_size
from qkern.errors import InputError
from qkern.evaluation.machine import available_bytes
from qkern.ops.gguf_types import GGUFType
from qkern.pipelines.checks import GGUF_METHODS, check_gguf_output, checked_settings
from qkern.pipelines.estimates import encode_seconds, run_seconds
from qkern.pipelines.load import usable_device
from qkern.pipelines.outcomes import Outcome, StoredTensor, checkpoint_outcome, gguf_outcome
from qkern.pipelines.source import open_source
from qkern.search import MixedPrecision, parse_choice, runtime_named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qkern.schemes import Scheme

__all__ = ["Plan", "Row", "plan"]

_VECTORS: Final = "norms, biases"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Tensors of one kind that are stored alike.

    Parameters
    ----------
    kind : str
        Last part of their name; of everything that is no matrix one name for all.
    count : int
        How many.
    shape : tuple of int or None
        Of each; None if they differ.
    choice : str
        Scheme, GGUF type or dtype.
    bytes : int
        Of all of them.
    """

    kind: str
    count: int
    shape: tuple[int, ...] | None
    choice: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would do.

    Parameters
    ----------
    model : str
        The model.
    method, scheme : str
        What would be done; ``"mixed"`` for an assignment of several schemes.
    runtime : str
        What is to load the result.
    format : str or None
        Checkpoint format, or ``"gguf"``; None if none holds the result.
    parameters : int
        Weights of the model, tied ones once.
    bytes_before, bytes_after : int
        Of all tensors; of a GGUF after: of the file.
    bpw_linear : float
        Bits a weight of the linears in the decoder layers, 16-bit ones included.
    bpw_file : float
        Bits of all tensors over all weights.
    rows : tuple of Row
        What is stored how.
    kept : mapping
        Matrices that stay as they are, and why.
    problems : tuple of str
        Why the runtime could not load the result, or no format hold it.
    warnings : tuple of str
        What this machine lacks, and what could not be estimated.
    memory : int
        Bytes at the peak of the run, on the device of the layers, beyond what Python and torch take.
    memory_free : int
        Bytes that are free there.
    loaded : int
        Bytes of the loaded result.
    disk, disk_free : int
        Bytes that the run needs on the disk at once, and that are free where the output goes.
    seconds : float or None
        Estimated time; None without one.
    basis : str
        What the estimate is based on.
    """

    model: str
    method: str
    scheme: str
    runtime: str
    format: str | None
    parameters: int
    bytes_before: int
    bytes_after: int
    bpw_linear: float
    bpw_file: float
    rows: tuple[Row, ...]
    kept: Mapping[str, str]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    memory: int
    memory_free: int
    loaded: int
    disk: int
    disk_free: int
    seconds: float | None
    basis: str

    @property
    def is_loadable(self) -> bool:
        """Whether the runtime can load the result."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows], "is_loadable": self.is_loadable}


def plan(
    model: Any,
    *,
    scheme: Scheme | str | None = None,
    assignment: MixedPrecision | Mapping[str, Any] | str | Path | None = None,
    type: str | None = None,
    method: str | None = None,
    runtime: str | None = None,
    format: str | None = None,
    skip: Sequence[str] = (),
    include: Sequence[str] = (),
    samples: int = 128,
    length: int = 2048,
    device: str = "auto",
    output: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    timed: bool = True,
) -> Plan:
    """Say what `quantize` or `export_gguf` would write, need and take, before any work.

    Of the model's weights only the headers of the files are read (and a head that is stored although it is
    tied, as it must be compared). What those verbs would refuse is refused here.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        Folder, id of a hub model that is on this disk, or (but for a GGUF) a model in memory.
    scheme, assignment, format, skip, include, samples, length, device, max_shard_size
        As in `quantize`. An assignment of GGUF types is one for `export_gguf`.
    type : str, optional
        Mixture of `export_gguf`, with or without such an assignment; default: q4_k_m.
    method : str, optional
        ``"gptq"``, ``"awq"``, ``"rtn"`` or ``"smoothquant"``; default: that of the verb, ``"gptq"`` for
        `quantize` and ``"rtn"`` for `export_gguf`.
    runtime : str, optional
        ``"torch"``, ``"vllm"`` or ``"gguf"``, which is to load the result; default: what is written for.
    output : str or Path, optional
        Where it would go, to look at that disk; default: the current folder.
    timed : bool
        Estimate the time, by running for some seconds.

    Returns
    -------
    Plan
        `Plan.problems` is empty if the runtime can load the result.

    Raises
    ------
    InputError
        On arguments that cannot be used, or a model that is not there.
    FormatError
        If its files are damaged.
    UnsupportedError
        If the method does not make a scheme, or the architecture is not exported.
    """
    started = time.monotonic()
    mixed = None if assignment is None else MixedPrecision.of(assignment)
    wanted = None if runtime is None else runtime_named(runtime)
    typed = mixed is not None and any(
        isinstance(parse_choice(choice), GGUFType) for choice in mixed.choices.values()
    )
    target = usable_device(device)
    if type is None and (typed or (runtime == "gguf" and scheme is None and mixed is None)):
        type = "q4_k_m"
    skip, include = ((names,) if isinstance(names, str) else names for names in (skip, include))
    if type is None:
        method = method or "gptq"
        wanted = wanted or runtime_named("torch")
        settings = checked_settings(method, scheme, assignment=mixed)
        if output is not None:
            check_output(output, source=_folder_of(model))
        source = open_source(model, headers=True)
        outcome = checkpoint_outcome(
            source,
            settings,
            mixed,
            wanted,
            format=format,
            skip=skip,
            include=include,
            samples=samples,
            length=length,
            shard=parse_size(max_shard_size),
        )
        name = source.name
    else:
        method = method or "rtn"
        wanted = wanted or runtime_named("gguf")
        foreign = {"scheme": scheme, "format": format, "skip": tuple(skip), "include": tuple(include)}
        _check_export(model, method, type, foreign, output)
        outcome = gguf_outcome(model, type, method, mixed, wanted, samples=samples, length=length)
        name = str(model)
    opened = time.monotonic() - started
    free = torch.cuda.mem_get_info(target)[0] if target.type == "cuda" else available_bytes()
    disk_free = shutil.disk_usage(_existing(output)).free
    warnings = _shortages(outcome, free, disk_free)
    seconds, basis = None, "not estimated"
    if timed and outcome.memory > free:
        basis = "not estimated: the run does not fit in memory"
    elif timed:
        seconds = opened + encode_seconds(outcome.rounded)
        basis = "estimate from samples of its matrices"
        if outcome.job is not None:
            seconds += run_seconds(outcome.job, target)
            basis = "estimate from one layer and samples of its matrices, disks left out"
    return Plan(
        model=name,
        method=method,
        scheme=outcome.scheme,
        runtime=wanted.name,
        format=outcome.format,
        parameters=outcome.parameters,
        bytes_before=outcome.before,
        bytes_after=outcome.bytes,
        bpw_linear=outcome.bpw_linear,
        bpw_file=8 * outcome.bytes / outcome.parameters,
        rows=_rows(outcome.tensors),
        kept=outcome.kept,
        problems=tuple(outcome.problems),
        warnings=tuple(warnings),
        memory=outcome.memory,
        memory_free=free,
        loaded=sum(tensor.loaded for tensor in outcome.tensors),
        disk=outcome.disk,
        disk_free=disk_free,
        seconds=seconds,
        basis=basis,
    )


def _folder_of(model: Any) -> str | Path | None:
    return model if isinstance(model, (str, Path)) else getattr(model, "name_or_path", None)


def _existing(output: str | Path | None) -> Path:
    """Return the folder where an output would be, or the first around it that exists."""
    path = Path.cwd() if output is None else Path(output).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _check_export(
    model: Any, method: str, type: str, foreign: Mapping[str, Any], output: str | Path | None
) -> None:
    """Refuse what an export does not take."""
    given = [name for name, value in foreign.items() if value]
    if given:
        raise InputError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for checkpoints, and a GGUF ({type}) "
            "was asked for: leave one of the two out"
        )
    if method not in GGUF_METHODS:
        raise InputError(f"unknown method {method!r}: allowed are {', '.join(GGUF_METHODS)}")
    if not isinstance(model, (str, Path)):
        raise InputError(
            f"a GGUF is made from a folder or hub id: got {model.__class__.__name__}; save the model first"
        )
    if output is not None:
        check_gguf_output(Path(output), modelfile=False, in_parts=False)


def _shortages(outcome: Outcome, free: int, disk_free: int) -> list[str]:
    """Say what this machine does not have."""
    found = []
    if outcome.memory > free:
        found.append(
            f"the run needs about {_gigabytes(outcome.memory)} of memory at its peak, and {_gigabytes(free)} "
            "are free: fewer or shorter calibration sequences (samples, length) need less"
        )
    if outcome.disk > disk_free:
        found.append(
            f"the run needs {_gigabytes(outcome.disk)} of disk, and {_gigabytes(disk_free)} are free: free "
            "space, or choose another output"
        )
    return found


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _rows(tensors: Sequence[StoredTensor]) -> tuple[Row, ...]:
    """Gather tensors of one kind, shape and choice; of what is no matrix all of a dtype."""
    found: dict[tuple[str, str, tuple[int, ...] | None], list[int]] = {}
    for tensor in tensors:
        is_matrix = len(tensor.shape) > 1
        kind = tensor.name.removesuffix(".weight").rpartition(".")[2] if is_matrix else _VECTORS
        key = kind, tensor.choice, tensor.shape if is_matrix else None
        found.setdefault(key, []).append(tensor.bytes)
    return tuple(
        Row(kind=kind, count=len(sizes), shape=shape, choice=choice, bytes=sum(sizes))
        for (kind, choice, shape), sizes in found.items()
    )
