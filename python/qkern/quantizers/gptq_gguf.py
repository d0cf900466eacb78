"""GPTQ on the grid of a GGUF type: the codes in the file are those that GPTQ chose.

A group of 16 or 32 columns has a scale and perhaps a minimum; in blocks of 256 both are small integers times
units that the block's groups share. When a block is entered, `gguf_encode` sets its units and a first scale
of each group, for the weights as the columns before left them and weighted by what an error of each column
costs. Then group after group runs its columns with this and other scales that the block can hold, and each
row keeps what loses least. Sweeps do the same once more against the errors of all other columns, and fit the
units to the codes.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from qkern.errors import InputError, UnsupportedError
from qkern.ops.gguf_decode import gguf_decode
from qkern.ops.gguf_encode import gguf_encode
from qkern.ops.gguf_encode.fields import LAYOUTS, BlockFields, BlockLayout, read_fields, write_fields
from qkern.ops.gguf_types import gguf_type
from qkern.ops.gptq_update import block
from qkern.ops.gptq_update.block import Block
from qkern.quantizers.columns import (
    Columns,
    Local,
    check_problem,
    energy,
    nested_order,
    no_factor,
    pose,
    ratio,
    total,
)
from qkern.quantizers.hessian import cholesky, triangular_inverse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qkern.quantizers.columns import Problem

__all__ = ["GGUFResult", "gguf_output_error", "quantize_gptq_gguf"]

logger = logging.getLogger(__name__)

# Columns that a sweep takes out of the weight at once.
_SPAN: Final = 256
# Scales that are tried around the one that the encoder found, as parts of it.
_AROUND: Final = (-0.2, -0.15, -0.1, -0.05, 0.05, 0.1, 0.15, 0.2)
# The same in a sweep.
_NEAR: Final = (-0.02, 0.02)
# Minima that are tried around the best one for the codes, in steps that the block can hold.
_SHIFTS: Final = (0, -1, 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GGUFResult:
    """A linear in GGUF blocks and how well it went.

    Parameters
    ----------
    blocks : Tensor
        uint8 ``[N, row bytes]``.
    error : float
        ``tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ)``: squared error of the outputs over calibration, relative.
    notes : tuple of str
        What did not go the plain way.
    """

    blocks: Tensor
    error: float
    notes: tuple[str, ...] = field(default=())


def gguf_output_error(weight: Tensor, blocks: Tensor, type: str, hessian: Tensor) -> float:
    """``tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ)`` of an encoded ``[N, K]`` weight; 0 if the output is zero."""
    full = weight.to(torch.float32)
    difference = full - gguf_decode(blocks, type).to(full.device)
    return ratio(energy(difference, hessian), energy(full, hessian))


def quantize_gptq_gguf(
    weight: Tensor, hessian: Tensor, type: str, *, damp: float = 0.05, sweeps: int = 2
) -> GGUFResult:
    """Encode a weight so that its outputs over the calibration tokens change least.

    Parameters
    ----------
    weight : Tensor
        ``[N, K]``, fp32, fp16 or bf16; K is a multiple of the type's block.
    hessian : Tensor
        fp32 ``[K, K]``, `HessianAccumulator.value`; its overall scale does not matter.
    type : str
        A type of `LAYOUTS`, for example ``"q4_k"``.
    damp : float
        Added to the diagonal of the Hessian, relative to its mean.
    sweeps : int
        Passes over all groups after the first, which take what lowers the loss.

    Returns
    -------
    GGUFResult
        If the Hessian cannot be factored even with full damping, or has NaN or Inf, or a column's errors
        would push others beyond fp16 scales: the weight encoded without it, with a warning in the log and a
        note.

    Raises
    ------
    InputError
        On shapes or numbers that do not fit, or on NaN or Inf in the weight.
    UnsupportedError
        For a type that has no such grid.
    """
    kind = gguf_type(type)
    layout = LAYOUTS.get(kind.name)
    if layout is None:
        raise UnsupportedError(f"GPTQ encodes {', '.join(LAYOUTS)}: got {kind.name}; use method rtn")
    check_problem(weight, hessian)
    if weight.shape[1] % kind.block:
        raise InputError(
            f"{kind.name} stores blocks of {kind.block} weights: got rows of {weight.shape[1]}; "
            "choose a type whose block divides them"
        )
    if not 0 <= damp <= 1 or sweeps < 0:
        raise InputError(f"damp must be in 0..1 and sweeps at least 0: got {damp} and {sweeps}")
    full = weight.to(torch.float32)
    lengths = (layout.group,) if layout.group == layout.block else (layout.group, layout.block)
    order = nested_order(hessian.diagonal(), lengths)
    problem = pose(hessian, order, damp)
    if problem is None:
        return _fall_back(full, kind.name, no_factor(hessian))
    run = _Run(block.gather(full, order), problem, kind.name, layout, sweeps)
    try:
        run.quantize()
    except _BeyondRange:
        note = "rounded to nearest: weights that make up for the errors of others are beyond fp16 scales"
        return _fall_back(full, kind.name, note)
    return GGUFResult(blocks=run.result(), error=problem.error(full, run), notes=problem.notes)


def _fall_back(full: Tensor, type: str, note: str) -> GGUFResult:
    logger.warning("%s", note)
    blocks = gguf_encode(full.cpu(), type)
    change = full.cpu() - gguf_decode(blocks, type)
    # No Hessian to measure with: the relative squared error of the weight itself.
    return GGUFResult(blocks=blocks, error=ratio(total(change.square()), total(full.square())), notes=(note,))


class _BeyondRange(Exception):
    """A target that no block of the type holds."""


class _Grid:
    """What scales and minima of a type can be."""

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        self.integer = bool(layout.scales)
        self.has_minima = layout.dmin is not None

    def scale(self, wanted: Tensor, otherwise: Tensor) -> Tensor:
        """Return the scale nearest to the wanted one; `otherwise` where that is no number."""
        return self._held(wanted, otherwise, self.layout.lowest)

    def minimum(self, wanted: Tensor, otherwise: Tensor) -> Tensor:
        """Return the minimum nearest to the wanted one; `otherwise` where that is no number."""
        return self._held(wanted, otherwise, 0)

    def scales_beside(self, scale: Tensor, part: float) -> Tensor:
        """Scales that differ by a part of themselves, and by one if that is less."""
        step = part * scale.abs()
        if self.integer:
            step = math.copysign(1, part) * step.abs().clamp(min=1)
        return self.scale(scale + step, scale)

    def shifted(self, minimum: Tensor, scale: Tensor, steps: int) -> Tensor:
        """Minima some steps away: integers, or quarters of the distance of two values."""
        step = steps * (torch.ones_like(scale) if self.integer else 0.25 * scale.abs())
        return self.minimum(minimum + step, minimum)

    def _held(self, wanted: Tensor, otherwise: Tensor, lowest: int) -> Tensor:
        if self.integer:
            held = wanted.round().clamp(lowest, self.layout.highest)
        else:
            held = wanted.to(torch.float16).to(torch.float32)
        return torch.where(torch.isfinite(held), held, otherwise)


@dataclass(slots=True, kw_only=True, eq=False)
class _Choice:
    """Scale, minimum and loss of each row of a group, and the codes and change ``[N, B]`` that they gave."""

    scale: Tensor
    minimum: Tensor
    codes: Tensor
    change: Tensor
    loss: Tensor

    def consider(self, other: _Choice) -> None:
        """Take the rows in which `other` loses less."""
        wins = other.loss < self.loss
        self.scale = torch.where(wins, other.scale, self.scale)
        self.minimum = torch.where(wins, other.minimum, self.minimum)
        self.codes = torch.where(wins[:, None], other.codes, self.codes)
        self.change = torch.where(wins[:, None], other.change, self.change)
        self.loss = torch.where(wins, other.loss, self.loss)


class _Group:
    """The columns of one group, to be brought to `local.target`, and the best choice for them so far."""

    def __init__(
        self, grid: _Grid, weight: Tensor, local: Local, units: tuple[Tensor, Tensor], zeros: Tensor
    ) -> None:
        self.grid = grid
        self.weight = weight
        self.local = local
        self.d, self.dmin = units
        self.zeros = zeros
        self.index = torch.zeros(weight.shape[1], dtype=torch.int32, device=weight.device)
        # The loss of a value is the square of what it is away from the aim, through the root.
        self.aim = block.product(local.target, local.root)
        self.one = local.root.sum(0)[:, None]

    def run(self, scale: Tensor, minimum: Tensor) -> _Choice:
        """Run the columns with these scales and minima."""
        offset = (self.dmin * minimum)[:, None]
        codes = torch.empty_like(self.weight, dtype=torch.uint8)
        change = torch.empty_like(self.weight)
        # With the offset added to it the grid has a scale and a zero point; a scale of 0 gives the value 0.
        columns = Block(
            scheme=self.grid.layout,
            origin=self.weight + offset,
            codes=codes,
            change=change,
            scales=(self.d * scale)[:, None],
            zeros=self.zeros,
            group_index=self.index,
        )
        loss = block.quantize(columns, self.local.target + offset, self.local.inverse)
        return _Choice(scale=scale, minimum=minimum, codes=codes, change=change, loss=loss)

    def begin(self, scale: Tensor, minimum: Tensor) -> None:
        """Let the first choice be a run."""
        self.best = self.run(scale, minimum)

    def resume(self, scale: Tensor, minimum: Tensor, codes: Tensor, change: Tensor) -> Tensor:
        """Let the first choice be what there is. Returns its loss."""
        away = self.aim - block.product(self.weight - change, self.local.root)
        loss = away.square().sum(1)
        self.best = _Choice(scale=scale, minimum=minimum, codes=codes, change=change, loss=loss)
        return loss

    def search(self, parts: tuple[float, ...]) -> None:
        """Try the scale there is, that scale changed by these parts of it, and what fits the codes best."""
        scale = self.best.scale
        for part in parts:
            beside = self.grid.scales_beside(scale, part)
            self.best.consider(self.run(beside, self._minimum_for(beside)))
        scale = self._fitted_scale()
        minimum = self._minimum_for(scale)
        for steps in _SHIFTS if self.grid.has_minima else (0,):
            self.best.consider(self.run(scale, self.grid.shifted(minimum, self.d * scale, steps)))

    def _unit(self) -> Tensor:
        """Codes of the best choice without scale and minimum, through the root."""
        levels = self.best.codes.to(torch.float32) - self.grid.layout.zero
        return block.product(levels, self.local.root)

    def _along(self, rows: Tensor) -> Tensor:
        """Each row's product with a constant, through the root."""
        return block.product(rows, self.one)[:, 0]

    def _fitted_scale(self) -> Tensor:
        """Return the scale that loses least with the codes of the best choice, whatever the minimum."""
        unit = self._unit()
        squares, products = unit.square().sum(1), (unit * self.aim).sum(1)
        if self.grid.has_minima:
            # What a constant can do is taken out of both.
            ones, along = self.one.square().sum(), self._along(unit)
            squares = squares - along.square() / ones
            products = products - along * self._along(self.aim) / ones
        return self.grid.scale(products / squares / self.d, self.best.scale)

    def _minimum_for(self, scale: Tensor) -> Tensor:
        """Return the minimum that loses least with these scales and the codes of the best choice."""
        if not self.grid.has_minima:
            return self.best.minimum
        rest = (self.d * scale)[:, None] * self._unit() - self.aim
        fitted = self._along(rest) / self.one.square().sum()
        return self.grid.minimum(fitted / self.dmin, self.best.minimum)


