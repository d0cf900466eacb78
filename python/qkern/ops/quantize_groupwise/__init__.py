"""Weights to codes, scales and zero points on a grid a group."""

from __future__ import annotations

import torch
from torch import Tensor

from qkern.errors import InputError, UnsupportedError
from qkern.ops.quantize_groupwise import absmax, cpu, cuda, reference, triton
from qkern.ops.registry import Backend, Implementation, Request, register, select
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme, as_scheme

__all__ = ["SEARCHES", "quantize_groupwise"]

SEARCHES = ("minmax", "mse", "absmax")

register(
    Implementation(
        op="quantize_groupwise",
        backend=Backend.REFERENCE,
        call=reference.quantize,
        why_not=lambda request: None,
    )
)
register(Implementation(op="quantize_groupwise", backend=Backend.CPU, call=cpu.quantize, why_not=cpu.why_not))
register(
    Implementation(op="quantize_groupwise", backend=Backend.CUDA, call=cuda.quantize, why_not=cuda.why_not)
)
register(
    Implementation(
        op="quantize_groupwise", backend=Backend.TRITON, call=triton.quantize, why_not=triton.why_not
    )
)


def quantize_groupwise(
    weight: Tensor,
    scheme: Scheme | str,
    *,
    importance: Tensor | None = None,
    search: str = "minmax",
    scale_dtype: torch.dtype | None = None,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    backend: str = "auto",
) -> QuantizedWeight:
    """Quantize a weight matrix on the grid of its scheme.

    Parameters
    ----------
    weight : Tensor
        fp32, fp16 or bf16 ``[N, K]`` or ``[E, N, K]``, any strides, finite.
    scheme : Scheme or str
        For example ``"w4g128"``.
    importance : Tensor or None
        fp32 ``[K]`` or of the weight's shape, finite and not negative: how much the squared error of a
        weight counts; needs ``search="mse"``.
    search : str
        ``"minmax"``: the grid covers the range of the group; ``"mse"``: scale (and its sign, or the zero
        point) are searched for the smallest squared error, never worse than min-max; ``"absmax"``: nf4,
        fp4 and w8a8 bit for bit as bitsandbytes quantizes them on a CPU, scales in fp32, in plain torch.
    scale_dtype : torch.dtype or None
        Dtype in which the scales are stored, None: fp16, or that of `scales`; codes are chosen against the
        rounded scale. Double quantization (``d``) stores the scales as 8-bit codes, and the decoded ones in
        fp32.
    scales : Tensor or None
        A grid that is given, as in `QuantizedWeight`, which the result shares: only codes are chosen. With a
        scale of 0 every code means 0.
    zeros : Tensor or None
        The zero points that go with `scales`.
    backend : str
        ``"auto"`` or a `Backend`.

    Returns
    -------
    QuantizedWeight
        The same bits from every backend.

    Raises
    ------
    InputError
        On a wrong shape or dtype, NaN or Inf in the weight, a scale that overflows `scale_dtype`, a grid
        that does not fit the weight, or a search that the scheme or backend does not have.
    UnsupportedError
        On double quantization of scales that are given.
    """
    scheme = as_scheme(scheme)
    if weight.dim() not in (2, 3) or weight.dtype not in FLOAT_DTYPES:
        raise InputError(
            "weight must be fp32, fp16 or bf16 [N, K] or [E, N, K]: "
            f"got {weight.dtype} {tuple(weight.shape)}; reshape or cast it"
        )
    if scale_dtype not in (None, *FLOAT_DTYPES):
        raise InputError(f"scale_dtype must be fp32, fp16 or bf16: got {scale_dtype}")
    if search not in SEARCHES:
        raise InputError(f"unknown search: got {search!r}, allowed are {SEARCHES}")
    if importance is not None:
        _check_importance(importance, weight, search)
    if scales is not None or zeros is not None:
        _check_grid(scales, zeros, weight, scheme, search, scale_dtype)
    if search == "absmax":
        if backend not in ("auto", Backend.REFERENCE):
            raise InputError(f"search='absmax' runs in plain torch: got backend={backend!r}; leave it out")
        return absmax.quantize(weight.detach(), scheme)
    request = Request(device=weight.device, scheme=scheme, dtype=weight.dtype)
    implementation = select("quantize_groupwise", backend, request)
    result: QuantizedWeight = implementation.call(
        weight.detach(),
        scheme,
        importance=importance,
        search=search,
        scale_dtype=scale_dtype or torch.float16,
        scales=None if scales is None else scales.detach(),
        zeros=zeros,
    )
    return result


def _check_importance(importance: Tensor, weight: Tensor, search: str) -> None:
    if search != "mse":
        raise InputError(
            f"importance needs search='mse': got search={search!r}; pass search='mse' or no importance"
        )
    shapes = ((weight.shape[-1],), tuple(weight.shape[-2:]), tuple(weight.shape))
    if importance.dtype != torch.float32 or tuple(importance.shape) not in shapes:
        raise InputError(
            f"importance must be fp32 of shape {' or '.join(map(str, dict.fromkeys(shapes)))}: "
            f"got {importance.dtype} {tuple(importance.shape)}"
        )
    if importance.device != weight.device:
        raise InputError(f"importance must be on {weight.device} like the weight: got {importance.device}")
    if not (torch.isfinite(importance) & (importance >= 0)).all():
        raise InputError(
            "importance must be finite and not negative: got NaN, Inf or a negative value; clean it"
        )


def _check_grid(
    scales: Tensor | None,
    zeros: Tensor | None,
    weight: Tensor,
    scheme: Scheme,
    search: str,
    scale_dtype: torch.dtype | None,
) -> None:
    if scheme.double_quant:
        raise UnsupportedError(
            f"scales that are given are not quantized again: got scheme {scheme}; leave d out, or the scales"
        )
    if search != "minmax":
        raise InputError(f"a grid that is given is not searched: got search={search!r}; leave it out")
    *experts, N, K = weight.shape
    shape = (*experts, *scheme.scale_shape(N, K))
    if scales is None or scales.dtype not in FLOAT_DTYPES or tuple(scales.shape) != shape:
        got = None if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
        raise InputError(
            f"scales of a {scheme} weight {tuple(weight.shape)} must be floats {shape}: got {got}"
        )
    if scale_dtype not in (None, scales.dtype):
        raise InputError(
            f"a grid that is given is not cast: got scale_dtype={scale_dtype} for scales in {scales.dtype}; "
            "leave scale_dtype out, or cast the scales"
        )
    if scheme.zero_point != (zeros is not None):
        raise InputError(
            f"scheme {scheme} {'needs' if scheme.zero_point else 'excludes'} zeros beside scales"
        )
    if zeros is not None and (zeros.dtype != torch.uint8 or tuple(zeros.shape) != shape):
        raise InputError(f"zeros must be uint8 {shape}: got {zeros.dtype} {tuple(zeros.shape)}")
    if any(part is not None and part.device != weight.device for part in (scales, zeros)):
        raise InputError(f"scales and zeros must be on {weight.device} like the weight: move them there")
    if not (torch.isfinite(scales).all() and torch.isfinite(weight).all()):
        raise InputError("scales or weight have NaN or Inf values: qkern quantizes finite weights only")
