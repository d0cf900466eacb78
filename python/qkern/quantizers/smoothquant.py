"""SmoothQuant: move range from activations, which are hard to round to int8, into the weights that read them.

Nothing here touches a model. `search_smoothing` finds ``s [K]``; whoever owns the model multiplies the
columns of the weights by s and divides what produces their input (a norm, or the rows of another linear) by
it, as with AWQ's scales, which serve the opposite end: there weights are hard to round, here activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops import dequant_matmul, quantize_groupwise
from qkern.quantizers.awq import QUIETEST
from qkern.quantizers.observers import ActivationRange, ActivationSample
from qkern.schemes import Scheme, as_scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Smoothing", "check_alpha", "search_smoothing", "smoothing_scales"]

_TINY: Final = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Smoothing:
    """What `search_smoothing` found.

    Parameters
    ----------
    scales : Tensor
        fp32 ``[K]``, positive.
    alpha : float or None
        Share of the range that the weights take over; None: no scaling is best.
    error : float
        Squared error of the linears' outputs on the sampled tokens, relative to the outputs.
    """

    scales: Tensor
    alpha: float | None
    error: float


def check_alpha(alpha: float | str) -> None:
    """Refuse what is neither ``"auto"`` nor a number from 0 to 1.

    Raises
    ------
    InputError
        If so.
    """
    if alpha == "auto":
        return
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise InputError(f"alpha must be 'auto' or a number from 0 to 1: got {alpha!r}")


def smoothing_scales(largest: Tensor, size: Tensor, alpha: float, *, share: Tensor | None = None) -> Tensor:
    """``largest^alpha / size^(1 - alpha)``, divided by its median.

    A common factor changes nothing but the magnitudes that fp16 scales and norms have to hold, so most of
    them stay as they are. Channels below 1e-4 of the largest, unused ones above all, count as that large: a
    channel that calibration text did not reach, or that no weight reads, must not get a scale of 0 or Inf.

    Parameters
    ----------
    largest : Tensor
        fp32 ``[K]``: largest magnitude of each channel's activation.
    size : Tensor
        fp32 ``[K]``: largest magnitude of the weights that read it.
    alpha : float
        0 gives all of the range to the activations, 1 all to the weights.
    share : Tensor or None
        int64 ``[K]``: channels with the same number get the same scale, see `grouped_query_share`.

    Returns
    -------
    Tensor
        fp32 ``[K]``, positive.
    """
    if share is not None:
        share = torch.unique(share.to(largest.device), return_inverse=True)[1]  # without gaps
        largest, size = _pooled(largest, share), _pooled(size, share)
    scales = _raised(largest) ** alpha / _raised(size) ** (1 - alpha)
    scales = scales / scales.median()
    return scales if share is None else scales[share]


def search_smoothing(
    weights: Sequence[Tensor],
    inputs: Tensor | ActivationSample,
    scheme: Scheme | str | Sequence[Scheme | str],
    *,
    alpha: float | Literal["auto"] = "auto",
    steps: int = 20,
    share: Tensor | None = None,
    search: Literal["minmax", "mse"] = "minmax",
    observer: str | None = None,
) -> Smoothing:
    """Find the scale of each input channel of linears that read the same input.

    Candidates are `smoothing_scales` for ``alpha = 0, 1/steps, ..., 1`` and no scaling at all, so the result
    never loses to it. Each is judged by the outputs that the kernels compute from the scaled and quantized
    weights and the activations as int8, on the sampled tokens.

    Parameters
    ----------
    weights : sequence of Tensor
        ``[N_i, K]`` each, floating: all linears that read the input.
    inputs : Tensor or ActivationSample
        Activations ``[..., K]`` or what was sampled from them.
    scheme : Scheme or str, or sequence of them
        How the scaled weights will be quantized, and whether their activations are (``a8``); several: of
        each weight.
    alpha : float or "auto"
        A number takes the place of the search.
    steps : int
        Grid points of alpha beside 0.
    share : Tensor or None
        As in `smoothing_scales`.
    search : {"minmax", "mse"}
        How the grid's own scales are chosen.
    observer : str or None
        How the static scale of the activations will be chosen, see `ActivationRange`; None: each token has
        its own.

    Returns
    -------
    Smoothing
        Scales, the alpha behind them, and their error.

    Raises
    ------
    InputError
        On shapes that do not fit, no activations, NaN or Inf, or a scheme without int8 activations alone.
    """
    check_alpha(alpha)
    given = [scheme] * len(weights) if isinstance(scheme, (Scheme, str)) else scheme
    schemes = [as_scheme(one) for one in given]
    full = _checked_weights(weights, schemes)
    sample = _sampled(inputs, full[0])
    if steps < 1:
        raise InputError(f"steps must be at least 1: got {steps}")
    rows = sample.rows
    targets = [rows @ weight.T for weight in full]
    energy = max(sum(float(target.square().sum()) for target in targets), _TINY)

    def error(scales: Tensor) -> float:
        x = rows / scales
        static = None if observer is None else _static_scale(sample, x, scales, observer)
        total = 0.0
        for weight, one, target in zip(full, schemes, targets, strict=True):
            quantized = quantize_groupwise(weight * scales, one, search=search)
            if static is not None and one.has_plain_sums:
                quantized = replace(quantized, input_scale=static)
            compute = "float" if one.act_bits is None else "int8"
            total += float((dequant_matmul(x, quantized, compute=compute) - target).square_().sum())
        return total / energy

    size = torch.stack([weight.abs().amax(0) for weight in full]).amax(0)
    if alpha != "auto":
        scales = smoothing_scales(sample.largest, size, alpha, share=share)
        return Smoothing(scales=scales, alpha=float(alpha), error=error(scales))
    none = torch.ones_like(sample.largest)
    best = Smoothing(scales=none, alpha=None, error=error(none))
    for step in range(steps + 1):
        scales = smoothing_scales(sample.largest, size, step / steps, share=share)
        found = error(scales)
        if found < best.error:
            best = Smoothing(scales=scales, alpha=step / steps, error=found)
    return best


def _static_scale(sample: ActivationSample, x: Tensor, scales: Tensor, observer: str) -> Tensor:
    seen = ActivationRange(observer, x.device)
    # The largest of all tokens is known, of which the sample has not seen most.
    seen.add((sample.largest / scales).amax().reshape(1) if observer == "minmax" else x)
    return seen.scale().to(x.device)


def _checked_weights(weights: Sequence[Tensor], schemes: Sequence[Scheme]) -> list[Tensor]:
    if not weights or len(schemes) != len(weights):
        raise InputError(
            f"every linear that reads the input has one weight and one scheme: got {len(weights)} weights "
            f"and {len(schemes)} schemes"
        )
    K = weights[0].shape[-1]
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != K or not weight.is_floating_point():
            raise InputError(
                f"weights must be floating [N, {K}]: got {weight.dtype} {tuple(weight.shape)}; "
                "pass only linears that read the same input"
            )
    if all(scheme.act_bits is None for scheme in schemes):
        raise InputError(
            f"SmoothQuant makes room for int8 activations: got {schemes[0]}, which keeps them; use a scheme "
            "with a8, or AWQ's search_scales"
        )
    return [weight.detach().to(torch.float32) for weight in weights]


def _sampled(inputs: Tensor | ActivationSample, weight: Tensor) -> ActivationSample:
    K = weight.shape[1]
    if isinstance(inputs, Tensor):
        sample = ActivationSample(K, weight.device)
        sample.add(inputs)
    else:
        sample = inputs
    if sample.features != K or not sample.tokens:
        raise InputError(
            f"inputs must be tokens of {K} features: got {sample.tokens} tokens of {sample.features}"
        )
    return sample


def _raised(values: Tensor) -> Tensor:
    return values.clamp(min=max(QUIETEST * float(values.max()), _TINY))


def _pooled(values: Tensor, share: Tensor) -> Tensor:
    """Largest of the channels that share a number, one for each number from 0."""
    if share.shape != values.shape:
        raise InputError(f"share must be int64 {tuple(values.shape)}: got {share.dtype} {tuple(share.shape)}")
    return values.new_zeros(int(share.max()) + 1).scatter_reduce_(0, share, values, "amax")
