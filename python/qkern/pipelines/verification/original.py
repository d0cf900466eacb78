"""Whether a matrix is as far from the original's as its grid explains.

The measure is rounding the original to nearest on the same grid: GPTQ, AWQ and searches of scales move
weights further, or less far, but within small factors of it. What a damaged or misread file does is beyond
them:

- codes in another order have nothing to do with the original: rows are orthogonal to it;
- zero points off by one move every weight of a group by a whole step, rounding their mean by a fraction;
- scales of other rows or groups change the length of weights, which rounding leaves alone up to the square of
  its own relative error. Clipping, as AWQ does it, shortens them, by less than that error: it would not pay.

AWQ and SmoothQuant move factors from linears into the norms or linears before them. Those of norms are known
from the norms; those of linears are estimated, column by column, and must fit both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from qkern.models import describe, pair_channels
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode, quantize_groupwise
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from qkern.models import Architecture, LinearPair, NormLinears
    from qkern.pipelines.history import Grid

__all__ = ["Comparison", "Matrix", "compare_matrix"]

# Times the error of rounding to nearest, root mean square. On the shipped model and others, at 2 to 8 bits,
# GPTQ stays below 1.3 of a matrix, 1.5 of a row, 3 of a block of 32.
TENSOR_LIMIT: Final = 2.0
ROW_LIMIT: Final = 3.0
GROUP_LIMIT: Final = 4.0
# Steps of the grid: the mean error of a group; off by one it is about 1, with GPTQ at 2 bits below 0.3.
OFFSET_LIMIT: Final = 0.75
# Of the cosine that rounding to nearest leaves between a row and the original's.
ORDER_LIMIT: Final = 0.5
# Logarithm of length wanted over length found: this much, and twice rounding's relative error squared; above
# 0, where clipping may have been, that error itself if it is more. Clipping makes nothing longer: where more
# than a few of the parts are, it was not.
SCALE_LIMIT: Final = 0.05
SCALE_FACTOR: Final = 2.0
LONGER_LIMIT: Final = 0.25
# A group that rounding hits by luck is measured by its row, and weights that lie on the grid by how exactly
# fp16 holds their scales.
LUCKY: Final = 0.5
STORED_STEP: Final = 2.0**-11
# Of biases out of which factors went that are estimated from codes; those of norms are known.
FACTOR_ERROR: Final = 0.25
CHUNK_BYTES: Final = 64 << 20
# Columns of a GGUF's matrix that are looked at together; blocks of super-blocks have a scale each.
BLOCK: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix of a file and its grid.

    Parameters
    ----------
    values : Tensor
        fp32 ``[N, K]``, the decoded weights.
    round : callable
        Rounds rows ``[*, K]`` of columns in the order `order` to nearest on the matrix's grid.
    group_size : int
        Columns, in that order, that share a scale; the last group may be shorter.
    order : Tensor or None
        int64 ``[K]``: columns by group; None: as they are.
    """

    values: Tensor
    round: Callable[[Tensor], Tensor]
    group_size: int
    order: Tensor | None = None

    @classmethod
    def on(
        cls, values: Tensor, grid: Grid, passed: Sequence[Grid] | None, order: Tensor | None = None
    ) -> Matrix:
        """Matrix on a grid that was rounded on those which it passed, None: on this one alone."""
        passed = passed or (grid,)
        K = values.shape[1]
        # The smallest: what has a scale of its own is damaged by itself.
        grids = [one for one in (grid, *passed) if isinstance(one, Scheme) or one.block > 1]
        lengths = [one.group_length(K) if isinstance(one, Scheme) else BLOCK for one in grids]
        return cls(values=values, round=partial(_rounded, grids=passed), group_size=min(lengths), order=order)


def _rounded(rows: Tensor, *, grids: Sequence[Grid]) -> Tensor:
    for grid in grids:
        if isinstance(grid, Scheme):
            rows = dequantize_groupwise(quantize_groupwise(rows, grid))
        else:
            rows = gguf_decode(gguf_encode(rows, grid.name), grid.name)
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """Sums over the columns of each group, float64 ``[N, G]``, and how many columns it has, ``[G]``."""

    error: Tensor
    rounding: Tensor
    moved: Tensor
    original: Tensor
    found: Tensor
    product: Tensor
    rounded: Tensor
    rounded_product: Tensor
    columns: Tensor


