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
from qkern.checkpoints import QuantizedCheckpoint
from qkern.errors import FormatError, InputError
from qkern.gguf import PlannedTensor, add_tokenizer, architecture_for, mixture_for, write_gguf
from qkern.gguf.architectures import rope_factors
from qkern.gguf.imatrix import Imatrix, read_imatrix
from qkern.gguf.mixture import choose_type
from qkern.gguf.writer import check_new_file
from qkern.ops import dequantize_groupwise
from qkern.ops.gguf_types import gguf_type
from qkern.pipelines.gguf_methods import CalibratedLayers, check_method
from qkern.pipelines.imatrix import imatrix as collect_imatrix
from qkern.pipelines.imatrix import with_importance
from qkern.schemes import QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

    from qkern.gguf import GGUFArchitecture, Mixture

__all__ = ["GGUFReport", "export_gguf"]

logger = logging.getLogger(__name__)

_HEAD: Final = "lm_head"
_EMBEDDING: Final = "model.embed_tokens"
# Buffers that some checkpoints carry and every loader computes.
_COMPUTED: Final = ("rotary_emb.inv_freq", "self_attn.masked_bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFReport:
    """What was written.

    Parameters
    ----------
    path : Path
        The file.
    type : str
        The mixture.
    counts : dict
        Tensors of each type.
    weights : dict
        Weights of each type.
    file_bytes : int
        Size of the file.
    bpw_file : float
        All bits of the file over all weights.
    method : str
        How the codes of the linears were chosen.
    errors : dict
        For ``"gptq"`` and ``"awq"``: linear to the squared error of its outputs, relative.
    """

    path: Path
    type: str
    counts: dict[str, int]
    weights: dict[str, int]
    file_bytes: int
    bpw_file: float
    method: str
    errors: dict[str, float]


def export_gguf(
    model: str | Path,
    output: str | Path,
    type: str = "q4_k_m",
    *,
    pure: bool = False,
    pre_tokenizer: str | None = None,
    method: str = "rtn",
    calibration: Any = None,
    imatrix: str | Path | Imatrix | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
) -> GGUFReport:
    """Write a model as one GGUF file, a tensor at a time.

    Parameters
    ----------
    model : str or Path
        Folder or hub id of a Llama, Mistral, Qwen2 or Qwen3 model: 16-bit, or quantized in a format
        that qkern reads (its weights are decoded and encoded anew).
    output : str or Path
        The file; must not exist. In the model's folder its name must end in ``.gguf``.
    type : str
        ``q8_0``, ``q4_0``, ``q4_1``, ``q5_0``, ``q5_1``, ``q4_k_m``, ``q6_k``, ``f16``, ``bf16`` or ``f32``.
        The quantized ones are llama.cpp's mixtures: the output matrix, and in ``q4_k_m`` some others,
        get more bits.
    pure : bool
        The mixture's base type for every matrix.
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

    Returns
    -------
    GGUFReport
        What was written.

    Raises
    ------
    UnsupportedError
        If type or architecture are not offered.
    InputError
        If the folder is missing, the file exists, weights are NaN or Inf, or the importance matrix was made
        for another model.
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
    path = Path(output)
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
    if calibration is not None and method == "rtn":
        matrix = collect_imatrix(model, calibration=calibration, **drawn)
    errors: dict[str, float] = {}
    with QuantizedCheckpoint(model) as checkpoint:
        architecture = architecture_for(str(checkpoint.config.get("model_type")))
        config = _full_config(checkpoint)
        tensors = _plan(checkpoint, architecture, config, mixture, pure=pure)
        if matrix is not None:
            tensors = with_importance(tensors, matrix)
        if method != "rtn":
            layers = CalibratedLayers(model, method, calibration, errors=errors, **drawn)
            tensors = layers.applied_to(
                tensors, lambda name, tensor: architecture.to_file_order(name, tensor, config)
            )

        def add_metadata(writer: Any) -> None:
            # Of a path or hub id the last part: where a folder lies is nobody else's business.
            writer.add_name(Path(model).resolve().name if Path(model).is_dir() else Path(model).name)
            writer.add_file_type(mixture.file_type)
            writer.add_quantization_version(2)
            writer.add_quantized_by(f"qkern {__version__}")
            if matrix is not None:
                _add_imatrix(writer, matrix, imatrix)
            architecture.add_metadata(writer, config)
            add_tokenizer(writer, checkpoint.folder, config["vocab_size"], pre_tokenizer=pre_tokenizer)

        write_gguf(path, architecture.name, tensors, add_metadata)
    return _report(path, mixture, tensors, method, errors)


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
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        file = checkpoint.folder / "config.json"
        raise FormatError(f"{file} is no configuration that transformers reads: {error}") from error
    return config


def _plan(
    checkpoint: QuantizedCheckpoint,
    architecture: GGUFArchitecture,
    config: dict[str, Any],
    mixture: Mixture,
    *,
    pure: bool,
) -> list[PlannedTensor]:
    """List the tensors of the file, with their types, in its order."""
    stored = _stored_names(checkpoint)
    tied = bool(config["tie_word_embeddings"]) and _is_tied(checkpoint, stored)
    shapes = architecture.shapes(config, tied=tied)
    missing = [name for name in shapes if name not in stored]
    ignored = {f"{_HEAD}.weight"} if tied else set()
    left_over = [
        name for name in stored if name not in shapes and name not in ignored and not name.endswith(_COMPUTED)
    ]
    if missing or left_over:
        raise FormatError(
            f"{checkpoint.folder} does not fit its config.json: missing are {missing[:8]}, "
            f"left over are {left_over[:8]}; fetch it again"
        )
    names = architecture.names(config)
    tensors = []
    factors = rope_factors(config)
    if factors is not None:
        tensors.append(
            PlannedTensor(
                name="rope_freqs.weight",
                source="rotary factors",
                type=gguf_type("f32"),
                shape=tuple(factors.shape),
                read=lambda: factors,
            )
        )
    for name, shape in shapes.items():
        kind = choose_type(
            mixture,
            names[name],
            shape,
            layers=config["num_hidden_layers"],
            tied=tied,
            is_70b=architecture.is_70b(config),
            pure=pure,
        )
        if kind.name == "f16" and mixture.base not in ("f16", "f32"):
            logger.warning("%s stays f16: no quantized type divides its rows of %d", name, shape[-1])
        read = partial(_read, checkpoint, stored[name], name, architecture, config)
        tensors.append(PlannedTensor(name=names[name], source=name, type=kind, shape=shape, read=read))
    return tensors


def _stored_names(checkpoint: QuantizedCheckpoint) -> dict[str, str]:
    """Tensor names of the architecture to names in the checkpoint."""
    names = {}
    for stored in checkpoint:
        name = f"{stored}.weight" if stored in checkpoint.entries else stored
        # Files of a bare decoder leave the prefix out.
        if not name.startswith(("model.", f"{_HEAD}.")):
            name = f"model.{name}"
        names[name] = stored
    return names


def _is_tied(checkpoint: QuantizedCheckpoint, stored: dict[str, str]) -> bool:
    """Whether the head really is the embedding; a checkpoint may hold a head of its own all the same."""
    head, embedding = stored.get(f"{_HEAD}.weight"), stored.get(f"{_EMBEDDING}.weight")
    if head is None or embedding is None:
        return True
    if head in checkpoint.entries or embedding in checkpoint.entries:
        return False
    return torch.equal(checkpoint.tensors[head], checkpoint.tensors[embedding])


def _read(
    checkpoint: QuantizedCheckpoint,
    stored: str,
    name: str,
    architecture: GGUFArchitecture,
    config: dict[str, Any],
) -> Tensor:
    value = checkpoint[stored]
    tensor = dequantize_groupwise(value) if isinstance(value, QuantizedWeight) else value
    return architecture.to_file_order(name, tensor, config)


def _report(
    path: Path, mixture: Mixture, tensors: list[PlannedTensor], method: str, errors: dict[str, float]
) -> GGUFReport:
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.type.name] += 1
        weights[tensor.type.name] += tensor.weights
    size = path.stat().st_size
    return GGUFReport(
        path=path,
        type=mixture.name,
        counts=dict(counts),
        weights=dict(weights),
        file_bytes=size,
        bpw_file=8 * size / weights.total(),
        method=method,
        errors=errors,
    )
