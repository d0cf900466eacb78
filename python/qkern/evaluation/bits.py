"""Bits per weight, always both: of the linear layers, and of everything that lies on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qkern.errors import FormatError, InputError
from qkern.gguf import GGUFFile
from qkern.gguf.reader import gguf_parts
from qkern.nn import QuantLinear, expert_parameters, named_linears

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = ["bpw_file", "bpw_linear", "file_bytes", "gguf_bpw_linear", "parameter_count"]


def bpw_linear(model: nn.Module, *, skip: Sequence[str] = ("lm_head",)) -> float:
    """Bits per weight of the linear layers: codes, scales and zero points over N * K, biases left out.

    A linear layer that was not quantized counts with the bits of its dtype, and so do experts in 3-D
    parameters: leaving layers out does not look like compression.

    Parameters
    ----------
    model : nn.Module
        A model with `QuantLinear`, `nn.Linear` or transformers' ``Conv1D`` modules.
    skip : sequence of str
        Layers that do not count: names, name suffixes or patterns. Default: the output head.

    Returns
    -------
    float
        For example 4.125 for w4g128 with fp16 scales.

    Raises
    ------
    InputError
        If the model has no linear layer.
    """
    bits = weights = 0
    for module in named_linears(model, skip=skip).values():
        if isinstance(module, QuantLinear):
            bits += module.stored_bits
            weights += module.out_features * module.in_features
        else:
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            bits += 8 * weight.nbytes
            weights += weight.numel()
    for name in expert_parameters(model, skip=skip):
        stack = model.get_parameter(name)
        bits += 8 * stack.nbytes
        weights += stack.numel()
    if weights == 0:
        raise InputError("the model has no linear layer to count; pass a causal LM")
    return bits / weights


def bpw_file(path: str | Path, *, parameters: int | None = None) -> float:
    """Bits per weight on disk: all bytes of the weight files over all parameters of the model.

    Parameters
    ----------
    path : str or Path
        A ``.gguf`` file (of a split one any part), a ``.safetensors`` file or a model folder (its
        ``*.safetensors`` count, headers included; tokenizer and configuration do not).
    parameters : int, optional
        Parameters of the unquantized model, tied ones once; default: `parameter_count` of `path`.

    Returns
    -------
    float
        Bits per weight.

    Raises
    ------
    InputError
        If there is nothing to weigh at `path`.
    """
    return 8 * file_bytes(path) / (parameter_count(path) if parameters is None else parameters)


def file_bytes(path: str | Path) -> int:
    """Bytes of the weight files that `bpw_file` counts; of a split GGUF all parts.

    Raises
    ------
    InputError
        If there is nothing to weigh at `path`.
    """
    return sum(file.stat().st_size for file in _weight_files(Path(path)))


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return list(gguf_parts(path))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"no weight files at {path}: name a .gguf or .safetensors file or a model folder")
    return files


def gguf_bpw_linear(path: str | Path) -> float:
    """`bpw_linear` of a GGUF: matrices of its layers but routers, whether qkern decodes their types or not.

    Raises
    ------
    InputError
        If there is no such file, or no matrix in it.
    FormatError
        If it is damaged.
    """
    with GGUFFile(path) as file:
        matrices = [
            tensor
            for name, tensor in file.tensors.items()
            if name.startswith("blk.")
            and name.endswith(".weight")
            and not name.endswith(".ffn_gate_inp.weight")  # no linear in a model either
            and len(tensor.shape) > 1
        ]
    if not matrices:
        raise InputError(f"{path} has no matrix in its layers to count; name a causal LM")
    bits = 8 * sum(matrix.bytes for matrix in matrices)
    return bits / sum(math.prod(matrix.shape) for matrix in matrices)


def parameter_count(path: str | Path) -> int:
    """Parameters of the unquantized model at `path`, tied ones once.

    For a GGUF the elements of its tensors; for a model folder those of the architecture that its
    ``config.json`` describes, however they are stored.

    Raises
    ------
    InputError
        If `path` is neither.
    FormatError
        If the file or the configuration cannot be read.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        with GGUFFile(path) as file:
            return sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json to count parameters by; pass parameters=")
    return _architecture_parameters(folder)


def _architecture_parameters(folder: Path) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config: Any = AutoConfig.from_pretrained(folder)
        # The plain architecture is counted; how the checkpoint packs it does not matter.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, json.JSONDecodeError, OSError) as error:
        raise FormatError(f"cannot build what {folder}/config.json describes: {error}") from error
    return sum(parameter.numel() for parameter in model.parameters())
