"""How a quantized layer becomes one that another format holds: other codes for the same weights, or anew."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from qkern.errors import UnsupportedError
from qkern.ops import dequantize_groupwise, pack_bits, quantize_groupwise, unpack_bits
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from qkern.checkpoints import Format

__all__ = ["Form", "find_form", "nearest_schemes", "regrouped", "round_again", "widened"]

# Group sizes that some format writes, largest first.
_SIZES: Final = (1024, 512, 256, 128, 64, 32, 16)
_WIDER: Final = {2: (3, 4, 8), 3: (4, 8), 4: (8,), 8: ()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Other codes and groups for the same weights.

    Parameters
    ----------
    bits : int or None
        Bits of the codes, not fewer; None: as they are.
    group_size : int or None
        Columns of the groups, in order, which repeat scales and zero points; None: as they are.
    is_unmarked : bool
        Nothing says that activations are int8.
    """

    bits: int | None = None
    group_size: int | None = None
    is_unmarked: bool = False

    def of(self, qw: QuantizedWeight) -> QuantizedWeight | None:
        """Return a weight in this form; None if a group would have columns of several."""
        if self.is_unmarked:
            qw = replace(qw, scheme=qw.scheme.weight_only(), input_scale=None)
        if self.bits is not None and self.bits != qw.scheme.bits:
            qw = widened(qw, self.bits)
        return qw if self.group_size is None else regrouped(qw, self.group_size)


def _columns(qw: QuantizedWeight) -> Tensor:
    """Group of each column, int64 ``[K]``."""
    if qw.group_index is not None:
        return qw.group_index.long()
    return torch.arange(qw.K, device=qw.device) // qw.scheme.group_length(qw.K)


def regrouped(qw: QuantizedWeight, group_size: int) -> QuantizedWeight | None:
    """Return the same weights in other groups, in order, which repeat scales and zero points.

    Parameters
    ----------
    qw : QuantizedWeight
        One matrix.
    group_size : int
        Columns of a new group.

    Returns
    -------
    QuantizedWeight or None
        None if a new group would have columns of several old ones.
    """
    columns = _columns(qw)
    starts = torch.arange(0, qw.K, group_size, device=qw.device)
    first = columns[starts]
    if not torch.equal(first.repeat_interleave(group_size)[: qw.K], columns):
        return None

    def repeated(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:, first].contiguous()

    return replace(
        qw,
        scheme=replace(qw.scheme, group_size=group_size),
        scales=qw.scales[:, first].contiguous(),
        zeros=repeated(qw.zeros),
        offsets=repeated(qw.offsets),
        group_index=None,
    )


def widened(qw: QuantizedWeight, bits: int) -> QuantizedWeight:
    """Return the same weights in wider codes; zero points stay what they are, or move with the midpoint."""
    codes = unpack_bits(qw.codes, qw.scheme.bits, (qw.N, qw.K))
    scheme = replace(qw.scheme, bits=bits)
    if not qw.scheme.zero_point:
        codes = codes + (scheme.midpoint - qw.scheme.midpoint)
    return replace(qw, scheme=scheme, codes=pack_bits(codes, bits))


def _refusal(fmt: Format, name: str, qw: QuantizedWeight) -> str | None:
    """Why the format cannot hold the weight; what it makes of it is thrown away."""
    try:
        fmt.encode(name, qw)
    except UnsupportedError as error:
        return str(error)
    return None


def find_form(
    fmt: Format, name: str, qw: QuantizedWeight, *, group_size: int | None = None, is_unmarked: bool = False
) -> Form | str:
    """Find the form nearest to a weight's own in which a format holds exactly these weights.

    Parameters
    ----------
    fmt : Format
        The target.
    name : str
        Layer, for messages.
    qw : QuantizedWeight
        The weight.
    group_size : int, optional
        Only groups of this size, which all layers of a format with one size for all share.
    is_unmarked : bool
        Leave out that activations are int8.

    Returns
    -------
    Form or str
        Why the format does not hold `qw` as it is, if no form is found.
    """
    if qw.scheme.codebook is not None:  # no other codes mean the same
        return _refusal(fmt, name, qw) or Form()
    sizes = _SIZES if group_size is None else (group_size,)
    own = qw.scheme.group_size
    reason = f"{name}: groups of {own or qw.K} cannot be cut into groups of {group_size}"
    if group_size in (None, own):
        reason = _refusal(fmt, name, Form(is_unmarked=is_unmarked).of(qw) or qw) or ""
    cuts = [*((None,) if group_size in (None, own) else ()), *(size for size in sizes if size <= qw.K)]
    for bits, size in itertools.product((None, *_WIDER[qw.scheme.bits]), cuts):
        form = Form(bits=bits, group_size=size, is_unmarked=is_unmarked)
        weight = form.of(qw)
        if weight is not None and _refusal(fmt, name, weight) is None:
            return form
    return reason


def nearest_schemes(scheme: Scheme) -> Iterator[Scheme]:
    """Yield schemes from the nearest on: smaller groups, without zero points, larger groups, other bits."""
    sizes = [scheme.group_size, *(size for size in _SIZES if size < (scheme.group_size or 1 << 30)), *_SIZES]
    narrower = (bits for bits in (4, 3, 2) if bits < scheme.bits)
    for bits in (scheme.bits, *_WIDER[scheme.bits], *narrower):
        for zero_point in dict.fromkeys((scheme.zero_point, False)):
            for size in dict.fromkeys(sizes):
                yield Scheme(bits=bits, group_size=size, zero_point=zero_point)


def round_again(
    fmt: Format,
    name: str,
    weight: Tensor,
    schemes: Iterable[Scheme],
    *,
    group_size: int | None = None,
) -> tuple[QuantizedWeight, float]:
    """Round a weight to the first of some grids that a format holds.

    Parameters
    ----------
    fmt : Format
        The target.
    name : str
        Layer, for messages.
    weight : Tensor
        ``[N, K]``.
    schemes : iterable of Scheme
        The grids, in the order of preference.
    group_size : int, optional
        Only grids with groups of this size.

    Returns
    -------
    weight : QuantizedWeight
        What the format holds.
    error : float
        ``|W' - W| / |W|``.

    Raises
    ------
    UnsupportedError
        If it holds none of them.
    """
    N, K = weight.shape
    reasons = []
    for scheme in schemes:
        if group_size not in (None, scheme.group_size):
            continue
        reason = fmt.holds(scheme, N, K)
        if reason is None:
            made = quantize_groupwise(weight, scheme)
            reason = _refusal(fmt, name, made)
            if reason is None:
                difference = dequantize_groupwise(made) - weight
                return made, float(difference.norm() / weight.norm().clamp(min=1e-30))
        reasons.append(reason.removeprefix(f"{name}: "))
    why = reasons[0] if reasons else f"no scheme that was asked for has groups of {group_size}"
    raise UnsupportedError(f"{name} cannot be rounded to what {fmt.name} holds: {why}")
