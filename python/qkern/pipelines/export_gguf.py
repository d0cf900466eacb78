"""Exporting a model folder, plain or quantized, to a GGUF that llama.cpp runs."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern import __version__
from qkern.calibration import load_config
from qkern.checkpoints import QuantizedCheckpoint, model_folder, parse_size
from qkern.errors import InputError
from qkern.gguf import PlannedTensor, add_tokenizer, architecture_for, mixture_for, write_gguf
from qkern.gguf.architectures import expert_count
from qkern.gguf.imatrix import Imatrix, read_imatrix
from qkern.gguf.mixture import ModelFacts, choose_types
from qkern.gguf.modelfile import ollama_modelfile
from qkern.gguf.overrides import parse_overrides
from qkern.gguf.pooling import pooling_of
from qkern.gguf.quantized import exact_type, map_rows
from qkern.gguf.rope import rope_tensors
from qkern.gguf.tokenizer import name_of_model
from qkern.gguf.writer import Written, check_new_file, gguf_bytes, gguf_files, write_whole
from qkern.ops.gguf_types import gguf_type
from qkern.pipelines.checks import check_calibration, check_gguf_output, check_gguf_request
from qkern.pipelines.gguf_methods import CalibratedLayers
from qkern.pipelines.gguf_sources import find_sources, stored_names
from qkern.pipelines.history import GGUF_KEY, folder_grids
from qkern.pipelines.imatrix import ImatrixRun, is_weighed, with_importance
from qkern.schemes import QuantizedWeight
from qkern.search import MixedPrecision, spell_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from qkern.gguf import GGUFArchitecture, Mixture
    from qkern.gguf.overrides import Override
    from qkern.ops.gguf_types import GGUFType
    from qkern.pipelines.gguf_sources import Source

__all__ = ["GGUFReport", "TensorReport", "export_gguf", "planned_export"]

logger = logging.getLogger(__name__)

_HEAD: Final = "lm_head"
_EMBEDDING: Final = "model.embed_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """One tensor of a file.

    Parameters
    ----------
    name : str
        llama.cpp's name.
    source : str
        transformers' name; all experts of a layer are one tensor, with ``*`` for their number.
    type : str
        Its type.
    shape : tuple of int
        As torch has it.
    bytes : int
        Its size, padding left out.
    """

    name: str
    source: str
    type: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFReport:
    """What was written, or would be.

    Parameters
    ----------
    path : Path
        The file; of several the first, which llama.cpp is given.
    files : tuple of Path
        All files.
    type : str
        The mixture.
    counts : dict
        Tensors of each type.
    weights : dict
        Weights of each type.
    file_bytes : int
        Size of the files together.
    bpw_file : float
        All bits of the file over all weights.
    exact : dict
        Of each tensor by its name in the file whether it decodes to exactly the weights of the model; empty
        if nothing was written.
    exact_counts : dict
        How many of each type do.
    tensors : tuple of TensorReport
        In the order of the file.
    is_dry_run : bool
        Whether nothing was written.
    method : str
        How the codes of the linears were chosen.
    errors : dict
        For ``"gptq"`` and ``"awq"``: of each linear by its name in the file the squared error of its
        outputs, relative.
    """

    path: Path
    files: tuple[Path, ...]
    type: str
    counts: dict[str, int]
    weights: dict[str, int]
    file_bytes: int
    bpw_file: float
    exact: dict[str, bool]
    exact_counts: dict[str, int]
    tensors: tuple[TensorReport, ...]
    method: str
    errors: dict[str, float]
    is_dry_run: bool = False


def export_gguf(
    model: str | Path,
    output: str | Path,
    type: str = "q4_k_m",
    *,
    assignment: MixedPrecision | Mapping[str, Any] | str | Path | None = None,
    tensor_types: Mapping[str, str] | None = None,
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
    pure: bool = False,
    pre_tokenizer: str | None = None,
    method: str = "rtn",
    calibration: Any = None,
    imatrix: str | Path | Imatrix | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    max_shard_size: int | str | None = None,
    modelfile: bool = False,
    dry_run: bool = False,
) -> GGUFReport:
    """Write a model as a GGUF file, a tensor at a time.

    Parameters
    ----------
    model : str or Path
        Folder or hub id of a model of one of `qkern.gguf.ARCHITECTURES`: 16-bit, or quantized in a format
        that qkern reads. A layer whose codes the type holds keeps them (symmetric 2 to 4 bits in ``q4_0``,
        with zero points in ``q5_0``, any of these and symmetric 8 bits in ``q8_0``; groups a multiple of 32,
        no act-order); any other is decoded and encoded anew.
    output : str or Path
        The file; must not exist and end in ``.gguf``.
    type : str
        One of `qkern.gguf.MIXTURES`, such as ``q4_k_m``, ``q8_0`` or ``f16``. The quantized ones are
        llama.cpp's mixtures: the output matrix, and in most some others, get more bits.
    assignment : MixedPrecision, mapping, str or Path, optional
        Types of matrices by transformers' names, or the JSON file that holds them; ``"16"`` is the float type
        that is stored. They come before everything else; what they leave out is the mixture's.
    tensor_types : mapping, optional
        From regular expression to type, such as ``{"ffn_down": "q6_k"}``: types of the tensors in whose
        name (llama.cpp's) the expression is found, in place of the mixture's. The first that matches wins.
    token_embedding_type, output_tensor_type : str, optional
        Types of the embedding and the output matrix; they come before `tensor_types`. Where the two are
        tied, the one there is gets the embedding's, or without that the output's, as in llama.cpp, which
        takes no tied embedding for an output if `pure`: there is none to name then.
    pure : bool
        The mixture's base type for every matrix that `tensor_types` does not name.
    pre_tokenizer : str, optional
        llama.cpp's name of the pre-tokenizer, where it is not recognized; byte-level tokenizers have one.
    method : {"rtn", "gptq", "awq"}
        How the codes of the linears in the layers are chosen. ``"rtn"``: least squared error, weighed by
        the importance if there is one. ``"gptq"``: on the blocks' own scales, later columns making up for the
        error of earlier ones. ``"awq"``: as ``"rtn"``, after scales were folded into the weights. The last
        two need a calibration and a 16-bit model without experts; embeddings and head are rounded to nearest.
    calibration : optional
        Texts as in `qkern.imatrix`, whose parameters `samples`, `length`, `seed` and `device` are: the error
        of each column counts by how strongly they drive it. The model must then be a 16-bit causal LM. With
        ``"rtn"`` the file is that of `qkern.imatrix` and `imatrix`, which leave an untied head alone.
    imatrix : str, Path or Imatrix, optional
        The same from an importance matrix that was made before, by qkern or by llama.cpp. As in llama.cpp
        it may be given for types that have no use for it, which is said in a warning.
    max_shard_size : int or str, optional
        Write files of at most this size of tensors each, such as ``"5GB"``, a larger tensor in a file of its
        own; default: one file.
    modelfile : bool
        Write Ollama's ``Modelfile`` beside the file.
    dry_run : bool
        Write nothing, run nothing and encode nothing; the report has the sizes all the same, to the byte,
        and what a run would refuse before it reads the weights is refused.

    Returns
    -------
    GGUFReport
        What was written, or would be.

    Raises
    ------
    UnsupportedError
        If type or architecture are not offered.
    InputError
        If the folder is missing, a file exists, weights are NaN or Inf, `tensor_types` fits no tensor or
        not the rows of one, the mixture needs an importance matrix, the one that is given was made for
        another model, or an argument has no use beside the others.
    FormatError
        If the checkpoint or the importance matrix is incomplete or damaged.
    """
    if not isinstance(model, (str, PathLike)):
        raise InputError(
            f"export_gguf reads a folder or hub id: got {model.__class__.__name__}; write the model with "
            "qkern.save first"
        )
    mixture = mixture_for(type)
    mixed = None if assignment is None else MixedPrecision.of(assignment)
    drawn: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "device": device}
    check_gguf_request(method, calibration, imatrix, drawn)
    overrides = partial(_overrides, tensor_types or {}, token_embedding_type, output_tensor_type)
    overrides(tied=False)  # refuses what is no type before a folder is opened
    path = Path(output)
    max_shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    check_gguf_output(path, modelfile=modelfile, in_parts=max_shard_size is not None)
    matrix = read_imatrix(imatrix) if isinstance(imatrix, (str, Path)) else imatrix
    with QuantizedCheckpoint(model) as checkpoint:
        architecture = architecture_for(str(checkpoint.config.get("model_type")))
        if calibration is not None:
            check_calibration(checkpoint, method)
        config = _checked_config(checkpoint, architecture)
        importance = calibration is not None or imatrix is not None
        plan = _plan(
            checkpoint, architecture, config, mixture, overrides, mixed, pure=pure, importance=importance
        )
        tensors = plan.tensors
        errors: dict[str, float] = {}
        run: ImatrixRun | None = None
        if matrix is not None:
            tensors = with_importance(tensors, matrix, kept=plan.kept)
        elif method != "rtn":
            layers = CalibratedLayers(model, method, calibration, errors=errors, **drawn)
            tensors = layers.applied_to(
                tensors, lambda name, tensor: architecture.to_file_order(name, tensor, config)
            )
        elif calibration is not None:
            if mixed is None:  # an assignment was searched with a calibration, whatever it came to
                _refuse_idle_calibration(tensors)
            run = ImatrixRun(model, calibration, **drawn)
            # What the file says of it is known before it is collected, and takes the same space.
            matrix = Imatrix(entries={}, datasets=(run.dataset,), chunk_count=0, chunk_size=length)
        add_model = _metadata(checkpoint, architecture, config, mixture, model, plan, pre_tokenizer)

        def add_metadata(writer: Any) -> None:
            add_model(writer)
            if matrix is not None:
                _add_imatrix(writer, matrix, imatrix)

        text = ollama_modelfile(checkpoint.folder, path.name) if modelfile else None
        report = partial(_report, mixture, tensors, method=method)
        size = gguf_bytes(architecture.name, tensors, add_metadata, max_shard_bytes=max_shard_bytes)
        files = gguf_files(path, tensors, max_shard_bytes=max_shard_bytes)
        for file in files:
            check_new_file(file)
        # Up to here a dry run goes the same way; from here on weights are read.
        if dry_run:
            return report(Written(files=files, exact={}), size, errors={}, is_dry_run=True)
        if run is not None:
            matrix = run.collect()
            tensors = with_importance(tensors, matrix)
        written = write_gguf(path, architecture.name, tensors, add_metadata, max_shard_bytes=max_shard_bytes)
        size = sum(file.stat().st_size for file in written.files)
        if text is not None:
            write_whole(path.with_name("Modelfile"), text.encode())
        _hint(checkpoint, mixture, plan)
    return report(written, size, errors=errors)


def planned_export(
    model: str | Path, type: str, *, method: str = "rtn", assignment: MixedPrecision | None = None
) -> tuple[list[PlannedTensor], int, set[str]]:
    """Tensors of the file that `export_gguf` would write, its size to the byte, and what was assigned.

    Weights are not read. What was assigned are transformers' names of tensors.

    Parameters and errors are those of `export_gguf`; a calibration is taken for granted where the method
    needs one, and the model must be on this disk.
    """
    mixture = mixture_for(type)
    importance = method != "rtn"
    with QuantizedCheckpoint(model_folder(model, fetch=False)) as checkpoint:
        architecture = architecture_for(str(checkpoint.config.get("model_type")))
        if importance:
            check_calibration(checkpoint, method)
        config = _checked_config(checkpoint, architecture)
        overrides = partial(_overrides, {}, None, None)
        options: dict[str, Any] = {"pure": False, "importance": importance}
        plan = _plan(checkpoint, architecture, config, mixture, overrides, assignment, **options)
        add_metadata = _metadata(checkpoint, architecture, config, mixture, model, plan, None)
        return plan.tensors, gguf_bytes(architecture.name, plan.tensors, add_metadata), plan.assigned


def _checked_config(checkpoint: QuantizedCheckpoint, architecture: GGUFArchitecture) -> dict[str, Any]:
    config: dict[str, Any] = load_config(checkpoint.folder).to_dict()
    architecture.check(config)
    if architecture.is_encoder:
        config["pooling"] = pooling_of(checkpoint.folder)
    return config


def _refuse_idle_calibration(tensors: Sequence[PlannedTensor]) -> None:
    if not any(is_weighed(tensor) and tensor.name.startswith("blk.") for tensor in tensors):
        kinds = sorted({tensor.type.name for tensor in tensors})
        raise InputError(
            f"calibration weighs the errors of codes, and no matrix of the layers gets codes that are "
            f"searched (types are {', '.join(kinds)}): choose another type (--type), or leave calibration out"
        )


def _metadata(
    checkpoint: QuantizedCheckpoint,
    architecture: GGUFArchitecture,
    config: dict[str, Any],
    mixture: Mixture,
    model: str | Path,
    plan: _Plan,
    pre_tokenizer: str | None,
) -> Callable[[Any], None]:
    """Make what a file says of the model, once; return what puts it into a writer."""
    import gguf

    made = gguf.GGUFWriter(None, architecture.name)
    # Of a path or hub id the last part: where a folder lies is nobody else's business.
    name = Path(model).resolve().name if Path(model).is_dir() else Path(model).name
    made.add_name(name_of_model(name, checkpoint.folder, config["vocab_size"]))
    made.add_file_type(mixture.file_type)
    made.add_quantization_version(2)
    made.add_quantized_by(f"qkern {__version__}")
    if plan.grids:
        made.add_string(GGUF_KEY, json.dumps(plan.grids))
    architecture.add_metadata(made, config)
    add_tokenizer(made, checkpoint.folder, config["vocab_size"], pre_tokenizer=pre_tokenizer)
    tokenizer = made.kv_data[0]["tokenizer.ggml.model"].value
    if pre_tokenizer is not None and tokenizer != "gpt2":
        raise InputError(
            f"pre_tokenizer {pre_tokenizer!r} is for byte-level tokenizers, and {checkpoint.folder} has one "
            f"of llama.cpp's kind {tokenizer!r}, which has no pre-tokenizer: leave it out (--pre-tokenizer)"
        )
    return lambda writer: writer.kv_data[0].update(made.kv_data[0])


def _add_imatrix(writer: Any, matrix: Imatrix, source: str | Path | Imatrix | None) -> None:
    """Say where the importance came from, under the keys of llama.cpp's quantizer."""
    if isinstance(source, (str, Path)):
        writer.add_string("quantize.imatrix.file", Path(source).name)
    if matrix.datasets:
        writer.add_string("quantize.imatrix.dataset", matrix.datasets[0])
    writer.add_uint32("quantize.imatrix.entries_count", len(matrix.entries))
    writer.add_uint32("quantize.imatrix.chunks_count", matrix.chunk_count)


def _overrides(
    patterns: Mapping[str, str], embedding: str | None, output: str | None, *, tied: bool
) -> tuple[Override, ...]:
    """List the types that are asked for; the first that fits a tensor counts.

    A tied embedding is the output matrix too.
    """
    ends = {"token_embd" if tied else "output": output}
    if embedding is not None:
        ends["token_embd"] = embedding
    named = {rf"^{name}\.weight$": kind for name, kind in ends.items() if kind is not None}
    return parse_overrides(named) + parse_overrides(patterns)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The tensors of a file in its order, and by their names in it what becomes of quantized ones.

    `keepable` would keep their codes in the mixture's base type, `kept` do, `recoded` get others; `grids` are
    those of `qkern.pipelines.history`; `assigned` are transformers' names of what an assignment names.
    """

    tensors: list[PlannedTensor]
    quantized: set[str]
    keepable: set[str]
    kept: set[str]
    recoded: set[str]
    grids: dict[str, list[str]]
    assigned: set[str]


def _plan(
    checkpoint: QuantizedCheckpoint,
    architecture: GGUFArchitecture,
    config: dict[str, Any],
    mixture: Mixture,
    overrides: Callable[..., tuple[Override, ...]],
    assignment: MixedPrecision | None,
    *,
    pure: bool,
    importance: bool,
) -> _Plan:
    stored = stored_names(checkpoint, architecture)
    tied = bool(config["tie_word_embeddings"]) and _is_tied(checkpoint, stored)
    if tied and not architecture.ties_head and f"{_EMBEDDING}.weight" in stored:
        stored[f"{_HEAD}.weight"] = stored[f"{_EMBEDDING}.weight"]
        tied = False
    shapes = architecture.shapes(config, tied=tied)
    unused = frozenset({f"{_HEAD}.weight"}) if tied else frozenset()
    sources = find_sources(checkpoint, architecture, shapes, stored, unused=unused)
    for name, shape in shapes.items():
        sources[name].check_shape(checkpoint, shape)
    names = architecture.names(config)
    tensors = [
        PlannedTensor(
            name=name,
            source=f"rotary factors ({name})",
            type=gguf_type("f32"),
            shape=tuple(factors.shape),
            read=partial(_same, factors),
        )
        for name, factors in rope_tensors(config).items()
    ]
    base = gguf_type(mixture.base)
    kept = {names[name] for name, source in sources.items() if source.keeps_codes(checkpoint, base)}
    assigned: dict[str, GGUFType] = {}
    if assignment is not None:
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
        assigned = _assigned(checkpoint, architecture, config, sources, matrices, assignment)
    exact = parse_overrides({rf"^{re.escape(names[name])}$": kind.name for name, kind in assigned.items()})
    types = choose_types(
        mixture,
        {names[name]: shape for name, shape in shapes.items()},
        ModelFacts.from_config(architecture.name, config, importance=importance),
        # Pure, llama.cpp takes no tied embedding for the output matrix: that an output has no tensor is told.
        overrides=exact + overrides(tied=f"{_HEAD}.weight" not in shapes and not pure),
        pure=pure or kept,
    )
    for name, shape in shapes.items():
        read = partial(_read, checkpoint, sources[name], name, architecture, config)
        kind = types[names[name]]
        tensors.append(PlannedTensor(name=names[name], source=name, type=kind, shape=shape, read=read))
    said = folder_grids(checkpoint.folder)
    passed = {name: source.grids(checkpoint, types[names[name]], said) for name, source in sources.items()}
    quantized = {names[name]: source for name, source in sources.items() if source.is_quantized(checkpoint)}
    return _Plan(
        tensors=tensors,
        quantized=set(quantized),
        recoded={name for name, source in quantized.items() if not source.keeps(checkpoint, types[name])},
        keepable=kept,
        kept={name for name in kept if types[name].name == mixture.base},
        grids={names[name].removesuffix(".weight"): grids for name, grids in passed.items() if grids},
        assigned=set(assigned),
    )


def _assigned(
    checkpoint: QuantizedCheckpoint,
    architecture: GGUFArchitecture,
    config: dict[str, Any],
    sources: Mapping[str, Source],
    matrices: Mapping[str, tuple[int, ...]],
    assignment: MixedPrecision,
) -> dict[str, GGUFType]:
    """Types that an assignment gives tensors, by transformers' names."""
    experts = expert_count(config)
    parts = {
        name: [piece.removesuffix(".weight") for piece in architecture.pieces(name, experts)]
        for name in matrices
    }
    found = assignment.gguf_types(chain.from_iterable(parts.values()))
    types = {}
    for name, pieces in parts.items():
        kinds = [found[piece] for piece in pieces if piece in found]
        if not kinds:
            continue
        if len(kinds) < len(pieces) or len(set(kinds)) > 1:
            raise InputError(
                f"{name} is one tensor of a GGUF, and the assignment names {len(kinds)} of its {len(pieces)} "
                f"experts, with {', '.join(sorted(set(map(spell_choice, kinds))))}: give all of them the same"
            )
        kind = kinds[0]
        K = matrices[name][-1]
        if kind is not None and K % kind.block:
            raise InputError(
                f"the assignment gives {pieces[0]} {kind.name}, whose blocks of {kind.block} do not divide "
                f"its rows of {K} weights: choose another type"
            )
        if kind is None:
            (stored, *_) = sources[name].stored
            dtype = torch.float16 if stored in checkpoint.entries else checkpoint.tensors[stored].dtype
            kind = {torch.bfloat16: gguf_type("bf16"), torch.float16: gguf_type("f16")}.get(
                dtype, gguf_type("f32")
            )
        types[name] = kind
    return types


def _is_tied(checkpoint: QuantizedCheckpoint, stored: dict[str, str]) -> bool:
    """Whether the head really is the embedding; a checkpoint may hold a head of its own all the same."""
    head, embedding = stored.get(f"{_HEAD}.weight"), stored.get(f"{_EMBEDDING}.weight")
    if head is None or embedding is None:
        return True
    if head in checkpoint.entries or embedding in checkpoint.entries:
        return False
    tensors = checkpoint.tensors[head], checkpoint.tensors[embedding]
    return tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors)


