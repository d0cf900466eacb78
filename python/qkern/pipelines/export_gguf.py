"""Exporting a model folder, plain or quantized, to a GGUF that llama.cpp runs."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern import __version__
from qkern.checkpoints import QuantizedCheckpoint, parse_size
from qkern.errors import FormatError, InputError
from qkern.gguf import PlannedTensor, add_tokenizer, architecture_for, mixture_for, write_gguf
from qkern.gguf.imatrix import Imatrix, read_imatrix
from qkern.gguf.mixture import ModelFacts, choose_types
from qkern.gguf.modelfile import ollama_modelfile
from qkern.gguf.overrides import parse_overrides
from qkern.gguf.pooling import pooling_of
from qkern.gguf.quantized import exact_type, map_rows, same_grid
from qkern.gguf.rope import rope_tensors
from qkern.gguf.tokenizer import name_of_model
from qkern.gguf.writer import Written, check_new_file, gguf_bytes, gguf_files, write_whole
from qkern.ops.gguf_types import gguf_type
from qkern.pipelines.gguf_methods import CalibratedLayers, check_method
from qkern.pipelines.gguf_sources import find_sources, stored_names
from qkern.pipelines.imatrix import dataset_of, with_importance
from qkern.pipelines.imatrix import imatrix as collect_imatrix
from qkern.schemes import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from qkern.gguf import GGUFArchitecture, Mixture
    from qkern.gguf.overrides import Override
    from qkern.pipelines.gguf_sources import Source

__all__ = ["GGUFReport", "TensorReport", "export_gguf"]

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
    type : str
        Its type.
    shape : tuple of int
        As torch has it.
    bytes : int
        Its size, padding left out.
    """

    name: str
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
        For ``"gptq"`` and ``"awq"``: linear to the squared error of its outputs, relative.
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
    tensor_types: Mapping[str, str] | None = None,
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
        The file; must not exist. In the model's folder its name must end in ``.gguf``.
    type : str
        One of `qkern.gguf.MIXTURES`, such as ``q4_k_m``, ``q8_0`` or ``f16``. The quantized ones are
        llama.cpp's mixtures: the output matrix, and in most some others, get more bits.
    tensor_types : mapping, optional
        From regular expression to type, such as ``{"ffn_down": "q6_k"}``: types of the tensors in whose
        name (llama.cpp's) the expression is found, in place of the mixture's. The first that matches wins.
    pure : bool
        The mixture's base type for every matrix that `tensor_types` does not name.
    pre_tokenizer : str, optional
        llama.cpp's name of the pre-tokenizer, where it is not recognized.
    method : {"rtn", "gptq", "awq"}
        How the codes of the linears in the layers are chosen. ``"rtn"``: least squared error, weighed by
        the importance if there is one. ``"gptq"``: on the blocks' own scales, later columns making up for the
        error of earlier ones. ``"awq"``: as ``"rtn"``, after scales were folded into the weights. The last
        two need a calibration and a 16-bit model; embeddings and head are rounded to nearest.
    calibration : optional
        Texts as in `qkern.imatrix`, whose parameters `samples`, `length`, `seed` and `device` are: the error
        of each column counts by how strongly they drive it. The model must then be a 16-bit one.
    imatrix : str, Path or Imatrix, optional
        The same from an importance matrix that was made before, by qkern or by llama.cpp.
    max_shard_size : int or str, optional
        Write files of at most this size of tensors each, such as ``"5GB"``; default: one file.
    modelfile : bool
        Write Ollama's ``Modelfile`` beside the file.
    dry_run : bool
        Write nothing and encode nothing; the report has the sizes all the same, to the byte.

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
        not the rows of one, the mixture needs an importance matrix, or the one that is given was made for
        another model.
    FormatError
        If the checkpoint or the importance matrix is incomplete or damaged.
    """
    mixture = mixture_for(type)
    check_method(method, calibration, imatrix)
    if calibration is not None and imatrix is not None:
        raise InputError(
            "calibration and imatrix are two sources of the same importance: give one (--calibration FILE or "
            "--imatrix FILE)"
        )
    overrides = parse_overrides(tensor_types or {})
    path = Path(output)
    max_shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    recipe = path.with_name("Modelfile")
    if modelfile and max_shard_size is not None:
        raise InputError("Ollama reads one file: choose modelfile or max_shard_size")
    if modelfile and recipe.exists():
        raise InputError(f"{recipe} exists: remove it or choose another --output")
    if (
        path.suffix != ".gguf"
        and Path(model).is_dir()
        and path.resolve().is_relative_to(Path(model).resolve())
    ):
        raise InputError(
            f"{path} lies in the model folder {model}, where only a .gguf is told from the model's own "
            f"files: name it {path.with_suffix('.gguf').name}, or choose another --output"
        )
    check_new_file(path)
    matrix = read_imatrix(imatrix) if isinstance(imatrix, (str, Path)) else imatrix
    drawn: dict[str, Any] = {"samples": samples, "length": length, "seed": seed, "device": device}
    collects = calibration is not None and method == "rtn"
    if collects:
        # What the file says of it is known before it is collected.
        matrix = Imatrix(entries={}, datasets=(dataset_of(calibration),), chunk_count=0, chunk_size=length)
    with QuantizedCheckpoint(model) as checkpoint:
        architecture = architecture_for(str(checkpoint.config.get("model_type")))
        config = _full_config(checkpoint)
        architecture.check(config)
        if architecture.is_encoder:
            config["pooling"] = pooling_of(checkpoint.folder)
        tensors, quantized = _plan(
            checkpoint,
            architecture,
            config,
            mixture,
            overrides,
            pure=pure,
            importance=calibration is not None or imatrix is not None,
        )

        def add_metadata(writer: Any) -> None:
            # Of a path or hub id the last part: where a folder lies is nobody else's business.
            name = Path(model).resolve().name if Path(model).is_dir() else Path(model).name
            writer.add_name(name_of_model(name, checkpoint.folder))
            writer.add_file_type(mixture.file_type)
            writer.add_quantization_version(2)
            writer.add_quantized_by(f"qkern {__version__}")
            if matrix is not None:
                _add_imatrix(writer, matrix, imatrix)
            architecture.add_metadata(writer, config)
            add_tokenizer(writer, checkpoint.folder, config["vocab_size"], pre_tokenizer=pre_tokenizer)

        text = ollama_modelfile(checkpoint.folder, path.name) if modelfile else None
        report = partial(_report, mixture, tensors, method=method)
        # Lays out the whole file, and so finds what is wrong with it before minutes are spent on activations.
        size = gguf_bytes(architecture.name, tensors, add_metadata, max_shard_bytes=max_shard_bytes)
        files = gguf_files(path, tensors, max_shard_bytes=max_shard_bytes)
        for file in files:
            check_new_file(file)
        if dry_run:
            return report(Written(files=files, exact={}), size, errors={}, is_dry_run=True)
        if collects:
            matrix = collect_imatrix(model, calibration=calibration, **drawn)
        if matrix is not None:
            tensors = with_importance(tensors, matrix)
        errors: dict[str, float] = {}
        if method != "rtn":
            layers = CalibratedLayers(model, method, calibration, errors=errors, **drawn)
            tensors = layers.applied_to(
                tensors, lambda name, tensor: architecture.to_file_order(name, tensor, config)
            )
        written = write_gguf(path, architecture.name, tensors, add_metadata, max_shard_bytes=max_shard_bytes)
        size = sum(file.stat().st_size for file in written.files)
        if text is not None:
            write_whole(recipe, text.encode())
        _hint(checkpoint, mixture, quantized, written)
    return report(written, size, errors=errors)


def _add_imatrix(writer: Any, matrix: Imatrix, source: str | Path | Imatrix | None) -> None:
    """Say where the importance came from, under the keys of llama.cpp's quantizer."""
    if isinstance(source, (str, Path)):
        writer.add_string("quantize.imatrix.file", Path(source).name)
    if matrix.datasets:
        writer.add_string("quantize.imatrix.dataset", matrix.datasets[0])
    writer.add_uint32("quantize.imatrix.entries_count", len(matrix.entries))
    writer.add_uint32("quantize.imatrix.chunks_count", matrix.chunk_count)


def _full_config(checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """Read the configuration with transformers' defaults filled in."""
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=False
        ).to_dict()
    except Exception as error:  # what validates a field raises of its own
        file = checkpoint.folder / "config.json"
        raise FormatError(f"{file} is no configuration that transformers reads: {error}") from error
    return config


def _plan(
    checkpoint: QuantizedCheckpoint,
    architecture: GGUFArchitecture,
    config: dict[str, Any],
    mixture: Mixture,
    overrides: Sequence[Override],
    *,
    pure: bool,
    importance: bool,
) -> tuple[list[PlannedTensor], list[str]]:
    """List the tensors of the file, with their types, in its order; and the names of the quantized ones."""
    stored = stored_names(checkpoint, architecture)
    tied = bool(config["tie_word_embeddings"]) and _is_tied(checkpoint, stored)
    if tied and not architecture.ties_head and f"{_EMBEDDING}.weight" in stored:
        stored[f"{_HEAD}.weight"] = stored[f"{_EMBEDDING}.weight"]
        tied = False
    shapes = architecture.shapes(config, tied=tied)
    unused = frozenset({f"{_HEAD}.weight"}) if tied else frozenset()
    sources = find_sources(checkpoint, architecture, shapes, stored, unused=unused)
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
    chosen = partial(
        choose_types,
        mixture,
        {names[name]: shape for name, shape in shapes.items()},
        ModelFacts.from_config(architecture.name, config, importance=importance),
        overrides=overrides,
    )
    types = chosen(pure=pure)
    unmixed = chosen(pure=True) if checkpoint.entries else types
    for name, shape in shapes.items():
        keeps = _keeps_codes(checkpoint, sources[name], mixture)
        kind = (unmixed if keeps else types)[names[name]]
        read = partial(_read, checkpoint, sources[name], name, architecture, config)
        tensors.append(PlannedTensor(name=names[name], source=name, type=kind, shape=shape, read=read))
    return tensors, [names[name] for name, source in sources.items() if source.is_quantized(checkpoint)]


def _is_tied(checkpoint: QuantizedCheckpoint, stored: dict[str, str]) -> bool:
    """Whether the head really is the embedding; a checkpoint may hold a head of its own all the same."""
    head, embedding = stored.get(f"{_HEAD}.weight"), stored.get(f"{_EMBEDDING}.weight")
    if head is None or embedding is None:
        return True
    if head in checkpoint.entries or embedding in checkpoint.entries:
        return False
    tensors = checkpoint.tensors[head], checkpoint.tensors[embedding]
    return tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors)


