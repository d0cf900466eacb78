"""GPTQ: round one column after another and let the columns still free make up for each error."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from qkern.errors import InputError, UnsupportedError
from qkern.ops import dequantize_groupwise, pack_bits, quantize_groupwise
from qkern.ops.gptq_update import MAX_COLUMNS, block
from qkern.ops.gptq_update.block import Block
from qkern.quantizers.columns import (
    Columns,
    check_problem,
    energy,
    nested_order,
    no_factor,
    pose,
    ratio,
    total,
)
from qkern.quantizers.rtn import quantize_rtn
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme, as_scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qkern.quantizers.hessian import Factor

__all__ = ["ActOrder", "GPTQConfig", "LayerResult", "ScaleSearch", "output_error", "quantize_gptq"]

logger = logging.getLogger(__name__)

# The loss search looks this far to both sides of a scale; the best one is rarely farther away.
REACH = 0.2
# Times that a sweep alternates between the best scale for the codes and the best codes for the scale.
FITS = 2

ActOrder = Literal["none", "group-aware", "desc_act"]
ScaleSearch = Literal["minmax", "mse", "loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTQConfig:
    """How GPTQ runs.

    Parameters
    ----------
    damp : float
        Added to the diagonal of the Hessian, relative to its mean.
    block_size : int
        Most columns that `gptq_update` does at once; changes speed and rounding noise, and which groups
        ``search="loss"`` runs: those that fit.
    act_order : {"group-aware", "desc_act", "none"}
        Order of the columns. ``"group-aware"``: groups by importance and columns by importance inside
        their group, so the stored group of each column stays trivial. ``"desc_act"``: all columns by
        importance; the stored `group_index` follows that order unless the groups are static.
    static_groups : bool
        Scales from the original weights, all before the first column; else each group's scales come
        from its weights as the columns before left them.
    search : {"minmax", "mse", "loss"}
        How a group's scale is chosen. ``"minmax"``: spans the group. ``"mse"``: least rounding error, each
        column weighted by what its error costs once the columns after it have made up for it.
        ``"loss"``: from there, runs the group's columns with `candidates` other scales and keeps, row by
        row, the one with the least GPTQ loss; then `sweeps` more passes over all groups change codes
        and scales wherever that lowers the loss. Scales of static groups, of a whole tensor and of
        groups longer than a block have no such run of their own and stay those of ``"mse"``.
    candidates : int
        Scales that ``search="loss"`` tries around that of ``"mse"``.
    sweeps : int
        Passes of ``search="loss"`` after the first.
    scale_dtype : torch.dtype
        Dtype in which scales are stored.

    Raises
    ------
    InputError
        On a value out of range.
    """

    damp: float = 0.05
    block_size: int = 128
    act_order: ActOrder = "group-aware"
    static_groups: bool = False
    search: ScaleSearch = "loss"
    candidates: int = 10
    sweeps: int = 2
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= 1:
            raise InputError(f"damp must be between 0 and 1: got {self.damp}; 0.05 is the default")
        if not 1 <= self.block_size <= MAX_COLUMNS:
            raise InputError(f"block_size must be between 1 and {MAX_COLUMNS}: got {self.block_size}")
        if self.candidates < 1:
            raise InputError(f"candidates must be at least 1: got {self.candidates}")
        if self.sweeps < 0:
            raise InputError(f"sweeps must not be negative: got {self.sweeps}")
        for name, allowed in (("act_order", get_args(ActOrder)), ("search", get_args(ScaleSearch))):
            if getattr(self, name) not in allowed:
                raise InputError(f"unknown {name} {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        if self.scale_dtype not in FLOAT_DTYPES:
            raise InputError(f"scale_dtype must be fp32, fp16 or bf16: got {self.scale_dtype}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerResult:
    """A quantized linear and how well it went.

    Parameters
    ----------
    weight : QuantizedWeight
        The result.
    error : float
        ``tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ)``: squared error of the outputs over calibration, relative.
    notes : tuple of str
        What did not go the plain way: raised damping, dead columns, a fall to RTN.
    """

    weight: QuantizedWeight
    error: float
    notes: tuple[str, ...] = field(default=())


def output_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """``tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ)`` of a quantized ``[N, K]`` weight; 0 if the output is zero."""
    full = weight.float()
    difference = full - dequantize_groupwise(quantized)
    return ratio(energy(difference, hessian), energy(full, hessian))


def quantize_gptq(
    weight: Tensor, hessian: Tensor, scheme: Scheme | str, config: GPTQConfig | None = None
) -> LayerResult:
    """Quantize a weight so that its outputs over the calibration tokens change least.

    Parameters
    ----------
    weight : Tensor
        ``[N, K]``, fp32, fp16 or bf16.
    hessian : Tensor
        fp32 ``[K, K]``, `HessianAccumulator.value`; its overall scale does not matter. Columns whose
        diagonal is 0 (no activation ever reached them) are rounded to nearest and disturb no other.
    scheme : Scheme or str
        2, 3, 4 or 8 bits, symmetric, asymmetric or a codebook, any group size, per channel or per tensor.
    config : GPTQConfig or None
        None: the defaults.

    Returns
    -------
    LayerResult
        If the Hessian cannot be factored even with full damping, or has NaN or Inf: the weight rounded
        to nearest, with a warning in the log and a note.

    Raises
    ------
    InputError
        On shapes that do not fit, or on NaN or Inf in the weight.
    UnsupportedError
        For double-quantized scales.
    """
    scheme = as_scheme(scheme)
    config = config or GPTQConfig()
    check_problem(weight, hessian)
    if scheme.double_quant:
        raise UnsupportedError(f"GPTQ needs plain scales: got {scheme}; drop the d or use method rtn")
    order, groups = _column_order(hessian.diagonal(), scheme, config)
    problem = pose(hessian, order, config.damp)
    if problem is None:
        return _fall_back(weight, hessian, scheme, config)
    full = weight.to(torch.float32)
    run = _Run(block.gather(full, order), problem.coupled, order, problem.factor, groups, scheme, config)
    run.quantize()
    return LayerResult(weight=run.result(), error=problem.error(full, run), notes=problem.notes)


class _Run(Columns):
    """One GPTQ run on the grid of a scheme."""

    def __init__(
        self,
        weight: Tensor,
        hessian: Tensor,
        order: Tensor,
        factor: Factor,
        groups: Tensor,
        scheme: Scheme,
        config: GPTQConfig,
    ) -> None:
        super().__init__(
            weight, hessian, order, factor, sweeps=config.sweeps if config.search == "loss" else 0
        )
        self.groups = groups
        self.scheme = scheme
        self.config = config
        N, K = weight.shape
        shape = (N, scheme.num_groups(K))
        self.scales = torch.ones(shape, dtype=torch.float32, device=weight.device)
        self.zeros = torch.full(shape, scheme.midpoint, dtype=torch.uint8, device=weight.device)

    def quantize(self) -> None:
        """Go through all columns once, and with ``search="loss"`` some times more."""
        size = self.config.block_size
        if self.config.static_groups:
            self._set_static_scales()
        for start, stop in self._runs():
            target = None
            if not self.config.static_groups:
                corner = self.corner(start, stop)
                target = self.target(start, stop, corner)
                grid = self._set_scales(start, stop, target)
                if self._searches_loss(stop - start):
                    losses = block.search(self._block(start, stop), target, corner, self._candidates(grid))
                    self.loss += total(losses)
                    continue
            for first in range(start, stop, size):
                last = min(first + size, stop)
                if target is None or (first, last) != (start, stop):
                    corner = self.corner(first, last)
                    target = self.target(first, last, corner)
                self.loss += total(block.quantize(self._block(first, last), target, corner))
        self.forget()
        for _ in range(self.sweeps):
            self._sweep()

    def result(self) -> QuantizedWeight:
        """Return the weight with its columns back in their original order."""
        N, K = self.weight.shape
        back = self.order.argsort()
        original = self.groups[back]
        trivial = torch.equal(original, _trivial_groups(K, self.scheme, self.groups.device))
        rows = slice(0, 1) if self.scheme.per_tensor else slice(None)
        return QuantizedWeight(
            codes=pack_bits(block.gather(self.codes, back), self.scheme.bits),
            scales=self.scales[rows].to(self.config.scale_dtype),
            zeros=self.zeros[rows].clone() if self.scheme.zero_point else None,
            shape=(N, K),
            scheme=self.scheme,
            group_index=None if trivial else original,
        )

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Column ranges whose scales can be set when they are entered: the groups, or all at once."""
        borders = [0, self.groups.numel()]
        if not self.config.static_groups:
            borders[1:1] = (1 + (self.groups[1:] != self.groups[:-1]).nonzero().flatten()).tolist()
        return pairwise(borders)

    def _searches_loss(self, length: int) -> bool:
        fits = length <= self.config.block_size and not self.scheme.per_tensor
        return self.config.search == "loss" and fits

    def _block(self, start: int, stop: int) -> Block:
        return Block(
            scheme=self.scheme,
            origin=self.weight[:, start:stop],
            codes=self.codes[:, start:stop],
            change=self.difference[:, start:stop],
            scales=self.scales,
            zeros=self.zeros,
            group_index=self.groups[start:stop],
        )

    def _grid(
        self, target: Tensor, scheme: Scheme, search: ScaleSearch, cost: Tensor
    ) -> tuple[Tensor, Tensor]:
        minmax = search == "minmax"
        grid = quantize_groupwise(
            target,
            scheme,
            search="minmax" if minmax else "mse",
            importance=None if minmax else cost,
            scale_dtype=self.config.scale_dtype,
        )
        zeros = self.zeros.new_tensor(scheme.midpoint) if grid.zeros is None else grid.zeros
        return grid.scales.to(torch.float32), zeros

    def _set_static_scales(self) -> None:
        K = self.groups.numel()
        # Group after group, as quantize_groupwise cuts them; inside a group the order does not matter.
        back = self.groups.argsort(stable=True)
        self.scales[:], self.zeros[:] = self._grid(
            self.weight[:, back], self.scheme, self.config.search, self.cost(0, K)[back]
        )

    def _set_scales(self, start: int, stop: int, target: Tensor) -> Tensor:
        group = int(self.groups[start])
        scheme = replace(self.scheme, group_size=None)
        scales, zeros = self._grid(target, scheme, self.config.search, self.cost(start, stop))
        self.scales[:, group : group + 1] = scales
        self.zeros[:, group : group + 1] = zeros
        return scales

    def _candidates(self, scales: Tensor) -> Tensor:
        """``[C, N]``: the scales themselves, then those around them, as they can be stored."""
        count = self.config.candidates
        ratios = scales.new_ones(1 + count)
        ratios[1:] = torch.linspace(1 - REACH, 1 + REACH, count, dtype=torch.float32, device=scales.device)
        base = scales[:, 0]
        around = (ratios[:, None] * base).to(self.config.scale_dtype).to(torch.float32)
        return torch.where(around == 0, base, around)  # too small for its dtype

    def _sweep(self) -> None:
        """Go through all blocks again: each against the errors of all other columns, before and behind."""
        size = self.config.block_size
        for start, stop in self._runs():
            rescale = self._searches_loss(stop - start) and not self.config.static_groups
            for first in range(start, stop, size):
                self._improve(first, min(first + size, stop), rescale=rescale)

    def _improve(self, start: int, stop: int, *, rescale: bool) -> None:
        """Take better codes (and, of a whole group, a better scale) in each row that has them."""
        local = self.local(start, stop)
        if local is None:
            return  # the block is as good as the first pass left it
        fits = FITS if rescale else 0
        of = self._block(start, stop)
        gains = block.improve(of, local.target, local.inverse, local.root, fits, self.config.scale_dtype)
        self.loss -= total(gains)