class _Run(Columns):
    """One run. Scales, minima and units are in the order of the file, columns in that of processing."""

    def __init__(self, weight: Tensor, problem: Problem, type: str, layout: BlockLayout, sweeps: int) -> None:
        super().__init__(weight, problem.coupled, problem.order, problem.factor, sweeps=sweeps)
        self.type = type
        self.layout = layout
        self.grid = _Grid(layout)
        N, K = weight.shape
        self.scales = weight.new_zeros(N, K // layout.group)
        self.minima = torch.zeros_like(self.scales)
        self.d = weight.new_zeros(N, K // layout.block)
        self.dmin = torch.zeros_like(self.d)
        self.zeros = torch.full((N, 1), layout.zero, dtype=torch.uint8, device=weight.device)

    def quantize(self) -> None:
        """Go through all columns once, then as often as there are sweeps."""
        for first, last in self._spans():
            if self.grid.integer:
                self._enter(first, last, self.target(first, last, self.corner(first, last)))
            for start, stop in self._groups(first, last):
                corner = self.corner(start, stop)
                target = self.target(start, stop, corner)
                if not self.grid.integer:
                    self._enter(start, stop, target)
                number = self._number(start)
                group = self._group(start, stop, Local(target, self.root[start:stop, start:stop], corner))
                group.begin(self.scales[:, number], self.minima[:, number])
                group.search(_AROUND)
                self._keep(start, stop, group.best)
                self.loss += total(group.best.loss)
        self.forget()
        for _ in range(self.sweeps):
            for first, last in self._spans():
                self._sweep(first, last)

    def result(self) -> Tensor:
        """Return the blocks, uint8 ``[N, row bytes]``."""
        layout, (N, K) = self.layout, self.weight.shape
        B = N * (K // layout.block)
        fields = BlockFields(
            codes=block.gather(self.codes, self.order.argsort()).reshape(B, layout.block),
            scales=self.scales.reshape(B, layout.groups),
            minima=self.minima.reshape(B, layout.groups) if self.grid.has_minima else None,
            d=self.d.reshape(B, 1),
            dmin=self.dmin.reshape(B, 1),
        )
        return write_fields(fields, layout).reshape(N, K // layout.block * layout.bytes).cpu()

    def _spans(self) -> Iterator[tuple[int, int]]:
        K = self.order.numel()
        return pairwise([*range(0, K, _SPAN), K])

    def _groups(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        return pairwise(range(first, last + 1, self.layout.group))

    def _number(self, start: int) -> int:
        """Place in the file of the group that begins here."""
        return int(self.order[start]) // self.layout.group

    def _group(self, start: int, stop: int, local: Local) -> _Group:
        at = int(self.order[start]) // self.layout.block
        units = self.d[:, at], self.dmin[:, at]
        return _Group(self.grid, self.weight[:, start:stop], local, units, self.zeros)

    def _value(self, start: int, stop: int) -> Tensor:
        """Return what the codes of these columns stand for."""
        return self.weight[:, start:stop] - self.difference[:, start:stop]

    def _keep(self, start: int, stop: int, choice: _Choice) -> None:
        number = self._number(start)
        self.scales[:, number], self.minima[:, number] = choice.scale, choice.minimum
        self.codes[:, start:stop] = choice.codes
        self.difference[:, start:stop] = choice.change

    def _enter(self, start: int, stop: int, target: Tensor) -> None:
        """Set units and first scales of the block in these columns, which should be `target`."""
        back = self.order[start:stop].argsort()
        cost = self.cost(start, stop)[back]
        try:
            encoded = gguf_encode(target[:, back].cpu(), self.type, importance=cost.cpu())
        except InputError as error:
            raise _BeyondRange from error
        fields = read_fields(encoded.to(target.device), self.layout)
        at = int(self.order[start]) // self.layout.block
        groups = slice(at * self.layout.groups, (at + 1) * self.layout.groups)
        self.scales[:, groups] = fields.scales
        if fields.minima is not None:
            self.minima[:, groups] = fields.minima
        self.d[:, at], self.dmin[:, at] = fields.d[:, 0], fields.dmin[:, 0]

    def _sweep(self, first: int, last: int) -> None:
        """Better codes, scales and units for these columns, while all others stay."""
        span = self.local(first, last)
        if span is None:
            return  # as good as the first pass left it
        gram = block.product(span.root, span.root.T)
        away = span.target - self._value(first, last)
        for start, stop in self._groups(first, last):
            here = slice(start - first, stop - first)
            local = _part(span, gram, away, here)
            if local is None:
                continue
            group, number = self._group(start, stop, local), self._number(start)
            before = group.resume(
                self.scales[:, number],
                self.minima[:, number],
                self.codes[:, start:stop],
                self.difference[:, start:stop],
            )
            group.best.consider(group.run(group.best.scale, group.best.minimum))
            group.search(_NEAR)
            self._keep(start, stop, group.best)
            self.loss -= total(before - group.best.loss)
            away[:, here] = span.target[:, here] - self._value(start, stop)
        if self.grid.integer:
            self._fit_units(first, last, span)

    def _fit_units(self, first: int, last: int, span: Local) -> None:
        """Take the units that lose least with the codes, scales and minima there are."""
        at = int(self.order[first]) // self.layout.block
        groups = self.order[first:last] // self.layout.group
        steps = self.scales[:, groups] * (self.codes[:, first:last].to(torch.float32) - self.layout.zero)
        minima = self.minima[:, groups]
        aim, rise, fall = (block.product(of, span.root) for of in (span.target, steps, minima))
        d, dmin = self.d[:, at], self.dmin[:, at]

        def loss(d: Tensor, dmin: Tensor) -> Tensor:
            return (aim - d[:, None] * rise + dmin[:, None] * fall).square().sum(1)

        rr, ff, rf = rise.square().sum(1), fall.square().sum(1), (rise * fall).sum(1)
        ar, af = (aim * rise).sum(1), (aim * fall).sum(1)
        if self.grid.has_minima:
            determinant = rr * ff - rf.square()
            fitted = (ar * ff - af * rf) / determinant, (ar * rf - af * rr) / determinant
        else:
            fitted = ar / rr, dmin
        new_d, new_dmin = (unit.to(torch.float16).to(torch.float32) for unit in fitted)
        before, after = loss(d, dmin), loss(new_d, new_dmin)
        wins = after < before  # false where one is no number
        self.loss -= total(torch.where(wins, before - after, 0.0))
        self.d[:, at], self.dmin[:, at] = torch.where(wins, new_d, d), torch.where(wins, new_dmin, dmin)
        values = new_d[:, None] * steps - new_dmin[:, None] * minima
        change = self.weight[:, first:last] - values
        self.difference[:, first:last] = torch.where(wins[:, None], change, self.difference[:, first:last])


def _part(span: Local, gram: Tensor, away: Tensor, here: slice) -> Local | None:
    """Take some columns of a span apart from its others, which are `away` from their targets and stay."""
    square = gram[here, here]
    lower = cholesky(square.flip(0, 1))
    if lower is None:
        return None
    root = lower.flip(0, 1)
    inverse = triangular_inverse(root)
    pull = block.product(away, gram[:, here]) - block.product(away[:, here], square)
    target = block.product(block.product(pull, inverse.T), inverse, span.target[:, here])
    return Local(target, root, inverse)
