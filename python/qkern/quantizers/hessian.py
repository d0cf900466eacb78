"""The second-order statistics of a linear's input, and the triangular factor that GPTQ works with."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.gptq_update.block import empty, gather, product

__all__ = ["Factor", "HessianAccumulator", "cholesky", "factorize", "triangular_inverse"]

logger = logging.getLogger(__name__)

# Damping is doubled up to the mean of the diagonal itself; past that the Hessian says nothing any more.
MAX_DAMP = 1.0
# First try after an undamped Hessian (damp=0) turned out not to be positive definite.
FIRST_DAMP = 0.01
# Columns that LAPACK takes at once: with more its result depends on the number of threads.
FACTOR_COLUMNS = 128


class HessianAccumulator:
    """Running mean of ``2 x xᵀ`` over all tokens that a linear sees, in fp32.

    Linears that share an input share one accumulator. A mean (not a sum that is divided at the end)
    keeps the magnitude of the entries independent of the number of tokens, so nothing overflows and a
    late token weighs as many digits as an early one.

    Parameters
    ----------
    features : int
        Input features K.
    device : torch.device or str
        Where the ``[K, K]`` matrix lives.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        if features < 1:
            raise InputError(f"features must be at least 1: got {features}")
        self.features = features
        self.tokens = 0
        self._value = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._mean_abs = torch.zeros(features, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Take in activations ``[..., K]`` of any floating dtype; every leading position is a token.

        Raises
        ------
        InputError
            If the last dimension is not K or the dtype is not floating.
        """
        if x.dim() < 1 or x.shape[-1] != self.features or not x.is_floating_point():
            raise InputError(
                f"activations must be floating [..., {self.features}]: got {x.dtype} {tuple(x.shape)}"
            )
        rows = x.detach().reshape(-1, self.features).to(self._value.device, torch.float32)
        count = rows.shape[0]
        if count == 0:
            return
        self.tokens += count
        share = count / self.tokens
        self._mean_abs.lerp_(rows.abs().mean(0), share)
        # Divided before the product, so that the sum inside it cannot overflow either.
        rows = rows * (2.0 / self.tokens) ** 0.5
        self._value.addmm_(rows.T, rows, beta=1.0 - share)

    def merge(self, other: HessianAccumulator) -> None:
        """Take in what `other` has seen (another stream of tokens of the same input)."""
        if other.features != self.features:
            raise InputError(f"cannot merge {other.features} features into {self.features}")
        if other.tokens == 0:
            return
        self.tokens += other.tokens
        share = other.tokens / self.tokens
        self._value.lerp_(other.value.to(self._value.device), share)
        self._mean_abs.lerp_(other.mean_abs.to(self._value.device), share)

    def scaled(self, scales: Tensor) -> HessianAccumulator:
        """Return the statistics of the input divided by `scales` ``[K]``, as after folding AWQ's scales."""
        result = HessianAccumulator(self.features, self._value.device)
        inverse = scales.to(self._value.device, torch.float32).reciprocal()
        result.tokens = self.tokens
        result._value = self._value * inverse * inverse[:, None]
        result._mean_abs = self._mean_abs * inverse.abs()
        return result

    @property
    def value(self) -> Tensor:
        """fp32 ``[K, K]``: mean of ``2 x xᵀ``; zero before the first token."""
        return self._value

    @property
    def diagonal(self) -> Tensor:
        """fp32 ``[K]``: twice the mean square of each feature."""
        return self._value.diagonal()

    @property
    def mean_abs(self) -> Tensor:
        """fp32 ``[K]``: mean magnitude of each feature, the saliency that AWQ scales by."""
        return self._mean_abs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factor:
    """Upper triangular R with ``R Rᵀ`` = the damped Hessian.

    Parameters
    ----------
    root : Tensor
        fp32 ``[K, K]``, upper triangular.
    damp : float
        Damping that made it positive definite, relative to the mean of the diagonal.
    shift : float
        The same as the number that was added to the diagonal.
    """

    root: Tensor
    damp: float
    shift: float


def factorize(hessian: Tensor, damp: float, order: Tensor | None = None) -> Factor | None:
    """Factor ``H + damp * mean(diag H) * I`` into ``R Rᵀ`` with R upper triangular.

    With R at hand GPTQ needs no inverse of H: the upper Cholesky factor of the inverse, which textbooks
    take from three K^3 steps (factor, invert, factor again), is ``R^-1``, and each block of columns uses
    only the inverse of its own diagonal block. R is the Cholesky factor of H with both axes reversed.

    A matrix that is not positive definite is tried again in float64, then with doubled damping.

    Parameters
    ----------
    hessian : Tensor
        fp32 ``[K, K]``, symmetric.
    damp : float
        Relative damping to begin with.
    order : Tensor or None
        int64 ``[K]``: factor ``hessian[order][:, order]``.

    Returns
    -------
    Factor or None
        None if the matrix has NaN or Inf, or is not positive definite even at a damping of 1.
    """
    # The extremes alone: isfinite would write a mask of the whole matrix.
    if hessian.numel() and not bool(torch.isfinite(torch.stack(hessian.aminmax())).all()):
        return None
    mean = float(hessian.diagonal().mean())
    # No float64 on MPS.
    dtypes = (torch.float32,) if hessian.device.type == "mps" else (torch.float32, torch.float64)
    relative = damp
    backwards = torch.arange(len(hessian), device=hessian.device) if order is None else order
    backwards = backwards.flip(0)
    while True:
        for dtype in dtypes:
            damped = gather(hessian, backwards, backwards).to(dtype)
            damped.diagonal().add_(relative * mean)
            lower = cholesky(damped)
            if lower is not None:
                reverse = torch.arange(len(lower), device=lower.device).flip(0)
                root = gather(lower.to(torch.float32), reverse, reverse)
                return Factor(root=root, damp=relative, shift=relative * mean)
        if relative >= MAX_DAMP:
            return None
        raised = min(max(2 * relative, FIRST_DAMP), MAX_DAMP)
        logger.warning(
            "Hessian is not positive definite with damping %g of its mean diagonal: trying %g",
            relative,
            raised,
        )
        relative = raised


def cholesky(matrix: Tensor) -> Tensor | None:
    """Lower Cholesky factor; None if there is none.

    In fp32 by blocks of columns, so that any number of threads gives the same bits.
    """
    if matrix.dtype != torch.float32:
        lower, info = torch.linalg.cholesky_ex(matrix)
        return lower if int(info) == 0 else None
    lower = empty(len(matrix), len(matrix), matrix.dtype, matrix.device).zero_()
    for start in range(0, len(matrix), FACTOR_COLUMNS):
        stop = min(start + FACTOR_COLUMNS, len(matrix))
        rest = product(lower[start:, :start], -lower[start:stop, :start].T, matrix[start:, start:stop])
        corner, info = torch.linalg.cholesky_ex(rest[: stop - start])
        if int(info) != 0:
            return None
        lower[start:stop, start:stop] = corner
        if stop < len(matrix):  # X @ corner.T = the rest below
            lower[stop:, start:stop] = product(rest[stop - start :], triangular_inverse(corner.T))
    return lower


def triangular_inverse(upper: Tensor) -> Tensor:
    """Inverse of an fp32 upper triangular matrix, upper triangular too; by blocks, as `cholesky`."""
    if len(upper) > FACTOR_COLUMNS:
        inverse = torch.zeros_like(upper)
        half = len(upper) // 2
        first, last = triangular_inverse(upper[:half, :half]), triangular_inverse(upper[half:, half:])
        inverse[:half, :half], inverse[half:, half:] = first, last
        inverse[:half, half:] = product(product(first, -upper[:half, half:]), last)
        return inverse
    identity = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    solved: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return solved
