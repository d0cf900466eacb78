"""`OutlierLinear`: LLM.int8(), int8 products but for the few columns of activations that stand out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.nn.linear import QuantLinear
from qkern.ops import unpack_bits
from qkern.ops.dequant_matmul.checks import check_input
from qkern.ops.quantize_groupwise.nested import divisors
from qkern.schemes import as_scheme

if TYPE_CHECKING:
    from torch import nn

    from qkern.schemes import QuantizedWeight, Scheme

__all__ = ["THRESHOLD", "OutlierLinear"]

THRESHOLD: Final = 6.0
"""Magnitude from which an activation is an outlier, that of LLM.int8()."""
# Up to so many columns a product is faster than unpacking the weight.
_MANY: Final = 512


def _refuse_others(scheme: Scheme) -> None:
    if str(scheme) != "w8a8":
        raise InputError(f"OutlierLinear computes in w8a8: got {scheme}; use QuantLinear for others")


class _Columns(NamedTuple):
    """Columns of the weight that activations stood out in.

    Parameters
    ----------
    position : Tensor
        int64 ``[K]``: place of a column in `codes`; -1: not there.
    codes : Tensor
        int8 ``[n, N]``.
    scales : Tensor
        fp32 ``[N]``.
    """

    position: Tensor
    codes: Tensor
    scales: Tensor


class OutlierLinear(QuantLinear):
    """A linear layer in w8a8 whose outlier activations are not quantized: LLM.int8().

    A column of x in which a magnitude reaches `threshold` (compared in fp16, as bitsandbytes does) is
    multiplied by its column of the weight in x's dtype; all others go through int8 with a scale a token.
    Columns of the weight that were needed once are kept in int8, N bytes each, beside the packed weight; the
    first of them are read from a copy of the whole weight, which then goes. With ``compute="float"`` nothing
    is quantized, and there are no outliers.

    torch.compile leaves the graph here: which columns stand out is known only when it runs.

    Parameters
    ----------
    scheme : Scheme
        ``w8a8``.
    out_features, in_features : int
        N and K.

    Attributes
    ----------
    threshold : float
        Above 0; 6.0 unless `from_linear` or `from_quantized` was told another.

    Raises
    ------
    InputError
        On another scheme.
    """

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        _refuse_others(scheme)
        super().__init__(scheme, out_features, in_features)
        self._threshold = THRESHOLD
        self._columns: _Columns | None = None

    @property
    def threshold(self) -> float:
        """Magnitude from which an activation is an outlier."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        if not 0 < value < float("inf"):
            raise InputError(
                f"threshold must be above 0 and finite: got {value}; a QuantLinear in w8a8 has no outliers"
            )
        self._threshold = float(value)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        scheme: Scheme | str = "w8a8",
        *,
        threshold: float = THRESHOLD,
        **quantize: Any,
    ) -> Self:
        """Quantize a linear layer by rounding, as `QuantLinear.from_linear`, to the codes of bitsandbytes.

        Parameters
        ----------
        linear : nn.Linear or transformers Conv1D
            Its weight is read, its bias is copied.
        scheme : Scheme or str
            ``w8a8``.
        threshold : float
            See the class.
        **quantize
            Further arguments of `qkern.ops.quantize_groupwise`; `search` is ``"absmax"`` by default.
        """
        _refuse_others(as_scheme(scheme))
        made = super().from_linear(linear, scheme, **{"search": "absmax", **quantize})
        made.threshold = threshold
        return made

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        *,
        threshold: float = THRESHOLD,
    ) -> Self:
        """Wrap a weight that was quantized already, as `QuantLinear.from_quantized`.

        Raises
        ------
        InputError
            If it is not w8a8, has a static scale of the activations, or the bias does not fit.
        """
        if weight.input_scale is not None:
            raise InputError("OutlierLinear scales each token: got a static input_scale; use QuantLinear")
        made = super().from_quantized(weight, bias, dtype)
        made.threshold = threshold
        return made

    def with_weight(self, weight: QuantizedWeight, bias: Tensor | None = None) -> Self:
        """As `QuantLinear.with_weight`; the threshold is a setting too."""
        made = super().with_weight(weight, bias)
        made.threshold = self.threshold
        return made

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., K]`` by the weight; the result is ``[..., N]`` in x's dtype.

        Raises
        ------
        InputError
            If the dtype, the last dimension or the device of `x` is not what the weight takes.
        """
        check_input(x, self.in_features)
        if self._compute == "float" or x.is_meta or self._has_no_values():
            return super().forward(x)
        outliers = self.outliers(x)
        if outliers.numel() == 0:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)  # an outlier is there, so neither is 0
        out = super().forward(rows.index_fill(1, outliers, 0))
        out = torch.addmm(out, rows.index_select(1, outliers), self._column_weight(outliers, x.dtype))
        return out.view(*x.shape[:-1], self.out_features)

    def outliers(self, x: Tensor) -> Tensor:
        """Columns of x ``[..., K]`` that stand out, int64 ``[n]``, ascending."""
        rows = x.detach().reshape(x.shape[:-1].numel(), self.in_features)
        return (rows.to(torch.float16).abs() >= self._threshold).any(0).nonzero().squeeze(1)

    def _column_weight(self, columns: Tensor, dtype: torch.dtype) -> Tensor:
        """Those columns of the weight, transposed: ``[n, N]``."""
        kept = self._columns
        if kept is None or bool((kept.position[columns] < 0).any()):
            kept = self._columns = self._with(columns)
        return (kept.codes[kept.position[columns]] * kept.scales).to(dtype)

    @torch.no_grad()
    def _with(self, columns: Tensor) -> _Columns:
        """Columns that are kept, and these."""
        kept = self._columns or self._none_kept(columns.device)
        new = columns[kept.position[columns] < 0]
        read = self._unpacked if self._columns is None or len(new) > _MANY else self._multiplied
        position = kept.position.index_copy(
            0, new, torch.arange(len(new), device=new.device) + len(kept.codes)
        )
        return _Columns(position, torch.cat([kept.codes, read(new, kept.scales)]), kept.scales)

    def _none_kept(self, device: torch.device) -> _Columns:
        return _Columns(
            torch.full((self.in_features,), -1, device=device),
            torch.empty(0, self.out_features, dtype=torch.int8, device=device),
            self.quantized().scales.float().squeeze(1),
        )

    def _unpacked(self, columns: Tensor, scales: Tensor) -> Tensor:
        """Codes of columns ``[n, N]`` out of the whole weight."""
        shape = self.out_features, self.in_features
        codes = unpack_bits(self.quantized().codes, 8, shape, layout="dense").index_select(1, columns)
        return (codes ^ self.scheme.midpoint).view(torch.int8).t().contiguous()

    def _multiplied(self, columns: Tensor, scales: Tensor) -> Tensor:
        """Codes of columns ``[n, N]`` by the product with rows that are 1 there: the weight stays packed."""
        rows = torch.zeros(len(columns), self.in_features, device=columns.device)
        rows[torch.arange(len(columns), device=columns.device), columns] = 1
        # Integers up to 128, which no rounding of the product moves by a half.
        return (self._dispatch(rows, None) / divisors(scales)).round().to(torch.int8)

    def _forget(self) -> None:
        super()._forget()
        self._columns = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_columns": None}

    def extra_repr(self) -> str:
        """Shape, scheme, threshold and state, for ``repr``."""
        return f"{super().extra_repr()}, threshold={self._threshold}"
