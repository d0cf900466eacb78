"""Going through the columns of a weight as GPTQ does, whatever the grid: order, targets, losses.

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

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.gptq_update import block
from qkern.quantizers.hessian import cholesky, factorize, triangular_inverse
from qkern.schemes import FLOAT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qkern.quantizers.hessian import Factor

__all__ = [
    "Columns",
    "Local",
    "Problem",
    "check_problem",
    "energy",
    "nested_order",
    "no_factor",
    "pose",
    "ratio",
    "total",
]

# Columns of the Hessian that the energy of a weight takes at once.
ENERGY_COLUMNS = 256
# Columns to which the errors of all columns before them are brought at once.
FAR_COLUMNS = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """A Hessian ready for a run.

    Parameters
    ----------
    hessian : Tensor
        fp32 ``[K, K]``, as it was measured.
    coupled : Tensor
        The same with dead columns taken apart from all others.
    order : Tensor
        int64 ``[K]``: the columns in the order of their processing.
    factor : Factor
        Of `coupled` in that order, damped.
    dead, added : Tensor
        In processing order: the columns without activations, and what they got on the diagonal.
    notes : tuple of str
        What did not go the plain way.
    """

    hessian: Tensor
    coupled: Tensor
    order: Tensor
    factor: Factor
    dead: Tensor
    added: Tensor
    notes: tuple[str, ...]

    def error(self, weight: Tensor, run: Columns) -> float:
        """``tr(D H Dᵀ) / tr(W H Wᵀ)`` after a run, from the loss that it kept count of."""
        # |D R|^2 is the loss under the damped Hessian; what damping added to it comes off again.
        lost = run.loss - self.factor.shift * total(torch.linalg.vector_norm(run.difference, dim=1).square())
        lost -= total(run.difference[:, self.dead].square().sum(0) * self.added[self.dead])
        return ratio(max(lost, 0.0), energy(weight, self.hessian))


def pose(hessian: Tensor, order: Tensor, damp: float) -> Problem | None:
    """Take dead columns out of a Hessian and factor it; None if it cannot be factored."""
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
    factor = factorize(coupled, damp, order)
    if factor is None:
        return None
    if factor.damp > damp:
        notes.append(f"damping raised from {damp:g} to {factor.damp:g}")
    return Problem(
        hessian=hessian,
        coupled=coupled,
        order=order,
        factor=factor,
        dead=dead,
        added=added,
        notes=tuple(notes),
    )


class Local(NamedTuple):
    """A block while all other columns stay.

    Its loss is ``|(target - value) @ root|^2`` plus what no choice in the block changes; `inverse` is the
    inverse of `root`, both upper triangular.
    """

    target: Tensor
    root: Tensor
    inverse: Tensor


class Columns:
    """A weight, what its columns have become so far, and what that means for the others.

    Columns are in processing order throughout; `hessian` (which is not) is what `root` is the factor of,
    before `shift` was added to its diagonal. A run over all columns may be followed by `sweeps` over them.
    """

    def __init__(
        self, weight: Tensor, hessian: Tensor, order: Tensor, factor: Factor, *, sweeps: int
    ) -> None:
        self.weight = weight
        self.hessian = hessian
        self.order = order
        self.root = factor.root
        self.shift = factor.shift
        self.codes = block.empty(weight.shape[0], weight.shape[1], torch.uint8, weight.device)
        # Each column is read for the last time when its difference is known, unless sweeps come back to it.
        self.sweeps = sweeps
        self.difference = torch.empty_like(self.weight) if sweeps else self.weight
        self.loss = 0.0
        self.far: Tensor | None = None
        self.far_start = self.far_stop = 0

    def corner(self, start: int, stop: int) -> Tensor:
        """Hessian factor of the block alone."""
        return triangular_inverse(self.root[start:stop, start:stop])

    def target(self, start: int, stop: int, corner: Tensor) -> Tensor:
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
            columns = self.order.numel()
            self.far_start, self.far_stop = start, min(max(stop, start + FAR_COLUMNS), columns)
            self.far = block.product(
                self.difference[:, :start], self.root[:start, start : self.far_stop], fixed=True
            )
        assert self.far is not None
        far = self.far[:, start - self.far_start : stop - self.far_start]
        if start == self.far_start:
            return far
        between = slice(self.far_start, start)
        return block.product(self.difference[:, between], self.root[between, start:stop], far)

    def forget(self) -> None:
        """Give memory back after the first run: up to 2 KiB a row."""
        self.far = None

    def local(self, start: int, stop: int) -> Local | None:
        """Take these columns apart from all others, before and behind, which stay as they are.

        None if the block is too ill-conditioned for fp32.
        """
        rows = block.gather(self.hessian, self.order, self.order[start:stop])
        square = rows[:, start:stop].flip(0, 1)
        square.diagonal().add_(self.shift)
        lower = cholesky(square)
        if lower is None:
            return None
        root = lower.flip(0, 1)
        inverse = triangular_inverse(root)
        rows[:, start:stop] = 0
        pull = block.product(self.difference, rows.T)
        target = block.product(block.product(pull, inverse.T), inverse, self.weight[:, start:stop])
        return Local(target, root, inverse)

    def cost(self, start: int, stop: int) -> Tensor:
        """Return what a unit error of each column adds to the loss once later columns made up for it."""
        cost = self.root.diagonal()[start:stop].square()
        return cost / cost.max()  # only the proportions matter, and far fewer digits are at risk


def nested_order(diagonal: Tensor, lengths: Sequence[int]) -> Tensor:
    """Columns by importance inside their groups, these by importance inside theirs, and so on.

    Parameters
    ----------
    diagonal : Tensor
        ``[K]``, importance of the columns; a group's is its mean.
    lengths : sequence of int
        Columns of the groups, the innermost first.

    Returns
    -------
    Tensor
        int64 ``[K]``.
    """
    # A Hessian with NaN has no order; the run falls back before it is used.
    importance = torch.nan_to_num(diagonal.to(torch.float32))
    order = importance.argsort(descending=True, stable=True)
    for length in lengths:
        group = torch.arange(order.numel(), device=order.device) // length
        size = torch.bincount(group)
        mean = importance.new_zeros(size.numel()).index_add_(0, group, importance) / size
        rank = torch.empty_like(size)
        rank[mean.argsort(descending=True, stable=True)] = torch.arange(size.numel(), device=order.device)
        order = order[rank[group[order]].argsort(stable=True)]
    return order


def check_problem(weight: Tensor, hessian: Tensor) -> None:
    """Refuse what no grid can do anything with.

    Raises
    ------
    InputError
        On shapes that do not fit, or on NaN or Inf in the weight.
    """
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


def no_factor(hessian: Tensor) -> str:
    """Why `pose` gave up, as a note."""
    finite = bool(torch.isfinite(hessian).all())
    why = "is not positive definite even with full damping" if finite else "has NaN or Inf"
    return f"rounded to nearest: the Hessian {why}"


def energy(matrix: Tensor, hessian: Tensor) -> float:
    """``tr(M H Mᵀ)``, from one triangle of H."""
    result = 0.0
    for start in range(0, len(hessian), ENERGY_COLUMNS):
        stop = min(start + ENERGY_COLUMNS, len(hessian))
        columns = hessian[:stop, start:stop].to(torch.float32, copy=True)
        columns[:start] *= 2
        result += total(block.product(matrix[:, :stop], columns).mul_(matrix[:, start:stop]))
    return result


def total(values: Tensor) -> float:
    """Sum as a number."""
    return float(values.sum())


def ratio(part: float, whole: float) -> float:
    """``part / whole``; 0 of nothing."""
    return part / whole if whole > 0 else 0.0
