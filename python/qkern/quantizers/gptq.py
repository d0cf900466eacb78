"""GPTQ: round one column after another and let the columns still free make up for each error.

The textbook form keeps the upper Cholesky factor U of the inverse Hessian and, after each block of
columns, subtracts ``E @ U[block, rest]`` from all the rest of W. Here the same numbers are reached from
the other side. With ``H = R Rᵀ`` (R upper triangular, so ``U = R^-1``) and ``D = W - Q``, the loss
``tr(D H Dᵀ)`` is ``|D R|^2``, and the best free columns after the columns P are fixed obey
``D_P R[P, next] + D_next R[next, next] = 0``. So a block is brought up to date when it is entered:

    target = W[:, block] + (D[:, :start] @ R[:start, block]) @ inv(R[block, block])

That takes one Cholesky factorization and no inverse of H, reads each row of R once, and never rewrites
the rest of the weight. Inside a block `qkern.ops.gptq_update` does the columns; its Hessian factor is
``inv(R[block, block])``, which is exactly ``U[block, block]``.
"""

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
from qkern.quantizers.hessian import factorize, triangular_inverse
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
# Columns of the Hessian that the energy of a weight takes at once.
ENERGY_COLUMNS = 256
# Columns to which the errors of all columns before them are brought at once.
FAR_COLUMNS = 512

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
    return _ratio(_energy(difference, hessian), _energy(full, hessian))


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
    _check(weight, hessian, scheme)
    order, groups = _column_order(hessian.diagonal(), scheme, config)
    hessian = hessian.to(torch.float32)
    notes: list[str] = []
    diagonal = hessian.diagonal()[order]
    dead = diagonal == 0
    added = torch.zeros_like(diagonal)  # to the diagonal, beyond what was measured
    coupled = hessian
    if bool(dead.any()):
        # A column without activations couples to no other: it is rounded to nearest by itself.
        notes.append(f"{int(dead.sum())} of {dead.numel()} input columns saw no activation")
        added[dead] = 1.0 if bool(dead.all()) else diagonal[~dead].mean()
        coupled = hessian.clone()
        coupled[order[dead]] = 0
        coupled[:, order[dead]] = 0
        coupled.diagonal()[order] += added
    factor = factorize(coupled, config.damp, order)
    if factor is None:
        return _fall_back(weight, hessian, scheme, config)
    if factor.damp > config.damp:
        notes.append(f"damping raised from {config.damp:g} to {factor.damp:g}")
    full = weight.to(torch.float32)
    run = _Run(block.gather(full, order), coupled, order, factor, groups, scheme, config)
    run.quantize()
    # |D R|^2 is the loss under the damped Hessian; what damping added to it comes off again.
    lost = run.loss - factor.shift * _total(torch.linalg.vector_norm(run.difference, dim=1).square())
    lost -= _total(run.difference[:, dead].square().sum(0) * added[dead])
    error = _ratio(max(lost, 0.0), _energy(full, hessian))
    return LayerResult(weight=run.result(), error=error, notes=tuple(notes))


class _Run:
    """The state of one GPTQ run; columns are in processing order throughout.

    `hessian` (which is not) is what `root` is the factor of, before `shift` was added to its diagonal.
    """

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
        self.weight = weight
        self.hessian = hessian
        self.order = order
        self.root = factor.root
        self.shift = factor.shift
        self.groups = groups
        self.scheme = scheme
        self.config = config
        N, K = weight.shape
        shape = (N, scheme.num_groups(K))
        self.scales = torch.ones(shape, dtype=torch.float32, device=weight.device)
        self.zeros = torch.full(shape, scheme.midpoint, dtype=torch.uint8, device=weight.device)
        self.codes = block.empty(N, K, torch.uint8, weight.device)
        # Each column is read for the last time when its difference is known, unless sweeps come back to it.
        self.sweeps = config.sweeps if config.search == "loss" else 0
        self.difference = torch.empty_like(weight) if self.sweeps else weight
        self.loss = 0.0
        self.far: Tensor | None = None
        self.far_start = self.far_stop = 0

    def quantize(self) -> None:
        """Go through all columns once, and with ``search="loss"`` some times more."""
        size = self.config.block_size
        if self.config.static_groups:
            self._set_static_scales()
        for start, stop in self._runs():
            target = None
            if not self.config.static_groups:
                corner = self._corner(start, stop)
                target = self._target(start, stop, corner)
                grid = self._set_scales(start, stop, target)
                if self._searches_loss(stop - start):
                    losses = block.search(self._block(start, stop), target, corner, self._candidates(grid))
                    self.loss += _total(losses)
                    continue
            for first in range(start, stop, size):
                last = min(first + size, stop)
                if target is None or (first, last) != (start, stop):
                    corner = self._corner(first, last)
                    target = self._target(first, last, corner)
                self.loss += _total(block.quantize(self._block(first, last), target, corner))
        self.far = None  # up to 2 KiB a row that nobody needs any more
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

    def _corner(self, start: int, stop: int) -> Tensor:
        return triangular_inverse(self.root[start:stop, start:stop])

    def _target(self, start: int, stop: int, corner: Tensor) -> Tensor:
        """Where the weights of these columns should be, given the errors of all columns before."""
        weight = self.weight[:, start:stop]
        if start == 0:
            return weight
        return block.product(self._pull(start, stop), corner, weight)

    def _pull(self, start: int, stop: int) -> Tensor:
        """Product of all errors so far with these columns of the root.

        The errors come from memory, so those of long ago are multiplied for `FAR_COLUMNS` at once.
        """
        if stop > self.far_stop:
            self.far_start, self.far_stop = start, min(max(stop, start + FAR_COLUMNS), self.groups.numel())
            self.far = block.product(
                self.difference[:, :start], self.root[:start, start : self.far_stop], fixed=True
            )
        assert self.far is not None
        far = self.far[:, start - self.far_start : stop - self.far_start]
        if start == self.far_start:
            return far
        between = slice(self.far_start, start)
        return block.product(self.difference[:, between], self.root[between, start:stop], far)

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

    def _cost(self, start: int, stop: int) -> Tensor:
        """Return what a unit error of each column adds to the loss once later columns made up for it."""
        cost = self.root.diagonal()[start:stop].square()
        return cost / cost.max()  # only the proportions matter, and far fewer digits are at risk

    def _set_static_scales(self) -> None:
        K = self.groups.numel()
        # Group after group, as quantize_groupwise cuts them; inside a group the order does not matter.
        back = self.groups.argsort(stable=True)
        self.scales[:], self.zeros[:] = self._grid(
            self.weight[:, back], self.scheme, self.config.search, self._cost(0, K)[back]
        )

    def _set_scales(self, start: int, stop: int, target: Tensor) -> Tensor:
        group = int(self.groups[start])
        scheme = replace(self.scheme, group_size=None)
        scales, zeros = self._grid(target, scheme, self.config.search, self._cost(start, stop))
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
        rows = block.gather(self.hessian, self.order, self.order[start:stop])
        square = rows[:, start:stop].flip(0, 1)
        square.diagonal().add_(self.shift)
        lower, info = torch.linalg.cholesky_ex(square)
        if int(info) != 0:
            return  # too ill-conditioned for fp32; the block is as good as the first pass left it
        local = lower.flip(0, 1)
        inverse = triangular_inverse(local)
        rows[:, start:stop] = 0  # the other columns stay
        pull = block.product(self.difference, rows.T)
        target = block.product(block.product(pull, inverse.T), inverse, self.weight[:, start:stop])
        fits = FITS if rescale else 0
        block_of = self._block(start, stop)
        gains = block.improve(block_of, target, inverse, local, fits, self.config.scale_dtype)
        self.loss -= _total(gains)