def compare_matrix(original: Tensor, matrix: Matrix) -> tuple[float, list[str]]:
    """Compare a matrix with the original's.

    Parameters
    ----------
    original : Tensor
        ``[N, K]``, factors that were moved applied.
    matrix : Matrix
        What the file has.

    Returns
    -------
    error : float
        ``|W' - W| / |W|``.
    problems : list of str
        What the grid does not explain; empty if it explains all.
    """
    sums = _summed(original, matrix)
    total = sums.original.sum().clamp(min=1e-30)
    problems = [
        *_order_problems(sums),
        *_offset_problems(sums),
        *_scale_problems(sums),
        *_size_problems(sums),
    ]
    return float((sums.error.sum() / total).sqrt()), problems


def _summed(original: Tensor, matrix: Matrix) -> _Sums:
    N, K = matrix.values.shape
    g = matrix.group_size
    G = -(-K // g)
    columns = torch.full((G,), g, dtype=torch.float64, device="cpu")
    columns[-1] = K - (G - 1) * g
    rows = max(CHUNK_BYTES // (8 * max(K, 1)), 1)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, N, rows):
        W, D = (tensor[start : start + rows].float() for tensor in (original, matrix.values))
        if matrix.order is not None:
            W, D = W[:, matrix.order], D[:, matrix.order]
        R = matrix.round(W.contiguous())
        W, D, R = (torch.nn.functional.pad(t.double(), (0, G * g - K)).view(-1, G, g) for t in (W, D, R))
        nearest = ((R - W) ** 2).maximum((STORED_STEP * W) ** 2)
        products = ((D - W) ** 2, nearest, D - W, W * W, D * D, D * W, R * R, R * W)
        parts.append(tuple(product.sum(-1) for product in products))
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    names = ("error", "rounding", "moved", "original", "found", "product", "rounded", "rounded_product")
    return _Sums(**dict(zip(names, joined, strict=True)), columns=columns)


def _order_problems(sums: _Sums) -> list[str]:
    """Name rows that are not the original's, as if codes were in another order."""
    cosine = _cosine(sums.product, sums.found, sums.original)
    rounded = _cosine(sums.rounded_product, sums.rounded, sums.original)
    bad = cosine < ORDER_LIMIT * rounded
    return _named(bad, cosine, lowest=True, what="rows do not follow the original's: cosine {:.2f}")


def _cosine(product: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return product.sum(1) / (first.sum(1) * second.sum(1)).sqrt().clamp(min=1e-30)


def _offset_problems(sums: _Sums) -> list[str]:
    """Name groups whose weights all lie off to one side, as with wrong zero points."""
    steps = (12 * _rounding(sums) / sums.columns).sqrt()
    offset = (sums.moved / sums.columns / steps.clamp(min=1e-30)).abs()
    offset[sums.rounding.expand_as(offset) == 0] = 0
    return _named(
        offset > OFFSET_LIMIT, offset, what="groups are off to one side by {:.2f} steps: wrong zero points?"
    )


def _scale_problems(sums: _Sums) -> list[str]:
    """Name columns and rows whose weights are too long or too short, as with other groups' scales."""
    slope = (sums.product / sums.found.clamp(min=1e-30)).clamp(min=1e-6).log()
    slope[sums.found == 0] = 0
    problems = []
    for dimension, what in ((0, "groups of columns"), (1, "rows")):
        relative = sums.rounding.sum(dimension) / sums.original.sum(dimension).clamp(min=1e-30)
        typical, signed = slope.abs().median(dimension).values, slope.median(dimension).values
        limit = SCALE_LIMIT + SCALE_FACTOR * relative
        longer = (slope < -limit.unsqueeze(dimension)).double().mean(dimension)
        may_be_clipped = (signed > 0) & (longer < LONGER_LIMIT)
        bad = typical > torch.where(may_be_clipped, limit.maximum(relative.sqrt()), limit)
        problems += _named(bad, typical.exp(), what=f"{what} have the wrong length, by a factor {{:.2f}}")
    return problems


def _size_problems(sums: _Sums) -> list[str]:
    """Name what has too large an error in itself: the matrix, rows, groups."""
    tensor = float((sums.error.sum() / sums.rounding.sum().clamp(min=1e-30)).sqrt())
    problems = []
    if tensor > TENSOR_LIMIT:
        problems.append(
            f"its error is {tensor:.1f} times that of rounding to nearest: allowed is {TENSOR_LIMIT:g}"
        )
    row = (sums.error.sum(1) / sums.rounding.sum(1).clamp(min=1e-30)).sqrt()
    group = (sums.error / _rounding(sums)).sqrt()
    for ratio, limit, what in ((row, ROW_LIMIT, "rows"), (group, GROUP_LIMIT, "groups")):
        text = f"{what} have {{:.1f}} times the error of rounding to nearest: allowed is {limit:g}"
        problems += _named(ratio > limit, ratio, what=text)
    return problems


def _rounding(sums: _Sums) -> Tensor:
    """Squared error of rounding each group, at least a part of its row's."""
    share = sums.columns / sums.columns.sum()
    floor = LUCKY**2 * sums.rounding.sum(1, keepdim=True) * share
    return sums.rounding.maximum(floor).clamp(min=1e-30)


def _named(bad: Tensor, values: Tensor, *, what: str, lowest: bool = False) -> list[str]:
    """Say in one line how many are bad, and the worst value, for which `what` has a place."""
    if not bool(bad.any()):
        return []
    worst = values[bad].min() if lowest else values[bad].max()
    first = tuple(int(place) for place in bad.nonzero()[0])
    where = first[0] if len(first) == 1 else first
    return [f"{int(bad.sum())} of {bad.numel()} {what.format(float(worst))} (first: {where})"]


# Factors that were moved -----------------------------------------------------------------------------------


class Comparison:
    """Compares the matrices and plain tensors of a file with those of the original.

    Parameters
    ----------
    model : PreTrainedModel
        The original, may be without weights, experts as linears; if its architecture is not known no factor
        is looked for.
    original : callable
        Gives a tensor of the original by its name, matrices as ``[N, K]``.
    plain : mapping
        Tensors of the file that are not quantized, by name.
    matrix : callable
        Gives a matrix of the file by the name of its linear.
    norm_offset : float
        Norms multiply by their weight and this.
    """

    def __init__(
        self,
        model: Any,
        original: Callable[[str], Tensor],
        plain: Mapping[str, Tensor],
        matrix: Callable[[str], Matrix],
        *,
        norm_offset: float,
    ) -> None:
        self._model, structure = model, describe(model)
        self._original, self._plain, self._matrix = original, plain, matrix
        self._columns: dict[str, _Moved] = {}
        self._norms: dict[str, _Moved] = {}
        self._pair_of: dict[str, tuple[str, LinearPair]] = {}
        self._folds: dict[str, _Fold | None] = {}
        if structure.architecture is not None:
            for index in range(structure.count):
                self._take_layer(structure.architecture, f"{structure.layers}.{index}", norm_offset)

    def _take_layer(self, architecture: Architecture, layer: str, norm_offset: float) -> None:
        """Enter what the norms and pairs of a decoder layer may have handed on."""
        found, prefix = architecture.in_layer(self._model.get_submodule(layer)), f"{layer}."
        for entry in found.norm_linears:
            self._take_norm(prefix, entry, norm_offset)
        self._pair_of |= {
            prefix + name: (prefix, pair)
            for pair in found.linear_linears
            for name in (pair.first, pair.second)
        }

    def _take_norm(self, prefix: str, entry: NormLinears, offset: float) -> None:
        """Enter the factors of the columns of linears whose norm differs from the original's."""
        name = f"{prefix}{entry.norm}"
        if f"{name}.weight" not in self._plain:
            return
        stored = self._plain[f"{name}.weight"]
        before = self._original(f"{name}.weight").float() + offset
        after = stored.float() + offset
        if before.shape == after.shape and not torch.equal(before, after):
            safe = (before != 0) & (after != 0)
            divisor = torch.where(safe, after, 1.0)
            self._norms[name] = _Moved(
                factors=torch.where(safe, before / divisor, 1.0),
                error=torch.finfo(stored.dtype).eps * (stored.float() / divisor).abs(),
                lost=int(((before == 0) != (after == 0)).sum()),
            )
            readers = (*entry.linears, *entry.routers)
            self._columns |= {f"{prefix}{reader}": self._norms[name] for reader in readers}

    def compare(self, linear: str) -> tuple[float, list[str]]:
        """Compare the matrix of a linear; the result is that of `compare_matrix`."""
        result = compare_matrix(self._wanted(linear), self._matrix(linear))
        if result[1] and linear in self._pair_of:
            fold = self._fold(linear)
            return result if fold is None else fold.results[linear]
        return result

    def _wanted(self, linear: str) -> Tensor:
        weight = self._original(f"{linear}.weight").float()
        return weight * self._columns[linear].factors if linear in self._columns else weight

    def _fold(self, linear: str) -> _Fold | None:
        """Factors between the two linears of a pair, if both fit the same ones."""
        prefix, pair = self._pair_of[linear]
        if prefix + pair.second not in self._folds:
            self._folds[prefix + pair.second] = self._find_fold(prefix, pair)
        return self._folds[prefix + pair.second]

    def _find_fold(self, prefix: str, pair: LinearPair) -> _Fold | None:
        names = (f"{prefix}{pair.first}", f"{prefix}{pair.second}")
        if any(f"{name}.weight" in self._plain for name in names):
            return None
        weights = [self._wanted(name) for name in names]
        matrices = [self._matrix(name) for name in names]
        rows, share = pair_channels(
            self._model.config, pair, *(self._model.get_submodule(name) for name in names)
        )
        columns, certain = _factors(matrices[1].values.t(), weights[1].t())
        made, certain_rows = _factors(matrices[0].values[rows], weights[0][rows])
        # Each channel's factor is in its row and in every column that reads it: the mean, by what is certain.
        weight, total = certain_rows, certain_rows * -made
        weight = weight.index_add(0, share, certain)
        factors = (total.index_add(0, share, certain * columns) / weight).exp()
        weights[0][rows] /= factors[:, None]
        weights[1] *= factors[share]
        results = {
            name: compare_matrix(weight, matrix)
            for name, weight, matrix in zip(names, weights, matrices, strict=True)
        }
        return None if any(problems for _, problems in results.values()) else _Fold(results, rows, factors)

    def plain_problem(self, name: str) -> str | None:
        """Say how a tensor that is not quantized differs from the original's; call it after `compare`."""
        found, original = self._plain[name], self._original(name)
        if found.shape != original.shape:
            return f"{name} has the shape {list(found.shape)}: the original's has {list(original.shape)}"
        if torch.equal(original.to(found.dtype), found):
            return None
        module, _, leaf = name.rpartition(".")
        expected = self._moved(module, leaf, original.float())
        if expected is not None and expected.is_near(found):
            return None
        if leaf == "weight" and module in self._norms:
            return f"{name} is 0 in {self._norms[module].lost} channels where the original's is not, or not 0"
        error = float((found.double() - original.double()).norm() / original.double().norm().clamp(min=1e-30))
        return f"{name} is not quantized and differs from the original's by {error:.1e} of its length"

    def _moved(self, module: str, leaf: str, original: Tensor) -> _Expected | None:
        """Return what factors that were moved out of a tensor, or into it, make of it; None if none were."""
        norm = self._norms.get(module)
        if norm is not None and leaf == "weight":
            # The weight itself says what was moved, and the linears that read it are compared with it.
            return None if norm.lost else _Expected(self._plain[f"{module}.weight"].float())
        if norm is not None:
            return _Expected(original / norm.factors, norm.error)
        if leaf == "weight" and module in self._columns:
            # A router, or a linear that stays 16-bit beside others that do not.
            return _Expected(original * self._columns[module].factors, self._columns[module].error)
        prefix, pair = self._pair_of.get(module, ("", None))
        if pair is None or leaf != "bias" or module != prefix + pair.first:
            return None
        fold = self._fold(module)
        if fold is None:
            return None
        expected = original.clone()
        expected[fold.rows] /= fold.factors
        return _Expected(expected, FACTOR_ERROR, 1e-3 * float(expected.abs().max()))


def _factors(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the factors between rows, least squares, and the inverse of their variances."""
    product, squares = (found * wanted).sum(1), (wanted * wanted).sum(1).clamp(min=1e-30)
    cosine = product / (squares * (found * found).sum(1)).sqrt().clamp(min=1e-30)
    certain = cosine.clamp(min=0) ** 2 / (1 - cosine**2).clamp(min=1e-6) * wanted.shape[1]
    return (product / squares).clamp(min=1e-6).log(), certain.clamp(min=1e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moved:
    """What a norm handed to its readers.

    Factors of channels, how far off each may be because the norm is rounded, relative, and of how many
    channels one norm is 0 and the other is not, which no factor explains.
    """

    factors: Tensor
    error: Tensor
    lost: int


@dataclass(frozen=True, slots=True)
class _Expected:
    """Values of a tensor, and their relative and absolute errors beside its own rounding."""

    values: Tensor
    relative: Tensor | float = 0.0
    absolute: float = 0.0

    def is_near(self, found: Tensor) -> bool:
        rounding = torch.finfo(found.dtype)
        least = self.absolute + rounding.tiny * rounding.eps
        allowed = least + (self.relative + rounding.eps) * self.values.abs()
        return bool(((found.float() - self.values).abs() <= allowed).all())


@dataclass(frozen=True, slots=True)
class _Fold:
    """Factors that left rows of one linear for columns of the next, and how both compare with them."""

    results: dict[str, tuple[float, list[str]]]
    rows: slice
    factors: Tensor
