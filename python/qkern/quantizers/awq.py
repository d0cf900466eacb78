"""AWQ: scale the channels that matter up before rounding, and clip the weights that cost more than they give.

Nothing here touches a model. `search_scales` finds ``s [K]`` such that ``Q(W * s) / s`` loses less than
``Q(W)``; whoever owns the model multiplies the columns of W by s and divides what produces the input
(a norm, or the rows of another linear) by it. `search_clip` then returns the clipped weight. Both work
from the statistics of the input, so they combine with any rounding: GPTQ on the scaled weight takes
``statistics.scaled(s).value``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qkern.errors import InputError
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode, quantize_groupwise
from qkern.ops.gguf_encode.fields import LAYOUTS
from qkern.ops.gguf_types import gguf_type
from qkern.quantizers.hessian import HessianAccumulator
from qkern.schemes import Scheme, as_scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qkern.ops.gguf_types import GGUFType

__all__ = ["grouped_query_share", "producer_scales", "search_clip", "search_gguf_scales", "search_scales"]

# Channels quieter than this fraction of the loudest (dead ones above all) are taken to be this loud:
# folding divides by the scale, and text that does reach the channel later must not be blown up.
QUIETEST = 1e-4


def search_scales(
    weights: Sequence[Tensor],
    inputs: Tensor | HessianAccumulator,
    scheme: Scheme | str | Sequence[Scheme | str],
    *,
    ratios: int = 20,
    share: Tensor | None = None,
    search: Literal["minmax", "mse"] = "minmax",
    run: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Tensor:
    """Find the scale of each input channel of linears that read the same input.

    On the grid ``a = 0, 1/ratios, ...`` the candidate is ``x^a / w^(1-a)`` with x the mean magnitude of
    a channel's activation and w that of its weights relative to their group's largest; it is normalized
    to ``sqrt(max * min) = 1``. No scaling at all is a candidate too, so the result never loses to it.

    Parameters
    ----------
    weights : sequence of Tensor
        ``[N_i, K]`` each, floating: all linears that read the input.
    inputs : Tensor or HessianAccumulator
        Activations ``[..., K]`` or what was accumulated over them.
    scheme : Scheme or str, or sequence of them
        The grid the scaled weights will be rounded to; several: of each weight.
    ratios : int
        Grid points of a.
    share : Tensor or None
        int64 ``[K]``: channels with the same number get the same scale. `grouped_query_share` makes it
        for an output projection, where several query heads read one value head.
    search : {"minmax", "mse"}
        How the grid's own scales are chosen while scoring.
    run : callable or None
        Takes the weights, rounded and unscaled again, and returns the output of the block that reads
        the input (an attention, an MLP); the score is that output's mean squared error. None: the
        squared error of the linears' own outputs, exact over all accumulated tokens.

    Returns
    -------
    Tensor
        fp32 ``[K]``, positive.

    Raises
    ------
    InputError
        On shapes that do not fit, no activations, or NaN or Inf among them.
    """
    given = [scheme] * len(weights) if isinstance(scheme, (Scheme, str)) else scheme
    schemes = [as_scheme(one) for one in given]
    if len(schemes) != len(weights):
        raise InputError(f"schemes must be one for each of {len(weights)} weights: got {len(schemes)}")
    statistics = _statistics(weights, inputs)
    full = [weight.detach().to(torch.float32) for weight in weights]
    target = run(full) if run is not None else None

    def score(scales: Tensor) -> float:
        rounded = [
            _rounded(weight * scales, scheme, search) / scales
            for weight, scheme in zip(full, schemes, strict=True)
        ]
        if run is not None and target is not None:
            return float((run(rounded).float() - target.float()).square().mean())
        return _output_loss(full, rounded, statistics)

    size = _relative_size(full, [scheme.group_length(full[0].shape[1]) for scheme in schemes])
    return _least(score, statistics.mean_abs, size, ratios, share)


def search_gguf_scales(
    weights: Sequence[Tensor],
    inputs: Tensor | HessianAccumulator,
    types: Sequence[str],
    *,
    ratios: int = 20,
    share: Tensor | None = None,
) -> Tensor:
    """Find the scale of each input channel of linears that read the same input and become GGUF blocks.

    The candidates are those of `search_scales`; each is judged by the blocks that `gguf_encode` makes of
    the scaled weights, with the mean squares of the scaled input as importance.

    Parameters
    ----------
    weights : sequence of Tensor
        ``[N_i, K]`` each, floating: all linears that read the input.
    inputs : Tensor or HessianAccumulator
        Activations ``[..., K]`` or what was accumulated over them.
    types : sequence of str
        GGUF type of each weight.
    ratios, share
        As in `search_scales`.

    Returns
    -------
    Tensor
        fp32 ``[K]``, positive.

    Raises
    ------
    InputError
        On shapes or types that do not fit, no activations, or NaN or Inf among them.
    """
    statistics = _statistics(weights, inputs)
    if len(types) != len(weights):
        raise InputError(f"types must name one type for each of {len(weights)} weights: got {len(types)}")
    full = [weight.detach().to(torch.float32) for weight in weights]

    def score(scales: Tensor) -> float:
        importance = (statistics.diagonal / scales.square()).cpu()
        rounded = []
        for weight, kind in zip(full, types, strict=True):
            blocks = gguf_encode((weight * scales).cpu(), kind, importance=importance)
            rounded.append(gguf_decode(blocks, kind).to(weight.device) / scales)
        return _output_loss(full, rounded, statistics)

    lengths = [_group_length(gguf_type(kind)) for kind in types]
    return _least(score, statistics.mean_abs, _relative_size(full, lengths), ratios, share)


def _group_length(kind: GGUFType) -> int:
    """Weights that share a scale; 32 where `LAYOUTS` says nothing (IQ4), 1 without scales."""
    layout = LAYOUTS.get(kind.name)
    return min(kind.block, 32) if layout is None else layout.group


def _output_loss(full: Sequence[Tensor], rounded: Sequence[Tensor], statistics: HessianAccumulator) -> float:
    errors = (before - after for before, after in zip(full, rounded, strict=True))
    return sum(float(((error @ statistics.value) * error).sum()) for error in errors)


def _least(
    score: Callable[[Tensor], float], loudness: Tensor, size: Tensor, ratios: int, share: Tensor | None
) -> Tensor:
    """Return the candidate with the least score: none at all, or a mixture of loudness and size."""
    if ratios < 1:
        raise InputError(f"ratios must be at least 1: got {ratios}")
    best = torch.ones_like(loudness)
    if share is not None:
        share = torch.unique(share.to(loudness.device), return_inverse=True)[1]  # without gaps
        loudness, size = _pool(loudness, share), _pool(size, share)
    loudness = loudness.clamp(min=max(QUIETEST * float(loudness.max()), torch.finfo(torch.float32).tiny))
    size = size.clamp(min=QUIETEST)
    least = score(best)
    for step in range(ratios):
        ratio = step / ratios
        scales = loudness**ratio / size ** (1 - ratio)
        scales = scales / (scales.max() * scales.min()).sqrt()
        if share is not None:  # after the powers, whose last bit may depend on the place in the tensor
            scales = scales[share]
        loss = score(scales)
        if loss < least:
            best, least = scales, loss
    return best


def search_clip(
    weight: Tensor,
    inputs: Tensor | HessianAccumulator,
    scheme: Scheme | str,
    *,
    shrink: float = 0.5,
    steps: int = 20,
) -> Tensor:
    """Clip each group of each output channel to the range under which its output error is least.

    A group's error is measured over all tokens, through its own block of the mean of ``x xᵀ``.

    Parameters
    ----------
    weight : Tensor
        ``[N, K]``, floating, already scaled.
    inputs : Tensor or HessianAccumulator
        Activations ``[..., K]`` of the (scaled) input, or what was accumulated over them.
    scheme : Scheme or str
        The grid the weight will be rounded to.
    shrink : float
        Ranges down to ``1 - shrink`` of the full one are tried.
    steps : int
        Ranges tried, between the full one and the smallest.

    Returns
    -------
    Tensor
        ``[N, K]``, dtype of `weight`.

    Raises
    ------
    InputError
        On shapes that do not fit, no activations, or NaN or Inf among them.
    """
    scheme = as_scheme(scheme)
    statistics = _statistics([weight], inputs)
    if not 0 <= shrink < 1 or steps < 1:
        raise InputError(f"shrink must be in [0, 1) and steps at least 1: got {shrink} and {steps}")
    full = weight.detach().to(torch.float32)
    K = full.shape[1]
    length = scheme.group_length(K)
    blocks = _diagonal_blocks(statistics.value, length)
    groups = _grouped(full, length)
    if scheme.zero_point:
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    else:
        high = groups.abs().amax(-1, keepdim=True)
        low = -high
    if scheme.per_tensor:  # one scale, so one range and one choice
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    best, least = full, full.new_full(high.shape[:2], torch.inf)
    for step in range(steps):
        ratio = 1 - shrink * step / steps
        clipped = groups.clamp(low * ratio, high * ratio).flatten(1)[:, :K]
        error = _grouped(full - _rounded(clipped, scheme, "minmax"), length).transpose(0, 1)
        loss = ((error @ blocks) * error).sum(-1).T
        if scheme.per_tensor:
            loss = loss.sum().expand_as(loss)
        wins = loss < least
        least = torch.where(wins, loss, least)
        best = torch.where(wins.repeat_interleave(length, 1)[:, :K], clipped, best)
    return best.to(weight.dtype)


def grouped_query_share(heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """Value channel that each input channel of the output projection reads.

    Parameters
    ----------
    heads, kv_heads, head_dim : int
        Query heads, key/value heads (a divisor of `heads`), channels of a head.

    Returns
    -------
    Tensor
        int64 ``[heads * head_dim]``, the `share` argument of `search_scales`.

    Raises
    ------
    InputError
        If `kv_heads` does not divide `heads`.
    """
    if kv_heads < 1 or heads % kv_heads:
        raise InputError(f"kv_heads must divide heads: got {kv_heads} and {heads}")
    values = torch.arange(kv_heads * head_dim, device="cpu").view(kv_heads, 1, head_dim)
    return values.expand(kv_heads, heads // kv_heads, head_dim).flatten()


def producer_scales(scales: Tensor, share: Tensor) -> Tensor:
    """Scale of each output row of the producer (the value projection), from those of its readers."""
    result = scales.new_ones(int(share.max()) + 1)
    result[share.to(scales.device)] = scales
    return result


def _statistics(weights: Sequence[Tensor], inputs: Tensor | HessianAccumulator) -> HessianAccumulator:
    if not weights:
        raise InputError("no weights: got an empty list; pass every linear that reads the input")
    K = weights[0].shape[-1]
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != K or not weight.is_floating_point():
            raise InputError(
                f"weights must be floating [N, {K}]: got {weight.dtype} {tuple(weight.shape)}; "
                "pass only linears that read the same input"
            )
    if isinstance(inputs, Tensor):
        statistics = HessianAccumulator(K, weights[0].device)
        statistics.add(inputs)
    else:
        statistics = inputs
    if statistics.features != K or statistics.tokens == 0:
        raise InputError(
            f"inputs must be tokens of {K} features: got {statistics.tokens} tokens of {statistics.features}"
        )
    if not bool(torch.isfinite(statistics.diagonal).all()):
        raise InputError(
            "activations have NaN or Inf values: AWQ needs finite ones; check the calibration run"
        )
    return statistics


def _rounded(weight: Tensor, scheme: Scheme, search: Literal["minmax", "mse"]) -> Tensor:
    return dequantize_groupwise(quantize_groupwise(weight, scheme, search=search))


def _grouped(matrix: Tensor, length: int) -> Tensor:
    """``[N, G, length]``; a short last group is filled up with zeros."""
    missing = -matrix.shape[1] % length
    return F.pad(matrix, (0, missing)).reshape(matrix.shape[0], -(-matrix.shape[1] // length), length)


def _diagonal_blocks(matrix: Tensor, length: int) -> Tensor:
    """``[G, length, length]``: the blocks on the diagonal, the last one filled up with zeros."""
    missing = -matrix.shape[0] % length
    padded = F.pad(matrix, (0, missing, 0, missing))
    count = padded.shape[0] // length
    return torch.stack([padded[i * length :, i * length :][:length, :length] for i in range(count)])


def _relative_size(weights: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Mean over all rows of each column's magnitude relative to the largest of its group, ``[K]``."""
    K = weights[0].shape[1]
    total = weights[0].new_zeros(K)
    for weight, length in zip(weights, lengths, strict=True):
        groups = _grouped(weight.abs(), length)
        largest = groups.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total += (groups / largest).flatten(1)[:, :K].sum(0)
    return total / sum(weight.shape[0] for weight in weights)


def _pool(values: Tensor, share: Tensor) -> Tensor:
    """Mean over the channels that share a number, one for each number from 0."""
    if share.shape != values.shape:
        raise InputError(f"share must be int64 {tuple(values.shape)}: got {share.dtype} {tuple(share.shape)}")
    count = torch.bincount(share)
    return values.new_zeros(len(count)).index_add_(0, share, values) / count
