"""KL(original || quantized) a position, and the interval that says whether two of them differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.evaluation.windows import Logits, Model, batches, log_probabilities, runner, split_windows

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "MIN_POSITIONS",
    "Interval",
    "check_finite",
    "divergence",
    "kl_divergence",
    "kl_rows",
    "paired_bootstrap",
    "with_rest",
]

MIN_POSITIONS: Final = 15_000
"""Positions below which a KL is refused: the mean is then too noisy to rank methods."""
# Of fewer blocks an interval says little: then parts of windows are better, though they depend on each other.
_MIN_BLOCKS: Final = 4
# The rest of the vocabulary is one outcome more, which has some probability in floating point.
_LEAST: Final = 1e-12


def kl_divergence(
    reference: Model | Tensor,
    model: Model,
    ids: Tensor,
    *,
    window: int = 512,
    bos: int | None = None,
    batch_size: int = 4,
    compute: str | None = None,
    allow_short: bool = False,
) -> NDArray[np.float64]:
    """KL(reference || model) in nats at every position of every full window.

    The windows do not overlap and every position of a window counts; the mean of the result is the
    number to report. Both distributions are normalized in float64.

    Parameters
    ----------
    reference : Model or Tensor
        The original model, or its logits ``[positions, V]`` from `window_logits` with the same ids,
        window and bos (which saves running it again for every model that is compared).
    model : Model
        The quantized model.
    ids : Tensor
        int64 ``[T]``, held-out tokens that neither calibration nor search saw.
    window, bos, batch_size
        As in `perplexity`.
    compute : str, optional
        ``"float"`` keeps activations, ``"int8"`` quantizes them in every `QuantLinear` of `model`; default:
        int8 where the scheme says a8, else float. The reference always runs in float.
    allow_short : bool
        Accept fewer than `MIN_POSITIONS` positions.

    Returns
    -------
    ndarray
        float64 ``[T // window * window]``, at least 0.

    Raises
    ------
    InputError
        If the text is too short, the vocabularies differ, or a divergence is not finite.
    """
    windows = split_windows(ids, window, bos)
    if windows.numel() < MIN_POSITIONS and not allow_short:
        raise InputError(
            f"KL over {windows.numel()} positions is too noisy to compare methods: at least {MIN_POSITIONS} "
            "are needed; give a longer held-out text, or pass allow_short=True"
        )
    if isinstance(reference, Tensor) and len(reference) != windows.numel():
        raise InputError(
            f"reference logits must have one row a position: got {len(reference)} rows for "
            f"{windows.numel()} positions; compute them with the same ids and window"
        )
    run = runner(model, compute)
    run_reference = _rows_of(reference) if isinstance(reference, Tensor) else runner(reference, "float")
    result = np.empty(windows.numel())
    done = 0
    for batch in batches(windows, batch_size, "KL"):
        rows = slice(done, done + batch.numel())
        found = run(batch).flatten(0, 1)
        expected = run_reference(batch).flatten(0, 1)
        if expected.shape[-1] != found.shape[-1]:
            raise InputError(
                f"the models must share a vocabulary: got {expected.shape[-1]} and {found.shape[-1]} logits"
            )
        result[rows] = kl_rows(expected.to(found.device), found)
        done = rows.stop
    check_finite(result)
    return result


def _rows_of(logits: Tensor) -> Logits:
    """Stand in for a model that ran before: gives the rows of its logits in the order of the batches."""
    done = 0

    def run(ids: Tensor) -> Tensor:
        nonlocal done
        done += ids.numel()
        return logits[done - ids.numel() : done].view(*ids.shape, -1)

    return run


def kl_rows(expected: Tensor, found: Tensor) -> NDArray[np.float64]:
    """KL of each row of logits ``[P, V]``, float64 ``[P]``."""
    pairs = zip(log_probabilities(expected), log_probabilities(found), strict=True)
    result: NDArray[np.float64] = torch.cat([divergence(p, q) for (_, p), (_, q) in pairs]).numpy()
    return result


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL of each row of log-probabilities, float64 on the CPU."""
    # 0 * log 0 is 0, also where q is 0 too; rounding may leave a hair below zero.
    pointwise = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return pointwise.sum(-1).clamp(min=0).cpu().double()


def with_rest(logs: Tensor) -> Tensor:
    """Add to log-probabilities of some tokens that of all others together, as one outcome more."""
    rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp(min=_LEAST).log()
    return torch.cat([logs, rest], -1)


def check_finite(values: NDArray[np.float64]) -> None:
    """Refuse divergences that are no numbers.

    Raises
    ------
    InputError
        If one is NaN or Inf.
    """
    broken = int((~np.isfinite(values)).sum())
    if broken:
        raise InputError(
            f"the divergence is not finite at {broken} of {values.size} positions: logits have NaN or Inf, "
            "or a token that is impossible for one model alone; check the weights, and load fp16 ones in fp32"
        )


class Interval(NamedTuple):
    """A mean difference with its bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def is_below(self) -> bool:
        """Whether the whole interval lies below zero: the first sample is lower beyond chance."""
        return self.high < 0


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    *,
    window: int = 1,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of ``mean(first) - mean(second)``, pairs resampled together.

    The deviations of few windows, or few runs, are those of Student's t: their own spread is uncertain.

    Parameters
    ----------
    first, second : array_like
        One value a position ``[P]`` at the same positions, or ``[runs, P]`` of runs with several seeds; runs
        are resampled too, those of `first` and `second` apart from each other.
    window : int
        Positions of one window, which depend on each other and are resampled together: so the interval is
        one for other texts. Fewer than 4 windows are cut into equal parts, at least 4 in all; parts of a
        window depend on each other, and the interval is too narrow then, the more so as windows differ.
    confidence : float
        Probability that the interval covers, between 0 and 1.
    resamples : int
        Bootstrap samples.
    seed : int
        The same seed gives the same interval.

    Returns
    -------
    Interval
        ``(mean, low, high)``; "first is below second" means ``high < 0``.

    Raises
    ------
    InputError
        If the lengths differ or are no multiple of `window`, if there are fewer than two positions, on values
        that are not finite, or on a confidence outside (0, 1).
    """
    a, b = (np.atleast_2d(np.asarray(values, dtype=np.float64)) for values in (first, second))
    if a.ndim > 2 or b.ndim > 2 or a.shape[1] != b.shape[1] or 0 in (a.size, b.size):
        raise InputError(
            "the samples must be paired and not empty, [positions] or [runs, positions]: got "
            f"{list(np.shape(first))} and {list(np.shape(second))} values"
        )
    positions = a.shape[1]
    if window < 1 or positions % window:
        raise InputError(f"window must divide the positions: got {window} for {positions} of them")
    if positions < 2:
        raise InputError("one position says nothing of others: give more text")
    broken = int(sum(np.count_nonzero(~np.isfinite(values)) for values in (a, b)))
    if broken:
        raise InputError(f"values must be finite: got NaN or Inf in {broken} of {a.size + b.size}")
    if not 0 < confidence < 1 or resamples < 1:
        raise InputError(
            f"confidence must be in (0, 1) and resamples at least 1: got {confidence} and {resamples}"
        )
    windows = positions // window
    blocks = windows * min(window, -(-_MIN_BLOCKS // windows))
    edges = np.arange(blocks + 1) * positions // blocks
    sizes = np.diff(edges)
    even = positions % blocks == 0
    a, b = (np.add.reduceat(values, edges[:-1], axis=1) for values in (a, b))
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    # So many resamples at a time keep the index array near 32 MB.
    some = max(1, (1 << 22) // blocks)
    for start in range(0, resamples, some):
        part = slice(start, min(start + some, resamples))
        count = part.stop - start
        difference = _drawn_runs(generator, a, count) - _drawn_runs(generator, b, count)
        center = difference.sum(1) / positions
        chosen = generator.integers(0, blocks, size=(count, blocks))
        drawn = np.take_along_axis(difference, chosen, 1).sum(1)
        drawn /= positions if even else sizes[chosen].sum(1)
        means[part] = center + _studentized(generator, blocks, count) * (drawn - center)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(float((a.sum() / len(a) - b.sum() / len(b)) / positions), float(low), float(high))


def _drawn_runs(generator: np.random.Generator, runs: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Means of as many runs as there are, drawn anew for each resample: float64 ``[count, blocks]``.

    Of one run ``[1, blocks]``, which is the same in all of them.
    """
    if len(runs) == 1:
        return runs
    equal = 1 / len(runs)
    shares = generator.multinomial(len(runs), np.full(len(runs), equal), size=count) / len(runs)
    return (equal + _studentized(generator, len(runs), count)[:, None] * (shares - equal)) @ runs


def _studentized(generator: np.random.Generator, size: int, count: int) -> NDArray[np.float64]:
    """Draw factors that make deviations of resampled means of `size` values those of Student's t."""
    return np.sqrt(size / generator.chisquare(size - 1, count))
