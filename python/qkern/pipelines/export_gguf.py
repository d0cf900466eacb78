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
from qkern.gguf.mixture import choose_type
from qkern.gguf.quantized import exact_type, map_rows, same_grid
from qkern.ops.gguf_types import gguf_type
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
    exact : dict
        Of each tensor by its name in the file whether it decodes to exactly the weights of the model.
    exact_counts : dict
        How many of each type do.
    """

    path: Path
    type: str
    counts: dict[str, int]
    weights: dict[str, int]
    file_bytes: int
    bpw_file: float
    exact: dict[str, bool]
    exact_counts: dict[str, int]


def export_gguf(
    model: str | Path,
    output: str | Path,
    type: str = "q4_k_m",
    *,
    pure: bool = False,
    pre_tokenizer: str | None = None,
) -> GGUFReport:
    """Write a model as one GGUF file, a tensor at a time.

    Parameters
    ----------
    model : str or Path
        Folder or hub id of a Llama, Mistral, Qwen2 or Qwen3 model: 16-bit, or quantized in a format
        that qkern reads. A layer whose codes the type holds keeps them (symmetric 2 to 4 bits in ``q4_0``,
        with zero points in ``q5_0``, any of these and symmetric 8 bits in ``q8_0``; groups a multiple of 32,
        no act-order); any other is decoded and encoded anew.
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

    Returns
    -------
    GGUFReport
        What was written.

    Raises
    ------
    UnsupportedError
        If type or architecture are not offered.
    InputError
        If the folder is missing, the file exists, or weights are NaN or Inf.
    FormatError
        If the checkpoint is incomplete or damaged.
    """
    mixture = mixture_for(type)
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
        tensors = _plan(checkpoint, architecture, config, mixture, pure=pure)

        def add_metadata(writer: Any) -> None:
            # Of a path or hub id the last part: where a folder lies is nobody else's business.
            writer.add_name(Path(model).resolve().name if Path(model).is_dir() else Path(model).name)
            writer.add_file_type(mixture.file_type)
            writer.add_quantization_version(2)
            writer.add_quantized_by(f"qkern {__version__}")
            architecture.add_metadata(writer, config)
            add_tokenizer(writer, checkpoint.folder, config["vocab_size"], pre_tokenizer=pre_tokenizer)

        written = write_gguf(path, architecture.name, tensors, add_metadata)
        _hint(checkpoint, mixture, tensors, written.exact)
    return _report(path, mixture, tensors, written.exact)


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
            pure=pure or _keeps_codes(checkpoint, stored[name], mixture),
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


def _keeps_codes(checkpoint: QuantizedCheckpoint, stored: str, mixture: Mixture) -> bool:
    """Whether a layer is quantized on the grid of the base type: more bits would not serve it."""
    entry = checkpoint.entries.get(stored)
    return entry is not None and same_grid(gguf_type(mixture.base), entry.scheme)


def _read(
    checkpoint: QuantizedCheckpoint,
    stored: str,
    name: str,
    architecture: GGUFArchitecture,
    config: dict[str, Any],
) -> Tensor | QuantizedWeight:
    def reorder(tensor: Tensor) -> Tensor:
        return architecture.to_file_order(name, tensor, config)

    value = checkpoint[stored]
    return map_rows(value, reorder) if isinstance(value, QuantizedWeight) else reorder(value)


def _hint(
    checkpoint: QuantizedCheckpoint, mixture: Mixture, tensors: list[PlannedTensor], exact: dict[str, bool]
) -> None:
    """Name the type that would have kept the codes of a quantized checkpoint."""
    quantized = [tensor for tensor in tensors if tensor.source.removesuffix(".weight") in checkpoint.entries]
    rounded = sum(not exact[tensor.name] for tensor in quantized)
    kind = exact_type(entry.scheme for entry in checkpoint.entries.values() if not entry.act_order)
    if rounded and kind is not None and kind.name != mixture.base:
        logger.info(
            "%d of %d quantized layers were rounded a second time; --type %s keeps their codes",
            rounded,
            len(quantized),
            kind.name,
        )


def _report(path: Path, mixture: Mixture, tensors: list[PlannedTensor], exact: dict[str, bool]) -> GGUFReport:
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    exact_counts = {tensor.type.name: 0 for tensor in tensors}
    for tensor in tensors:
        exact_counts[tensor.type.name] += exact[tensor.name]
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
        exact=exact,
        exact_counts=exact_counts,
    )