def _read(
    checkpoint: QuantizedCheckpoint,
    source: Source,
    name: str,
    architecture: GGUFArchitecture,
    config: dict[str, Any],
) -> Tensor | QuantizedWeight:
    def reorder(tensor: Tensor) -> Tensor:
        return architecture.to_file_order(name, tensor, config)

    value = source.read(checkpoint)
    if isinstance(value, QuantizedWeight):
        return value if len(value.shape) == 3 else map_rows(value, reorder)
    return reorder(value)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _hint(checkpoint: QuantizedCheckpoint, mixture: Mixture, plan: _Plan) -> None:
    """Say what was rounded a second time, and which type would have kept the codes."""
    if not plan.recoded:
        return
    kind = exact_type(entry.scheme for entry in checkpoint.entries.values() if not entry.act_order)
    advice = "no type of GGUF keeps their codes: export the 16-bit original, if there is one"
    if kind is not None and kind.name != mixture.base:
        advice = f"--type {kind.name} keeps their codes"
    elif plan.recoded <= plan.keepable:
        advice = f"{mixture.base} keeps their codes: leave out the types that were asked for them"
    logger.warning(
        "%d of %d quantized tensors were rounded a second time; %s",
        len(plan.recoded),
        len(plan.quantized),
        advice,
    )


def _report(
    mixture: Mixture,
    tensors: list[PlannedTensor],
    written: Written,
    size: int,
    *,
    method: str,
    errors: dict[str, float],
    is_dry_run: bool = False,
) -> GGUFReport:
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    exact_counts = {tensor.type.name: 0 for tensor in tensors}
    for tensor in tensors:
        exact_counts[tensor.type.name] += written.exact.get(tensor.name, False)
        counts[tensor.type.name] += 1
        weights[tensor.type.name] += tensor.weights
    return GGUFReport(
        path=written.files[0],
        files=tuple(written.files),
        type=mixture.name,
        counts=dict(counts),
        weights=dict(weights),
        file_bytes=size,
        bpw_file=8 * size / weights.total(),
        tensors=tuple(
            TensorReport(
                name=tensor.name,
                source=tensor.source,
                type=tensor.type.name,
                shape=tensor.shape,
                bytes=tensor.bytes,
            )
            for tensor in tensors
        ),
        exact=written.exact,
        exact_counts=exact_counts,
        method=method,
        errors=errors,
        is_dry_run=is_dry_run,
    )