def _trivial_groups(K: int, scheme: Scheme, device: torch.device) -> Tensor:
    return torch.arange(K, dtype=torch.int32, device=device) // scheme.group_length(K)


def _column_order(diagonal: Tensor, scheme: Scheme, config: GPTQConfig) -> tuple[Tensor, Tensor]:
    """Return the order of the columns (int64 ``[K]``) and, in that order, their groups (int32 ``[K]``)."""
    K = diagonal.numel()
    trivial = _trivial_groups(K, scheme, diagonal.device)
    # A Hessian with NaN has no order; the run falls back before it is used.
    importance = torch.nan_to_num(diagonal.to(torch.float32))
    if config.act_order == "none":
        return torch.arange(K, device=diagonal.device), trivial
    order = importance.argsort(descending=True, stable=True)
    if config.act_order == "desc_act":
        return order, trivial[order] if config.static_groups else trivial
    count = scheme.num_groups(K)
    total = importance.new_zeros(count).index_add_(0, trivial.long(), importance)
    size = torch.bincount(trivial, minlength=count)
    rank = torch.empty(count, dtype=torch.int64, device=diagonal.device)
    rank[(total / size).argsort(descending=True, stable=True)] = torch.arange(count, device=diagonal.device)
    order = order[rank[trivial.long()[order]].argsort(stable=True)]
    return order, trivial[order]


def _energy(matrix: Tensor, hessian: Tensor) -> float:
    """``tr(M H Mᵀ)``, from one triangle of H."""
    total = 0.0
    for start in range(0, len(hessian), ENERGY_COLUMNS):
        stop = min(start + ENERGY_COLUMNS, len(hessian))
        columns = hessian[:stop, start:stop].to(torch.float32, copy=True)
        columns[:start] *= 2
        total += _total(block.product(matrix[:, :stop], columns).mul_(matrix[:, start:stop]))
    return total


def _total(values: Tensor) -> float:
    return float(values.sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _fall_back(weight: Tensor, hessian: Tensor, scheme: Scheme, config: GPTQConfig) -> LayerResult:
    finite = bool(torch.isfinite(hessian).all())
    why = "is not positive definite even with full damping" if finite else "has NaN or Inf"
    note = f"rounded to nearest: the Hessian {why}"
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
    error = _ratio(float(difference.square().sum()), float(full.square().sum()))
    return LayerResult(weight=quantized, error=error, notes=(note,))


def _check(weight: Tensor, hessian: Tensor, scheme: Scheme) -> None:
    if weight.dim() != 2 or weight.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"weight must be a fp32, fp16 or bf16 matrix [N, K]: got {weight.dtype} {tuple(weight.shape)}"
        )
    K = weight.shape[1]
    if tuple(hessian.shape) != (K, K) or not hessian.is_floating_point():
        raise InputError(
            f"hessian of a weight with K={K} must be floating [{K}, {K}]: "
            f"got {hessian.dtype} {tuple(hessian.shape)}"
        )
    # The extremes alone: isfinite would write a mask of the whole weight.
    if weight.numel() and not bool(torch.isfinite(torch.stack(weight.aminmax())).all()):
        raise InputError("weight has NaN or Inf values: only finite weights are quantized; repair the tensor")
    if scheme.double_quant:
        raise UnsupportedError(f"GPTQ needs plain scales: got {scheme}; drop the d or use method rtn")
