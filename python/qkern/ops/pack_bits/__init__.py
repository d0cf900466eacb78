"""Codes, one to a byte, to and from the bit layouts that files use."""

from __future__ import annotations

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.pack_bits import cpu, cuda, reference
from qkern.ops.registry import Backend, Implementation, Request, register, select
from qkern.schemes import BITS

__all__ = ["LAYOUTS", "pack_bits", "unpack_bits"]

LAYOUTS = tuple(cpu.LAYOUT_CODES)

for _op, _reference, _cpu, _cuda in (
    ("pack_bits", reference.pack, cpu.pack, cuda.pack),
    ("unpack_bits", reference.unpack, cpu.unpack, cuda.unpack),
):
    register(Implementation(op=_op, backend=Backend.REFERENCE, call=_reference, why_not=lambda request: None))
    register(Implementation(op=_op, backend=Backend.CPU, call=_cpu, why_not=cpu.why_not))
    register(Implementation(op=_op, backend=Backend.CUDA, call=_cuda, why_not=cuda.why_not))


def _check(bits: int, layout: str, N: int) -> None:
    if bits not in BITS:
        raise InputError(f"unsupported bits: got {bits}, allowed are {BITS}; choose one of these")
    if layout not in LAYOUTS:
        raise InputError(f"unknown bit layout: got {layout!r}, allowed are {LAYOUTS}")
    if layout == "awq" and (bits != 4 or N % 8):
        raise InputError(
            f"layout 'awq' holds 4-bit codes of a multiple of 8 rows: got bits={bits}, N={N}; "
            "use another layout"
        )


def pack_bits(codes: Tensor, bits: int, *, layout: str = "dense", backend: str = "auto") -> Tensor:
    """Pack codes into 32-bit words.

    Parameters
    ----------
    codes : Tensor
        uint8 ``[N, K]``, any strides, every code below ``2**bits``.
    bits : int
        2, 3, 4 or 8.
    layout : str
        ``"dense"``: a little-endian bit stream along K; ``"gptq"``: its transpose;
        ``"awq"``: 8 rows to a word in AutoAWQ's nibble order (4 bits, N a multiple of 8);
        ``"words"``: ``32 // bits`` codes to a word along K, the rest of the word zero.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    Tensor
        int32: dense ``[N, ceil(K*bits/32)]``, gptq ``[ceil(K*bits/32), N]``, awq ``[K, N/8]``,
        words ``[N, ceil(K / (32 // bits))]``.

    Raises
    ------
    InputError
        On a wrong shape, dtype, width or layout, or a code that does not fit.
    """
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise InputError(f"codes must be uint8 [N, K]: got {codes.dtype} {tuple(codes.shape)}")
    _check(bits, layout, codes.shape[0])
    result: Tensor = select("pack_bits", backend, Request(device=codes.device)).call(codes, bits, layout)
    return result


def unpack_bits(
    packed: Tensor, bits: int, shape: tuple[int, int], *, layout: str = "dense", backend: str = "auto"
) -> Tensor:
    """Unpack 32-bit words into codes, the exact inverse of `pack_bits`.

    Parameters
    ----------
    packed : Tensor
        int32, of the shape that `pack_bits` returns for `shape`.
    bits : int
        2, 3, 4 or 8.
    shape : tuple of int
        ``(N, K)`` of the codes.
    layout, backend : str
        As in `pack_bits`.

    Returns
    -------
    Tensor
        uint8 ``[N, K]``.

    Raises
    ------
    InputError
        On a wrong shape, dtype, width or layout.
    """
    N, K = shape
    _check(bits, layout, N)
    expected = cpu.packed_shape(N, K, bits, layout)
    if packed.dtype != torch.int32 or tuple(packed.shape) != expected:
        raise InputError(
            f"{layout} words of {bits}-bit codes [{N}, {K}] must be int32 {expected}: "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
    request = Request(device=packed.device)
    result: Tensor = select("unpack_bits", backend, request).call(packed, bits, (N, K), layout)
    return result
