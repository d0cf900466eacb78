"""quantize_groupwise in plain torch; reads like the formula, runs on any device."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkern.errors import InputError
from qkern.ops._scratch import pieces
from qkern.ops.codebooks import codebook
from qkern.ops.pack_bits.reference import pack_dense, split_last
from qkern.ops.quantize_groupwise.nested import decode, divisors, nest
from qkern.schemes import QuantizedWeight, Scheme

__all__ = ["choose_grid", "encode", "quantize", "row_bytes", "search_grid"]

REFINEMENTS: Final = 3
_LANES: Final = 16
# Most bytes of temporaries for a weight whose grid is chosen (with importance) or that is encoded.
_WEIGHT_BYTES: Final = 48


def shrinks(scheme: Scheme) -> tuple[float, ...]:
    """Scale candidates of the MSE search, as fractions of the min-max scale. Shared with kernel.h."""
    by_bits = {2: (49, 32, 41), 3: (38, 32, 30), 4: (35, 32, 27), 8: (259, 256, 26)}
    first, unit, count = (48, 32, 36) if scheme.codebook else by_bits[scheme.bits]
    return tuple((first - i) / unit for i in range(count))


def row_bytes(scheme: Scheme, K: int) -> int:
    """Most bytes that the temporaries of a row take, whose groups are summed in whole lanes."""
    length = max(scheme.group_length(K), 1)
    return _WEIGHT_BYTES * scheme.num_groups(K) * (length + -length % _LANES)


def split_groups(values: Tensor, scheme: Scheme) -> Tensor:
    """``[R, K]`` as fp32 ``[R, groups, group]``, the last group filled with zeros."""
    R, K = values.shape
    groups, length = scheme.num_groups(K), max(scheme.group_length(K), 1)
    return F.pad(values.float(), (0, groups * length - K)).reshape(R, groups, length)


def choose_grid(groups: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale (rounded to `scale_dtype`, returned as fp32) and zero point (fp32) of each group.

    `groups` is fp32 ``[..., group]``; the results have a last dimension of 1. The zero point of a
    codebook is 0.
    """
    low, high = _range(groups)
    scale = (_span(low, high, scheme)).to(scale_dtype).float()
    if torch.isinf(scale).any():
        raise InputError(scale_overflow_message(scale_dtype))
    scale = torch.where(scale == 0, 1.0, scale)
    if scheme.zero_point:
        return scale, (-low / scale).round().clamp(0, scheme.levels - 1)
    return scale, torch.full_like(scale, 0 if scheme.codebook else scheme.midpoint)


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    return groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)


def _span(low: Tensor, high: Tensor, scheme: Scheme) -> Tensor:
    """Scale of the min-max grid before it is rounded."""
    # Divisors are tensors: on a GPU torch multiplies by the reciprocal of a number, which rounds twice.
    if scheme.zero_point:
        return (high - low) / low.new_tensor(scheme.levels - 1)
    return torch.maximum(high, -low) / low.new_tensor(1.0 if scheme.codebook else scheme.midpoint - 0.5)


