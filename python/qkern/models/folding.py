"""Moving a factor per channel from one module into the next without changing the function.

All arithmetic is fp32, in place. What is stored may be narrower: `fold_norm` rounds the norm first and
multiplies the linears by the ratio that the rounded norm asks for, so a bf16 norm costs no accuracy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qkern.errors import InputError
from qkern.nn.linear import is_conv1d
from qkern.quantizers import grouped_query_share, producer_scales

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qkern.models.architecture import LinearPair

__all__ = ["column_weight", "fold_linear", "fold_norm", "pair_channels", "set_column_weight"]


def column_weight(linear: Any) -> Tensor:
    """Weight of a linear as ``[out, in]``, whichever way it is stored (a view)."""
    weight: Tensor = linear.weight.detach()
    return weight.t() if is_conv1d(linear) else weight


def set_column_weight(linear: Any, weight: Tensor) -> None:
    """Replace the weight of a linear by `weight` ``[out, in]``, cast to the dtype it has."""
    stored = weight.t() if is_conv1d(linear) else weight
    linear.weight = nn.Parameter(stored.to(linear.weight.dtype).contiguous(), requires_grad=False)


def _replace(module: Any, name: str, value: Tensor) -> None:
    """Put a new parameter in place of an old one; a tensor shared with another model stays as it is."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def fold_norm(
    norm: Any,
    linears: Sequence[nn.Module],
    scale: Tensor,
    *,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Divide a norm's output by `scale` and multiply the columns that read it.

    Parameters
    ----------
    norm : nn.Module
        Has a ``weight`` ``[K]`` and perhaps a ``bias`` ``[K]``; multiplies by ``weight + offset``.
    linears : sequence of nn.Module
        Every linear that reads the norm.
    scale : Tensor
        ``[K]``, positive.
    offset : float
        1.0 for norms that store w - 1.
    dtype : torch.dtype, optional
        Dtype in which the norm will be stored; default: its own.

    Returns
    -------
    Tensor
        fp32 ``[K]``: the factor by which columns were multiplied, `scale` corrected for the rounding of
        the norm (1 where the norm's channel would have vanished or become infinite).

    Raises
    ------
    InputError
        If `scale` is not finite and positive or has another size than the norm.
    """
    weight = norm.weight.detach().float()
    scale = _checked(scale, weight.numel())
    dtype = dtype or norm.weight.dtype
    old = weight + offset
    rounded = (old / scale - offset).to(dtype).float()
    new = rounded + offset
    safe = (new != 0) & (old != 0) & torch.isfinite(new)
    ratio = torch.where(safe, old / torch.where(safe, new, 1.0), 1.0)
    _replace(norm, "weight", torch.where(safe, rounded, weight))
    if getattr(norm, "bias", None) is not None:
        _replace(norm, "bias", (norm.bias.detach().float() / ratio).to(dtype))
    for linear in linears:
        set_column_weight(linear, column_weight(linear).float() * ratio)
    return ratio


def pair_channels(config: Any, pair: LinearPair, first: nn.Module, second: nn.Module) -> tuple[slice, Tensor]:
    """Which rows of `first` feed which columns of `second`.

    Parameters
    ----------
    config : PretrainedConfig
        Gives the numbers of heads.
    pair : LinearPair
        The two linears as data.
    first, second : nn.Module
        The two linears.

    Returns
    -------
    rows : slice
        Rows of `first` that feed `second`.
    share : Tensor
        int64 ``[K]``: for each column of `second` the row, counted within `rows`, that feeds it. Under
        grouped-query attention several columns name the same row.

    Raises
    ------
    InputError
        If the sizes contradict the config.
    """
    columns = column_weight(second).shape[1]
    outputs = column_weight(first).shape[0]
    if pair.kind == "value":
        # A fused projection makes queries, as many as the second linear reads, then keys, then values.
        channels = (outputs - columns) // 2 if pair.fused else outputs
        width = columns // int(config.num_attention_heads)
        fits = channels > 0 and columns % channels == 0 and channels % width == 0
        share = grouped_query_share(columns // width, channels // width, width) if fits else None
    else:
        channels = outputs // 2 if pair.fused else outputs
        share = torch.arange(columns, device="cpu") if channels == columns else None
    if share is None:
        raise InputError(
            f"{pair.first} has {outputs} outputs and {pair.second} reads {columns} columns: the model does "
            f"not fit the data of its architecture, {config.model_type}"
        )
    return slice(outputs - channels, outputs), share


def fold_linear(
    first: Any,
    second: nn.Module,
    scale: Tensor,
    *,
    rows: slice = slice(None),
    share: Tensor | None = None,
) -> None:
    """Multiply the columns of `second` by `scale` and divide what feeds them: rows of `first` and its bias.

    Parameters
    ----------
    first, second : nn.Module
        Linears; between them channels may be multiplied or averaged over tokens, nothing else.
    scale : Tensor
        ``[K]`` positive, one a column of `second`, the same for columns with the same entry in `share`.
    rows : slice
        Rows of `first` that feed `second`.
    share : Tensor, optional
        int64 ``[K]`` from `pair_channels`; default: row i feeds column i.

    Raises
    ------
    InputError
        If `scale` is not finite and positive, differs where it must not, or the sizes do not fit.
    """
    columns = column_weight(second).float()
    scale = _checked(scale, columns.shape[1])
    share = (torch.arange(scale.numel(), device="cpu") if share is None else share).to(scale.device)
    producer = producer_scales(scale, share)
    weight = column_weight(first).float().clone()
    if producer.numel() != weight[rows].shape[0]:
        raise InputError(f"{producer.numel()} channels cannot come from {weight[rows].shape[0]} rows")
    if not torch.equal(producer[share], scale):
        raise InputError(
            "columns that read the same row must have the same scale; pass share to search_scales"
        )
    weight[rows] /= producer[:, None]
    set_column_weight(first, weight)
    if first.bias is not None:
        bias = first.bias.detach().float().clone()
        bias[rows] /= producer
        _replace(first, "bias", bias)
    set_column_weight(second, columns * scale)


def _checked(scale: Tensor, size: int) -> Tensor:
    scale = scale.detach().float()
    if tuple(scale.shape) != (size,):
        raise InputError(f"scale must have shape [{size}], one a channel: got {tuple(scale.shape)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise InputError("scale must be finite and positive in every channel: some values are not")
    return scale
