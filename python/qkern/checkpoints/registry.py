"""The formats by name, and which of them a configuration describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from qkern.checkpoints.awq import AWQ
from qkern.checkpoints.base import config_field
from qkern.checkpoints.bitsandbytes import BITSANDBYTES, LLM_INT8
from qkern.checkpoints.compressed_tensors import COMPRESSED_TENSORS, MIXED, STORED
from qkern.checkpoints.gptq import GPTQ, GPTQ_V2
from qkern.errors import FormatError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qkern.checkpoints.base import Format
    from qkern.schemes import Scheme

__all__ = ["FORMATS", "detect", "format_named", "refusals"]

FORMATS: Final[dict[str, Format]] = {
    fmt.name: fmt for fmt in (GPTQ, GPTQ_V2, AWQ, COMPRESSED_TENSORS, BITSANDBYTES)
}


def format_named(name: str) -> Format:
    """Return a format by name.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name not in FORMATS:
        raise InputError(f"unknown checkpoint format: got {name!r}, allowed are {', '.join(FORMATS)}")
    return FORMATS[name]


def refusals(
    fmt: Format, layers: Mapping[str, tuple[Scheme, int, int]], *, act_order: bool = False
) -> dict[str, str]:
    """Why `fmt` cannot hold some of the layers, by name; ask before hours of work.

    Parameters
    ----------
    fmt : Format
        The output format.
    layers : mapping
        Layer name to scheme, N and K.
    act_order : bool
        Whether the layers will have a group index.
    """
    reasons = {name: fmt.holds(scheme, N, K, act_order=act_order) for name, (scheme, N, K) in layers.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def detect(config: Mapping[str, Any]) -> tuple[Format, Mapping[str, Any]] | None:
    """Format that a model's config.json describes, and its ``quantization_config``; None if it has none.

    Raises
    ------
    FormatError
        If it describes one that qkern does not read.
    """
    quantization = config_field(config, "quantization_config", dict, None)
    if quantization is None:
        return None
    method = config_field(quantization, "quant_method", str)
    if method == "gptq":
        version = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
        if version in (GPTQ.name, GPTQ_V2.name):
            return FORMATS[version], quantization
        raise FormatError(f"GPTQ checkpoint format {version!r} is not read: allowed are 'gptq' and 'gptq_v2'")
    if method == "awq":
        version = str(quantization.get("version", "gemm")).lower()
        if version == "gemm":
            return AWQ, quantization
        raise FormatError(f"AWQ version {version!r} is not read: allowed is 'gemm'")
    if method == "compressed-tensors":
        version = quantization.get("format")
        # Newer files say mixed-precision here and name the format in each group.
        if version in (*STORED, MIXED):
            return COMPRESSED_TENSORS, quantization
        raise FormatError(
            f"compressed-tensors format {version!r} is not read: allowed are {', '.join((*STORED, MIXED))}"
        )
    if method == "bitsandbytes":
        int8 = config_field(quantization, "load_in_8bit", bool, False)
        return LLM_INT8 if int8 else BITSANDBYTES, quantization
    raise FormatError(
        f"quant_method {method!r} is not read: allowed are 'gptq', 'awq', 'compressed-tensors' and "
        "'bitsandbytes'; quantize the original model again with qkern"
    )
