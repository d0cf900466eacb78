"""quantize_groupwise on native kernels of any device: which calls a scheme takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qkern.ops.quantize_groupwise.nested import decode, divisors, nest
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["quantize"]


def quantize(
    weight: Tensor,
    scheme: Scheme,
    *,
    importance: Tensor | None,
    search: str,
    scale_dtype: torch.dtype,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    run: Callable[..., None],
    empty: Callable[..., Tensor],
) -> QuantizedWeight:
    """Quantize ``[N, K]`` or ``[E, N, K]``.

    Parameters
    ----------
    weight, scheme, importance, search, scale_dtype, scales, zeros
        As validated by the caller.
    run : callable
        ``run(rows, scheme, scales, zeros, codes, *, importance, search, rows_per_grid)`` calls the kernel on
        ``[R, K]``; rows_per_grid 0 chooses the grid, else it is read; codes None: the grid only.
    empty : callable
        ``empty(*shape, dtype)`` gives memory for the results.
    """
    *experts, N, K = weight.shape
    E = experts[0] if experts else 1
    shape = (*experts, *scheme.scale_shape(N, K))
    codes = empty(*experts, N, scheme.code_words(K), dtype=torch.int32)
    is_given = scales is not None
    if scales is None:
        scales = empty(*shape, dtype=torch.float32 if scheme.double_quant else scale_dtype)
        zeros = empty(*shape, dtype=torch.uint8) if scheme.zero_point else None
    if importance is not None:
        importance = (
            importance.contiguous() if importance.dim() == 1 else importance.expand(weight.shape).contiguous()
        )
    whole = (
        weight.reshape(E, N * K)
        if scheme.per_tensor
        else weight
        if weight.dim() == 2
        else weight.flatten(0, 1)
    )
    if importance is not None and scheme.per_tensor:
        importance = importance.expand(weight.shape).reshape(whole.shape).contiguous()
    nested = None
    if is_given or scheme.per_tensor or scheme.double_quant:
        # The grid first (per tensor: of the matrix as a single row), then the codes on what became of it.
        if not is_given:
            run(whole, scheme, scales, zeros, None, importance=importance, search=search)
        if scheme.double_quant:
            nested = nest(scales)
            scales = decode(nested, shape)
        rows, steps = weight.reshape(E * N, K), divisors(scales).contiguous()
        shifts = None if zeros is None else zeros.contiguous()
        run(rows, scheme, steps, shifts, codes, rows_per_grid=max(N, 1) if scheme.per_tensor else 1)
    else:
        run(whole, scheme, scales, zeros, codes, importance=importance, search=search)
    return QuantizedWeight(
        codes=codes, scales=scales, zeros=zeros, shape=tuple(weight.shape), scheme=scheme, nested=nested
    )