def encode(groups: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Nearest codes (uint8) and what they stand for before the scale (fp32)."""
    if scheme.codebook:
        book = codebook(scheme.codebook, groups.device)
        position = book.nearest(groups / scale)
        return book.codes[position], book.ordered[position]
    q = ((groups / scale).round() + zero).clamp(0, scheme.levels - 1)
    return q.to(torch.uint8), q - zero


def _lane_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension in the order that every backend follows.

    Sixteen running sums (element i goes to sum i mod 16), then sum i plus sum i + 8, + 4, + 2, + 1.
    """
    blocks = split_last(values, _LANES)
    total = torch.zeros_like(blocks[..., 0, :])
    for i in range(blocks.shape[-2]):
        total = total + blocks[..., i, :]
    half = _LANES // 2
    while half:
        total = total[..., :half] + total[..., half : 2 * half]
        half //= 2
    return total


class _Fit(NamedTuple):
    """Weighted squared error of a grid, and its derivatives in the scale."""

    error: Tensor
    slope: Tensor
    curvature: Tensor


def _fit(groups: Tensor, importance: Tensor | None, scale: Tensor, zero: Tensor, scheme: Scheme) -> _Fit:
    _, level = encode(groups, scale, zero, scheme)
    error = groups - level * scale
    weighted = (error, level) if importance is None else (importance * error, importance * level)
    return _Fit(
        _lane_sum(weighted[0] * error), _lane_sum(weighted[0] * level), _lane_sum(weighted[1] * level)
    )


class _Search:
    """The best grid so far, and the grid whose unrounded optimal scale promises the smallest error."""

    def __init__(
        self, groups: Tensor, importance: Tensor | None, scheme: Scheme, scale: Tensor, zero: Tensor
    ) -> None:
        self._groups, self._importance, self._scheme = groups, importance, scheme
        self.scale, self.zero = scale, zero
        self.error = _fit(groups, importance, scale, zero, scheme).error
        self.pick_scale, self.pick_zero = scale, zero
        self.reset_pick()

    def reset_pick(self) -> None:
        self.pick_error = torch.full_like(self.error, torch.inf)

    def consider(self, scale: Tensor, zero: Tensor) -> None:
        fit = _fit(self._groups, self._importance, scale, zero, self._scheme)
        better = fit.error < self.error
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.error = torch.where(better, fit.error, self.error)
        # For fixed codes the error is a parabola in the scale: this is the step to its minimum.
        step = torch.where(fit.curvature > 0, fit.slope / fit.curvature, 0.0)
        promise = fit.error - fit.slope * step
        better = promise < self.pick_error
        self.pick_scale = torch.where(better, scale + step, self.pick_scale)
        self.pick_zero = torch.where(better, zero, self.pick_zero)
        self.pick_error = torch.where(better, promise, self.pick_error)


def search_grid(
    groups: Tensor, importance: Tensor | None, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Like `choose_grid`, but with the smallest weighted squared error that the search finds."""
    start, zero = choose_grid(groups, scheme, scale_dtype)
    low, high = _range(groups)
    span = _span(low, high, scheme)
    top = scheme.levels - 1

    def stored(scale: Tensor) -> Tensor:
        scale = scale.to(scale_dtype).float()
        return torch.where((scale == 0) | ~torch.isfinite(scale), start, scale)

    search = _Search(groups, importance, scheme, start, zero)
    for shrink in shrinks(scheme):
        if scheme.zero_point:
            scale = stored(span * shrink)
            # The range shrinks at both ends, at the top only, at the bottom only.
            search.consider(scale, (-(low * shrink) / scale).round().clamp(0, top))
            search.consider(scale, (-low / scale).round().clamp(0, top))
            search.consider(scale, (top - high / scale).round().clamp(0, top))
        else:
            search.consider(stored(span * shrink), zero)
            search.consider(stored(-(span * shrink)), zero)
    for _ in range(REFINEMENTS):
        search.reset_pick()
        search.consider(stored(search.pick_scale), search.pick_zero)
    return search.scale, search.zero


def grid(
    weight: Tensor, scheme: Scheme, *, importance: Tensor | None, search: str, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of ``[R, K]`` rows, both fp32 ``[R, groups]``; finite weights only."""
    R, K = weight.shape
    chunks = list(pieces(R, row_bytes(scheme, K)))
    if not all(torch.isfinite(weight[rows]).all() for rows in chunks):
        raise InputError(NON_FINITE_MESSAGE)
    scales = torch.empty(R, scheme.num_groups(K), dtype=torch.float32, device=weight.device)
    zeros = torch.empty_like(scales)
    for rows in chunks:
        groups = split_groups(weight[rows], scheme)
        if search == "minmax":
            scale, zero = choose_grid(groups, scheme, scale_dtype)
        else:
            weights = None
            if importance is not None:
                weights = split_groups(importance.expand(weight.shape)[rows], scheme)
            scale, zero = search_grid(groups, weights, scheme, scale_dtype)
        scales[rows], zeros[rows] = scale.squeeze(-1), zero.squeeze(-1)
    return scales, zeros


def quantize(
    weight: Tensor,
    scheme: Scheme,
    *,
    importance: Tensor | None,
    search: str,
    scale_dtype: torch.dtype,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize ``[N, K]`` or ``[E, N, K]``; arguments are validated by the caller."""
    *experts, N, K = weight.shape
    E = experts[0] if experts else 1
    rows = weight.reshape(E * N, K)
    # Per tensor: one group, the matrix as a single row.
    whole = weight.reshape(E, N * K) if scheme.per_tensor else rows
    weights = None if importance is None else importance.expand(weight.shape).reshape(whole.shape)
    if scales is None:
        scale_dtype = torch.float32 if scheme.double_quant else scale_dtype
        scale, zero = grid(whole, scheme, importance=weights, search=search, scale_dtype=scale_dtype)
    else:
        scale_dtype, scale = scales.dtype, scales.flatten(0, -2).float()
        middle = 0 if scheme.codebook else scheme.midpoint
        zero = torch.full_like(scale, middle) if zeros is None else zeros.flatten(0, -2).float()
    nested = None
    if scheme.double_quant:
        nested = nest(scale)
        scale = decode(nested, tuple(scale.shape))
    repeat = N if scheme.per_tensor else 1
    step = divisors(scale).repeat_interleave(repeat, 0)[..., None]
    shift = zero.repeat_interleave(repeat, 0)[..., None]
    packed = torch.empty(E * N, scheme.code_words(K), dtype=torch.int32, device=weight.device)
    for part in pieces(E * N, row_bytes(scheme, K)):
        codes, _ = encode(split_groups(rows[part], scheme), step[part], shift[part], scheme)
        packed[part] = pack_dense(codes.flatten(1)[:, :K], scheme.bits)
    shape = (*experts, *scheme.scale_shape(N, K))
    return QuantizedWeight(
        codes=packed.reshape(*experts, N, scheme.code_words(K)),
        scales=scale.to(scale_dtype).reshape(shape),
        zeros=zero.to(torch.uint8).reshape(shape) if scheme.zero_point else None,
        shape=tuple(weight.shape),
        scheme=scheme,
        nested=nested,
    )


NON_FINITE_MESSAGE: Final = (
    "weight has NaN or Inf values: qkern quantizes finite weights only; repair the tensor"
)


def scale_overflow_message(scale_dtype: torch.dtype) -> str:
    """Say that the scales need a wider dtype."""
    return (
        f"a scale of this weight overflows {scale_dtype}: pass scale_dtype=torch.float32 (ops, "
        "replace_linears), rescale the weight, or leave it as it is (skip)"
    )
