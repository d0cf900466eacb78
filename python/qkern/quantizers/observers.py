"""What quantizing activations needs to know of them: a sample of tokens, and one scale for all.

A static scale is chosen from the magnitudes of all values that calibration saw. They are counted by the
first bits of their floating-point form, in 1,024 bins from one power of two to the next: no range has to be
known before the first value, and a value is known to a thousandth of itself.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from qkern.errors import InputError

__all__ = ["OBSERVERS", "ActivationRange", "ActivationSample", "checked_observer"]

OBSERVERS: Final = ("minmax", "percentile", "mse")
PERCENTILE: Final = 99.99
# Codes of either sign; -128 is never used by a symmetric range.
_LEVELS: Final = 127
# Mantissa bits of fp32 that a bin ignores.
_SHIFT: Final = 13
_BINS: Final = 1 << (31 - _SHIFT)
# Ranges that mse tries, down to the smallest fraction of the largest magnitude.
_STEPS: Final = 200
_SMALLEST: Final = 0.01


def checked_observer(observer: str) -> str:
    """Return the name of an observer.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if observer not in OBSERVERS:
        raise InputError(f"unknown observer: got {observer!r}, allowed are {', '.join(OBSERVERS)}")
    return observer


class ActivationRange:
    """Magnitudes of all activations that were seen, and the static int8 scale that goes with them.

    Parameters
    ----------
    observer : {"minmax", "percentile", "mse"}
        The range: the largest magnitude; what `percentile` percent of the magnitudes do not exceed; or that
        under which the squared error of the rounded and clipped values is least.
    device : torch.device or str
        Where they are counted: 2 MB.
    percentile : float
        Above 0, at most 100.

    Raises
    ------
    InputError
        On another observer or percentile.
    """

    def __init__(
        self,
        observer: str = "minmax",
        device: torch.device | str = "cpu",
        *,
        percentile: float = PERCENTILE,
    ) -> None:
        self.observer = checked_observer(observer)
        if not 0 < percentile <= 100:
            raise InputError(f"percentile must lie above 0 and be at most 100: got {percentile}")
        self.percentile = percentile
        self.count = 0
        self._bins = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self._largest = torch.zeros((), dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Take in activations of any shape and floating dtype.

        Raises
        ------
        InputError
            If they are not floating, or have NaN or Inf.
        """
        values = _checked(x).detach().to(self._bins.device, torch.float32).abs().flatten()
        if not values.numel():
            return
        self._largest = torch.maximum(self._largest, _finite(values.max()))
        self.count += values.numel()
        if self.observer != "minmax":
            self._bins += torch.bincount(values.view(torch.int32) >> _SHIFT, minlength=_BINS)

    def scale(self) -> Tensor:
        """Return the static scale, fp32 ``[1]`` on the CPU: the range over 127; 1 if all activations were 0.

        Raises
        ------
        InputError
            If nothing was seen.
        """
        if not self.count:
            raise InputError("no activations were seen: add some before asking for their scale")
        largest = float(self._largest)
        bound = largest
        if self.observer == "percentile":
            bound = min(self._ranked(), largest)
        elif self.observer == "mse":
            bound = self._least_error(largest)
        # A percentile of mostly zeros is 0: nothing would be left of the rest.
        bound = bound or largest
        return torch.tensor([bound / _LEVELS if bound else 1.0], dtype=torch.float32, device="cpu")

    def _ranked(self) -> float:
        """Middle of the bin that holds the percentile."""
        rank = max(math.ceil(self.count * self.percentile / 100), 1)
        index = torch.searchsorted(self._bins.cumsum(0), rank).cpu()
        # Zeros lie in the first bin.
        return float(_middle(index.reshape(1))) if index else 0.0

    def _least_error(self, largest: float) -> float:
        # On the CPU and in float64: few numbers, and MPS has no float64.
        bins = self._bins.cpu()
        filled = bins.nonzero().flatten()
        values, counts = _middle(filled), bins[filled].double()
        best, least = largest, torch.inf
        for step in range(_STEPS):
            bound = largest * (1 - (1 - _SMALLEST) * step / _STEPS)
            scale = bound / _LEVELS
            if not scale:
                break
            rounded = (values / scale).round_().clamp_(max=_LEVELS).mul_(scale)
            error = float((counts * (values - rounded).square_()).sum())
            if error < least:
                best, least = bound, error
        return best


def _middle(index: Tensor) -> Tensor:
    """Magnitude in the middle of a bin, float64."""
    edges = torch.stack([index, index + 1]).to(torch.int32) << _SHIFT
    # The last bin of finite numbers ends at Inf.
    return edges.view(torch.float32).double().clamp(max=torch.finfo(torch.float32).max).mean(0)


class ActivationSample:
    """Tokens drawn evenly from all that were seen, and the largest magnitude of each feature in all.

    Parameters
    ----------
    features : int
        K.
    device : torch.device or str
        Where they are kept.
    limit : int
        Tokens that are kept at most.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu", *, limit: int = 512) -> None:
        self.features = features
        self.limit = limit
        self.tokens = 0
        self.largest = torch.zeros(features, dtype=torch.float32, device=device)
        self._kept = torch.zeros(0, features, dtype=torch.float32, device=device)
        self._keys = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._generator = torch.Generator("cpu").manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Take in activations ``[..., K]``; every leading position is a token.

        Raises
        ------
        InputError
            If the last dimension is not K, the dtype is not floating, or there is NaN or Inf.
        """
        if x.dim() < 1 or x.shape[-1] != self.features:
            raise InputError(f"activations must be [..., {self.features}]: got {tuple(x.shape)}")
        rows = _checked(x).detach().reshape(-1, self.features).to(self.largest.device, torch.float32)
        if not len(rows):
            return
        self.tokens += len(rows)
        self.largest = torch.maximum(self.largest, _finite(rows.abs().amax(0)))
        # Each token draws a number, and those with the smallest stay, whenever they came.
        drawn = torch.rand(len(rows), generator=self._generator, dtype=torch.float32, device="cpu")
        keys = torch.cat([self._keys, drawn])
        chosen = keys.argsort()[: self.limit]
        old, new = chosen[chosen < len(self._keys)], chosen[chosen >= len(self._keys)] - len(self._keys)
        device = rows.device
        self._kept = torch.cat([self._kept[old.to(device)], rows[new.to(device)]])
        self._keys = torch.cat([self._keys[old], drawn[new]])

    @property
    def rows(self) -> Tensor:
        """fp32 ``[at most limit, K]``: the tokens."""
        return self._kept


def _checked(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise InputError(f"activations must be floating: got {x.dtype}")
    return x


def _finite(largest: Tensor) -> Tensor:
    """Return magnitudes, the largest of their kind, if they say that there is no NaN and no Inf."""
    if not bool(torch.isfinite(largest).all()):
        raise InputError(
            "activations have NaN or Inf values: quantizing them needs finite ones; check the calibration run"
        )
    return largest