def _trivial_groups(K: int, scheme: Scheme, device: torch.device) -> Tensor:
    return torch.arange(K, dtype=torch.int32, device=device) // scheme.group_length(K)


def _column_order(diagonal: Tensor, scheme: Scheme, config: GPTQConfig) -> tuple[Tensor, Tensor]:
    """Return the order of the columns (int64 ``[K]``) and, in that order, their groups (int32 ``[K]``)."""
    K = diagonal.numel()
    trivial = _trivial_groups(K, scheme, diagonal.device)
    if config.act_order == "none":
        return torch.arange(K, device=diagonal.device), trivial
    if config.act_order == "desc_act":
        order = nested_order(diagonal, ())
        return order, trivial[order] if config.static_groups else trivial
    order = nested_order(diagonal, (scheme.group_length(K),))
    return order, trivial[order]


def _fall_back(weight: Tensor, hessian: Tensor, scheme: Scheme, config: GPTQConfig) -> LayerResult:
    note = no_factor(hessian)
    logger.warning("%s", note)
    quantized = quantize_rtn(
        weight,
        scheme,
        search="minmax" if config.search == "minmax" else "mse",
        scale_dtype=config.scale_dtype,
    )
    full = weight.to(torch.float32)
    difference = full - dequantize_groupwise(quantized)
    # No Hessian to measure with: the relative squared error of the weight itself.
    error = ratio(float(difference.square().sum()), float(full.square().sum()))
    return LayerResult(weight=quantized, error=error, notes=(note,))
