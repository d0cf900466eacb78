"""Round to nearest: every weight to the closest point of its group's grid, no calibration needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qkern.ops import quantize_groupwise
from qkern.schemes import as_scheme

if TYPE_CHECKING:
    from typing import Literal

    from torch import Tensor

    from qkern.schemes import QuantizedWeight, Scheme

    Search = Literal["minmax", "mse", "absmax"]

__all__ = ["default_search", "quantize_rtn"]


def default_search(scheme: Scheme) -> Search:
    """How scales are chosen where nothing else is said: those of nf4 and fp4 as in bitsandbytes."""
    return "minmax" if scheme.codebook is None or scheme.per_tensor else "absmax"


def quantize_rtn(
    weight: Tensor,
    scheme: Scheme | str,
    *,
    search: Search | None = None,
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """Round a weight to the nearest points of its grid.

    Parameters
    ----------
    weight : Tensor
        ``[N, K]`` or ``[E, N, K]`` (a stack of experts), fp32, fp16 or bf16.
    scheme : Scheme or str
        For example ``"w4g128"``.
    search : {"minmax", "mse", "absmax"}, optional
        How scales are chosen: to span the group, to minimize its (weighted) squared error, or for nf4 and fp4
        as bitsandbytes does; default: `default_search`.
    importance : Tensor or None
        fp32 ``[K]`` or ``[N, K]``, at least 0: the weight of each column's squared error under
        ``search="mse"``, for example the mean square of its activations.
    scale_dtype : torch.dtype
        Dtype in which scales are stored.

    Returns
    -------
    QuantizedWeight
        Codes in the original column order.

    Raises
    ------
    InputError
        On a wrong shape or dtype, or on NaN or Inf in the weight.
    """
    scheme = as_scheme(scheme)
    search = search or default_search(scheme)
    return quantize_groupwise(weight, scheme, importance=importance, search=search, scale_dtype=scale_dtype)