def _keeps_codes(checkpoint: QuantizedCheckpoint, source: Source, mixture: Mixture) -> bool:
    """Whether a weight is quantized on the grid of the base type: more bits would not serve it."""
    base, entries = gguf_type(mixture.base), checkpoint.entries
    return source.is_quantized(checkpoint) and all(
        same_grid(base, entries[name].scheme) and not entries[name].act_order for name in source.stored
    )


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


def _hint(checkpoint: QuantizedCheckpoint, mixture: Mixture, quantized: list[str], written: Written) -> None:
    """Name the type that would have kept the codes of a quantized checkpoint."""
    rounded = sum(not written.exact[name] for name in quantized)
    kind = exact_type(entry.scheme for entry in checkpoint.entries.values() if not entry.act_order)
    if rounded and kind is not None and kind.name != mixture.base:
        logger.info(
            "%d of %d quantized tensors were rounded a second time; --type %s keeps their codes",
            rounded,
            len(quantized),
            kind.name,
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
            TensorReport(name=tensor.name, type=tensor.type.name, shape=tensor.shape, bytes=tensor.bytes)
            for tensor in tensors
        ),
        exact=written.exact,
        exact_counts=exact_counts,
        method=method,
        errors=errors,
        is_dry_run=is_dry_run,
    )
