"""GGUF blocks to rows of floats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.gguf_decode import cpu, reference
from qkern.ops.gguf_types import gguf_type
from qkern.ops.registry import Backend, Implementation, Request, register, select

__all__ = ["gguf_decode"]

register(
    Implementation(
        op="gguf_decode", backend=Backend.REFERENCE, call=reference.decode, why_not=lambda request: None
    )
)
register(Implementation(op="gguf_decode", backend=Backend.CPU, call=cpu.decode, why_not=cpu.why_not))


def gguf_decode(raw: Tensor, type: str, *, backend: str = "auto") -> Tensor:
    """Decode rows of GGUF blocks.

    Parameters
    ----------
    raw : Tensor
        uint8 ``[..., row bytes]``; the row bytes are a multiple of the type's block bytes.
    type : str
        A type of `gguf_encode`.
    backend : str
        ``"auto"`` or a `Backend`; the bits are the same in all.

    Returns
    -------
    Tensor
        fp32 ``[..., K]``.

    Raises
    ------
    UnsupportedError
        On a type of llama.cpp's that is not decoded.
    InputError
        On an unknown type, or bytes that are not whole blocks.
    """
    kind = gguf_type(type)
    if raw.dtype != torch.uint8 or raw.dim() == 0 or raw.shape[-1] % kind.bytes:
        raise InputError(
            f"{kind.name} rows are uint8 in multiples of {kind.bytes} bytes: "
            f"got {raw.dtype} {tuple(raw.shape)}"
        )
    implementation = select("gguf_decode", backend, Request(device=raw.device))
    rows = raw.reshape(math.prod(raw.shape[:-1]), raw.shape[-1]).contiguous()
    K = raw.shape[-1] // kind.bytes * kind.block
    if kind.name == "f32":
        return rows.clone().reshape(-1).view(torch.float32).reshape(*raw.shape[:-1], K)
    decoded: Tensor = implementation.call(rows, kind)
    return decoded.reshape(*raw.shape[:-1], K)
