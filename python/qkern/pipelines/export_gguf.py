"""Exporting a model folder, plain or quantized, to a GGUF that llama.cpp runs."""

from __future__ import annotations

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
from qkern.gguf.mixture import ModelFacts, choose_types
from qkern.gguf.overrides import parse_overrides
from qkern.gguf.writer import gguf_bytes
from qkern.ops import dequantize_groupwise
from qkern.ops.gguf_types import gguf_type
from qkern.schemes import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from qkern.gguf import GGUFArchitecture, Mixture
    from qkern.gguf.overrides import Override

__all__ = ["GGUFReport", "TensorReport", "export_gguf"]

_HEAD: Final = "lm_head"
_EMBEDDING: Final = "model.embed_tokens"
# Buffers that some checkpoints carry and every loader computes.
_COMPUTED: Final = ("rotary_emb.inv_freq", "self_attn.masked_bias")


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
    tensors : tuple of TensorReport
        In the order of the file.
    is_dry_run : bool
        Whether nothing was written.
    """

    path: Path
    type: str
    counts: dict[str, int]
    weights: dict[str, int]
    file_bytes: int
    bpw_file: float
    tensors: tuple[TensorReport, ...]
    is_dry_run: bool = False


def export_gguf(
    model: str | Path,
    output: str | Path,
    type: str = "q4_k_m",
    *,
    tensor_types: Mapping[str, str] | None = None,
    pure: bool = False,
    pre_tokenizer: str | None = None,
    dry_run: bool = False,
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
        One of `qkern.gguf.MIXTURES`, such as ``q4_k_m``, ``q8_0`` or ``f16``. The quantized ones are
        llama.cpp's mixtures: the output matrix, and in most some others, get more bits.
    tensor_types : mapping, optional
        From regular expression to type, such as ``{"ffn_down": "q6_k"}``: types of the tensors in whose
        name (llama.cpp's) the expression is found, in place of the mixture's. The first that matches wins.
    pure : bool
        The mixture's base type for every matrix that `tensor_types` does not name.
    pre_tokenizer : str, optional
        llama.cpp's name of the pre-tokenizer, where it is not recognized.
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
        If the folder is missing, the file exists, weights are NaN or Inf, `tensor_types` fits no tensor or
        not the rows of one, or the mixture needs an importance matrix.
    FormatError
        If the checkpoint is incomplete or damaged.
    """
    mixture = mixture_for(type)
    overrides = parse_overrides(tensor_types or {})
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
    with QuantizedCheckpoint(model) as checkpoint:
        architecture = architecture_for(str(checkpoint.config.get("model_type")))
        config = _full_config(checkpoint)
        tensors = _plan(checkpoint, architecture, config, mixture, overrides, pure=pure)

        def add_metadata(writer: Any) -> None:
            # Of a path or hub id the last part: where a folder lies is nobody else's business.
            writer.add_name(Path(model).resolve().name if Path(model).is_dir() else Path(model).name)
            writer.add_file_type(mixture.file_type)
            writer.add_quantization_version(2)
            writer.add_quantized_by(f"qkern {__version__}")
            architecture.add_metadata(writer, config)
            add_tokenizer(writer, checkpoint.folder, config["vocab_size"], pre_tokenizer=pre_tokenizer)

        if dry_run:
            size = gguf_bytes(architecture.name, tensors, add_metadata)
        else:
            write_gguf(path, architecture.name, tensors, add_metadata)
            size = path.stat().st_size
    return _report(path, mixture, tensors, size, is_dry_run=dry_run)


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
    overrides: Sequence[Override],
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
    types = choose_types(
        mixture,
        {names[name]: shape for name, shape in shapes.items()},
        ModelFacts.from_config(architecture.name, config),
        overrides=overrides,
        pure=pure,
    )
    for name, shape in shapes.items():
        kind = types[names[name]]
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
    path: Path, mixture: Mixture, tensors: list[PlannedTensor], size: int, *, is_dry_run: bool
) -> GGUFReport:
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.type.name] += 1
        weights[tensor.type.name] += tensor.weights
    return GGUFReport(
        path=path,
        type=mixture.name,
        counts=dict(counts),
        weights=dict(weights),
        file_bytes=size,
        bpw_file=8 * size / weights.total(),
        tensors=tuple(
            TensorReport(name=tensor.name, type=tensor.type.name, shape=tensor.shape, bytes=tensor.bytes)
            for tensor in tensors
        ),
        is_dry_run=is_dry_run,
    )
