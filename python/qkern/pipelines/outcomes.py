"""What each way of writing a model would write, and need for it: a checkpoint, or a GGUF."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from qkern.calibration import bounded_length
from qkern.checkpoints import TensorFolder, format_named, model_folder
from qkern.models import column_weight, describe
from qkern.nn import named_linears
from qkern.ops.dequant_matmul.plain import nested_size
from qkern.pipelines.checks import choose_targets, find_format, find_targets, target_names
from qkern.pipelines.estimates import Job, peak_bytes
from qkern.pipelines.export_gguf import planned_export
from qkern.pipelines.gguf_methods import check_types
from qkern.pipelines.source import Source, open_source
from qkern.search import KEPT, stored_bits, tied_linears

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from qkern.gguf import PlannedTensor
    from qkern.models import Structure
    from qkern.pipelines.layerwise import Settings
    from qkern.schemes import Scheme
    from qkern.search import MixedPrecision, Runtime

__all__ = [
    "Outcome",
    "StoredTensor",
    "checkpoint_outcome",
    "gguf_outcome",
    "runtime_refusals",
    "split_groups",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of the output; `choice` as in `Row`, `bytes` in the file, `loaded` in memory."""

    name: str
    shape: tuple[int, ...]
    choice: str
    bytes: int
    loaded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What would be written, and what that needs.

    Parameters
    ----------
    format, scheme, bytes, parameters, bpw_linear, kept, problems, disk, memory
        As in `qkern.pipelines.Plan`.
    tensors : list of StoredTensor
        The output.
    before : int
        Bytes of the model's tensors.
    job : Job or None
        The walk over the layers; None if there is none.
    rounded : mapping
        By type and columns the weights of what is rounded to nearest outside of the job.
    """

    format: str | None
    scheme: str
    tensors: list[StoredTensor]
    bytes: int
    before: int
    parameters: int
    bpw_linear: float
    kept: dict[str, str]
    problems: list[str]
    disk: int
    memory: int
    job: Job | None
    rounded: Mapping[tuple[str, int], int]


def checkpoint_outcome(
    source: Source,
    settings: Settings,
    mixed: MixedPrecision | None,
    runtime: Runtime,
    *,
    format: str | None,
    skip: Sequence[str],
    include: Sequence[str],
    samples: int,
    length: int,
    shard: int,
) -> Outcome:
    """Look at what a run of `quantize` would write.

    Parameters and errors are those of `qkern.plan`, with its arguments checked and the source opened.
    """
    model = source.model
    structure = describe(model)
    settings, targets = find_targets(model, structure, settings, mixed, skip, include)
    chosen, reasons = find_format(model, structure, targets, settings, format)
    schemes: dict[str, Scheme] = {name: settings.scheme_of(name) for name in target_names(structure, targets)}
    shapes = {name: _shape(linear) for name, linear in named_linears(model).items()}
    tensors = [_stored(source, name, schemes, shapes, chosen) for name in source.stored_once()]
    linears = {name: str(scheme) for name, scheme in schemes.items()}
    problems = list(reasons) if chosen is None else runtime_refusals(runtime, linears, shapes, chosen)
    job = Job(
        model=model,
        structure=structure,
        method=settings.method,
        linears=linears,
        settings=settings,
        samples=samples,
        length=bounded_length(model.config, length),
    )
    before = sum(_nbytes(source, name) for name in source.stored_once())
    after = sum(tensor.bytes for tensor in tensors)
    finished = sum(_form_bytes(scheme, *shapes[name]) for name, scheme in schemes.items())
    memory = peak_bytes(job)
    if not isinstance(source.weights.tensors, TensorFolder):
        memory += 0 if source.folder is None else before  # loaded whole
    return Outcome(
        format=chosen,
        scheme=settings.spelling,
        tensors=tensors,
        bytes=after,
        before=before,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bpw_linear=_bpw_linear(source, structure, linears, shapes),
        kept={**targets.kept, **_embeddings(model)},
        problems=problems + split_groups(runtime, structure, linears, shapes),
        # A shard is written twice, and finished layers go when all of it is there.
        disk=finished + after + min(after, shard),
        memory=memory,
        job=job,
        rounded={},
    )


def _shape(linear: nn.Module) -> tuple[int, int]:
    N, K = column_weight(linear).shape
    return N, K


def _nbytes(source: Source, name: str) -> int:
    return source.header(name).nbytes


def _form_bytes(scheme: Scheme, N: int, K: int) -> int:
    """Bytes of a quantized weight in memory."""
    rows, groups = scheme.scale_shape(N, K)
    count = rows * groups
    # Quantized scales lie beside the decoded ones.
    scales = 4 * count + nested_size(count) if scheme.double_quant else scheme.scale_bytes(count)
    return 4 * N * scheme.code_words(K) + scales + scheme.zero_point * count


def _stored(
    source: Source,
    name: str,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    format: str | None,
) -> StoredTensor:
    owner = name.removesuffix(".weight")
    if owner not in schemes or owner == name:
        header = source.header(name)
        dtype = str(header.dtype).removeprefix("torch.")
        shape, size = tuple(header.shape), header.nbytes
        return StoredTensor(name=name, shape=shape, choice=dtype, bytes=size, loaded=size)
    scheme, (N, K) = schemes[owner], shapes[owner]
    return StoredTensor(
        name=name,
        shape=(N, K),
        choice=str(scheme),
        bytes=stored_bits(str(scheme), (N, K)) // 8
        if format is None
        else format_named(format).stored_bytes(scheme, N, K),
        loaded=_form_bytes(scheme, N, K),
    )


def _bpw_linear(
    source: Source,
    structure: Structure,
    linears: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
) -> float:
    bits = weights = 0
    for name, (N, K) in shapes.items():
        if name != structure.head:
            bits += (
                stored_bits(linears[name], (N, K))
                if name in linears
                else 8 * _nbytes(source, f"{name}.weight")
            )
            weights += N * K
    return bits / weights


def _embeddings(model: nn.Module) -> dict[str, str]:
    return {
        name: "embedding, which no checkpoint format holds quantized"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def runtime_refusals(
    runtime: Runtime, choices: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], format: str
) -> list[str]:
    """Say what the runtime cannot load, in one line a reason."""
    found: dict[str, list[str]] = {}
    for name, choice in choices.items():
        reason = runtime.refusal(choice, *shapes[name], format=format)
        if reason is not None:
            found.setdefault(reason, []).append(name)
    return [f"{_few(names)}: {reason}" for reason, names in found.items()]


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def split_groups(
    runtime: Runtime,
    structure: Structure,
    choices: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
) -> list[str]:
    """Which linears that the runtime makes one have different choices, one line a kind of difference."""
    found: dict[str, list[str]] = {}
    if not runtime.is_fused:
        return []
    for _, names in tied_linears(shapes, structure, runtime, head=False, kept={}):
        if len({choices.get(name, KEPT) for name in names}) > 1:
            choice = {f"{name.rpartition('.')[2]} {choices.get(name, KEPT)}": None for name in names}
            got = ", ".join(choice)
            found.setdefault(got, []).append(names[0].rpartition(".")[0])
    return [
        f"{_few(owners)}: runtime {runtime.name} makes one linear of these, which must be alike: got {got}"
        for got, owners in found.items()
    ]


def gguf_outcome(
    model: str | Path,
    type: str,
    method: str,
    mixed: MixedPrecision | None,
    runtime: Runtime,
    *,
    samples: int,
    length: int,
) -> Outcome:
    """Look at what a run of `export_gguf` would write.

    Parameters and errors are those of `qkern.plan`, with its arguments checked.
    """
    planned, size, assigned = planned_export(model, type, method=method, assignment=mixed)
    tensors = [
        StoredTensor(
            name=tensor.source,
            shape=tensor.shape,
            choice=tensor.type.name,
            bytes=tensor.bytes,
            loaded=tensor.bytes,
        )
        for tensor in planned
    ]
    matrices = [tensor for tensor in planned if len(tensor.shape) > 1]
    # A router is no linear in a model either.
    inside = [
        tensor
        for tensor in matrices
        if tensor.name.startswith("blk.") and not tensor.name.endswith(".ffn_gate_inp.weight")
    ]
    owners = {tensor.source.removesuffix(".weight"): tensor for tensor in matrices}
    coded = {name: tensor.type.name for name, tensor in owners.items() if tensor.type.block > 1}
    shapes = {name: (tensor.shape[-2], tensor.shape[-1]) for name, tensor in owners.items()}
    folder = TensorFolder(model_folder(model, fetch=False))
    job = None if method == "rtn" else _gguf_job(model, method, matrices, samples, length)
    rounded: Counter[tuple[str, int]] = Counter()
    for name, tensor in owners.items():
        if job is None or name not in job.linears:
            rounded[tensor.type.name, tensor.shape[-1]] += tensor.weights
    largest = 4 * max(tensor.weights for tensor in planned)
    return Outcome(
        format="gguf",
        scheme=type if mixed is None else "mixed",
        tensors=tensors,
        bytes=size,
        before=sum(folder.header(name).nbytes for name in folder),
        parameters=sum(tensor.weights for tensor in planned),
        bpw_linear=8 * sum(tensor.bytes for tensor in inside) / sum(tensor.weights for tensor in inside),
        kept={
            name: _why_float(tensor, type, tensor.source in assigned)
            for name, tensor in owners.items()
            if tensor.type.block == 1
        },
        problems=runtime_refusals(runtime, coded, shapes, "compressed-tensors"),
        disk=size,
        # Of a tensor what is read, in fp32, and its blocks or what they stand for.
        memory=max(3 * largest, 0 if job is None else peak_bytes(job)),
        job=job,
        rounded=rounded,
    )


def _why_float(tensor: PlannedTensor, type: str, is_assigned: bool) -> str:
    if is_assigned:
        return "16-bit by the assignment"
    if tensor.shape[-1] % 32:
        return f"rows of {tensor.shape[-1]}, which blocks of 32 do not divide"
    return f"float in {type}"


def _gguf_job(
    model: str | Path, method: str, matrices: Sequence[PlannedTensor], samples: int, length: int
) -> Job:
    source = open_source(model, headers=True)
    structure = describe(source.model)
    names = set(target_names(structure, choose_targets(source.model, structure, (), ())))
    planned = [tensor for tensor in matrices if tensor.source.removesuffix(".weight") in names]
    check_types(method, (tensor.type for tensor in planned))
    return Job(
        model=source.model,
        structure=structure,
        method=method,
        linears={
            tensor.source.removesuffix(".weight"): tensor.type.name
            for tensor in planned
            if tensor.type.block > 1
        },
        settings=None,
        samples=samples,
        length=bounded_length(source.model.config, length),
    )
