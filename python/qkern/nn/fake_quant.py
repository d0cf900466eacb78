"""`FakeQuantLinear`: a linear layer that is trained on the grid on which it will be stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkern.errors import InputError, UnsupportedError
from qkern.nn.linear import QuantLinear, is_conv1d, weight_and_bias
from qkern.nn.state import moved
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode, quantize_groupwise
from qkern.ops.codebooks import codebook
from qkern.ops.dequant_matmul.checks import check_input
from qkern.ops.dequant_matmul.reference import fake_quantize
from qkern.ops.gguf_types import GGUFType
from qkern.ops.quantize_groupwise.reference import split_groups
from qkern.schemes import QuantizedWeight, Scheme, as_scheme

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FakeQuantLinear"]


class FakeQuantLinear(nn.Linear):
    """A linear layer that computes with its weight as it will be stored: ``y = x @ rounded(W).T + bias``.

    Every forward, in training and in evaluation, makes codes and scales anew from the master weight, by the
    ops that quantize; `convert` gives the layer that computes the same from them. Schemes with ``a8`` round
    the activations too, as compute ``"int8"`` does, and multiply in fp32.

    The gradient goes straight through the rounding. Where scales follow the weight, so do the ends of the
    grid: a weight beyond them moves them, and gets the whole gradient of its rounded value. Learned scales
    stay when a weight moves: beyond the ends it gets none. They get that of LSQ (Esser et al., 2020), times
    ``1 / sqrt(weights of a scale * highest level)``.

    Make one with `from_linear` or `from_quantized`.

    Parameters
    ----------
    weight : Tensor
        ``[N, K]``; copied in fp32.
    bias : Tensor or None
        ``[N]``; copied in fp32.
    scheme : Scheme or GGUFType
        How the weight will be stored.
    learn_scales : bool
        Train the scales; zero points then stay. Else scales and zero points follow the weight.
    search : str
        ``"mse"`` or ``"minmax"``: how scales are found, those that are learned before the first step. The
        encoder of GGUF has one search, mse.
    scale_dtype : torch.dtype
        Dtype in which scales are stored, those that are learned too; GGUF types have their own.
    grid : QuantizedWeight, optional
        Whose scales and zero points are where learned ones begin, in the place of a search.

    Attributes
    ----------
    weight, bias : nn.Parameter
        The masters: dtype casts of the module leave them fp32. The output has the dtype of the input.
    scales : nn.Parameter or None
        Learned scales, fp32 of the scheme's shape.
    zeros : Tensor or None
        uint8, the zero points that go with them.

    Raises
    ------
    UnsupportedError
        On double-quantized scales, learned scales of a GGUF type, or a grid with more than scales and zero
        points of groups in order.
    InputError
        If the weight cannot be rounded so.
    """

    scales: nn.Parameter | None
    zeros: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scheme: Scheme | GGUFType,
        *,
        learn_scales: bool = False,
        search: str = "mse",
        scale_dtype: torch.dtype = torch.float16,
        grid: QuantizedWeight | None = None,
    ) -> None:
        _check_grid_of(scheme, learn_scales=learn_scales, search=search)
        if weight.is_meta:
            raise InputError("the weight is on the meta device and has no values: load it first")
        N, K = weight.shape
        super().__init__(K, N, bias is not None, device="meta")
        self.weight = _master(weight)
        if bias is not None:
            self.bias = _master(bias)
        self.scheme = scheme
        self.search = search
        self.scale_dtype = scale_dtype
        self.bias_dtype = None if bias is None else bias.dtype
        self.register_parameter("scales", None)
        self.register_buffer("zeros", None)
        if learn_scales:
            grid = self.quantized() if grid is None else grid
            self.scales = _master(grid.scales)
            self.zeros = None if grid.zeros is None else grid.zeros.clone()
        self._rounded()  # refuses here what no forward could round

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: Scheme | GGUFType | str, **options: Any) -> Self:
        """Make a layer that is trained from the weight of a linear layer on.

        Parameters
        ----------
        linear : nn.Linear or transformers Conv1D
            Its weight and bias are copied; frozen ones stay frozen.
        scheme : Scheme, GGUFType or str
            For example ``"w2g64"``.
        **options
            Further arguments of the class: `learn_scales`, `search`, `scale_dtype`.

        Raises
        ------
        UnsupportedError
            If `linear` is another kind of module, or a Conv1D for a GGUF type; and as the class.
        InputError
            As the class.
        """
        kind = scheme if isinstance(scheme, GGUFType) else as_scheme(scheme)
        _refuse_conv1d(linear, kind)
        made = cls(*weight_and_bias(linear), kind, **options)
        for name, parameter in linear.named_parameters(recurse=False):
            made.get_parameter(name).requires_grad_(parameter.requires_grad)
        made.train(linear.training)
        return made

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> Self:
        """Make a layer that is trained from a quantized weight on, such as GPTQ's, its scales learned.

        Before the first step it has exactly this weight.

        Parameters
        ----------
        weight : QuantizedWeight
            ``[N, K]`` with groups in order, and zero points if any, not offsets.
        bias : Tensor, optional
            ``[N]``; copied.

        Raises
        ------
        UnsupportedError
            If the weight is another one.
        """
        _refuse_other_grids(weight)
        options: dict[str, Any] = {"scale_dtype": weight.scales.dtype, "grid": weight}
        return cls(dequantize_groupwise(weight), bias, weight.scheme, learn_scales=True, **options)

    @classmethod
    def check(cls, linear: nn.Module, scheme: Scheme | GGUFType, **options: Any) -> None:
        """Raise what `from_linear` would, or `from_quantized` of a `QuantLinear`; of values one row is tried.

        Parameters
        ----------
        linear, scheme, **options
            As in `from_linear`; a `QuantLinear` has its own.
        """
        if isinstance(linear, QuantLinear):
            _refuse_other_grids(linear.quantized())
            return
        _refuse_conv1d(linear, scheme)
        cls(weight_and_bias(linear)[0][:1], None, scheme, **options)

    def quantized(self) -> QuantizedWeight:
        """Return the weight as it will be stored.

        Raises
        ------
        UnsupportedError
            Of GGUF types, which have blocks of their own.
        InputError
            If weight or scales have NaN or Inf.
        """
        if isinstance(self.scheme, GGUFType):
            raise UnsupportedError(
                f"a QuantizedWeight has a scheme: got the GGUF type {self.scheme.name}; dequantize() gives "
                "its values, qkern.ops.gguf_encode of the weight its blocks"
            )
        weight = self.weight.detach()
        if self.scales is None:
            return quantize_groupwise(weight, self.scheme, search=self.search, scale_dtype=self.scale_dtype)
        scales = _stored(self.scales.detach(), self.scale_dtype)
        return quantize_groupwise(weight, self.scheme, scales=scales, zeros=self.zeros)

    def dequantize(self) -> Tensor:
        """Return the values of the weight as it will be stored, fp32 ``[N, K]``, with its gradient."""
        values: Tensor = self._rounded()[0]
        return values

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _rounded(self) -> tuple[Tensor, QuantizedWeight | None]:
        if isinstance(self.scheme, GGUFType):
            kind = self.scheme.name
            blocks = gguf_encode(self.weight.detach().cpu(), kind)
            return _straight_through(self.weight, gguf_decode(blocks, kind).to(self.weight.device)), None
        stored = self.quantized()
        values = dequantize_groupwise(stored)
        if self.scales is None:
            return _straight_through(self.weight, values), stored
        learned = _LearnedStep.apply(self.weight, self.scales, values, stored)  # type: ignore[no-untyped-call]
        return learned, stored

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., K]`` by the rounded weight; the result is ``[..., N]`` in x's dtype.

        Raises
        ------
        InputError
            If `x` does not fit, or the weight can no longer be rounded.
        """
        check_input(x, self.in_features, self.weight.device)
        weight, stored = self._rounded()
        if stored is None or stored.scheme.act_bits is None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, weight.to(x.dtype), bias)
        # Autocast would multiply in its dtype what int8 compute multiplies exactly.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(_rounded_activations(x, stored), weight, self.bias).to(x.dtype)

    def convert(self) -> QuantLinear | nn.Linear:
        """Return the layer to store.

        Of a scheme a `QuantLinear` with the same weight, bit for bit. Of a GGUF type the dense layer with the
        fp32 master weight: of it `gguf_encode` makes the blocks that were trained, of the values of these
        it need not.
        """
        if isinstance(self.scheme, GGUFType):
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
            dense.weight, dense.bias = self.weight, self.bias
            return dense.train(self.training)
        made = QuantLinear.from_quantized(self.quantized(), self.bias, self.bias_dtype)
        made.train(self.training)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantLinear:
        super()._apply(lambda tensor: moved(tensor, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Shape, scheme and how scales are found, for ``repr``."""
        if isinstance(self.scheme, GGUFType):
            scheme = self.scheme.name
        else:
            scheme = f"{self.scheme}, scales={self.search if self.scales is None else 'learned'}"
        return f"{super().extra_repr()}, scheme={scheme}"


def _check_grid_of(scheme: Scheme | GGUFType, *, learn_scales: bool, search: str) -> None:
    if isinstance(scheme, GGUFType):
        if learn_scales or search != "mse":
            raise UnsupportedError(
                f"the scales of GGUF types are those that the encoder finds by mse: got {learn_scales=}, "
                f"{search=} for {scheme.name}; leave both out"
            )
    elif scheme.double_quant:
        raise UnsupportedError(
            f"double-quantized scales are not trained on, as no module holds them: got scheme {scheme}; "
            "leave out d"
        )


def _refuse_conv1d(linear: nn.Module, scheme: Scheme | GGUFType) -> None:
    if isinstance(scheme, GGUFType) and is_conv1d(linear):
        raise UnsupportedError(
            f"GGUF export takes no model with Conv1D layers: got one for {scheme.name}; train on a scheme "
            "such as w4g128"
        )


def _refuse_other_grids(weight: QuantizedWeight) -> None:
    parts = ("offsets", "group_index", "nested", "input_scale")
    extra = [name for name in parts if getattr(weight, name) is not None]
    if extra or len(weight.shape) != 2:
        raise UnsupportedError(
            "scales are learned of a matrix with groups in order, of weights alone: got "
            f"{', '.join(extra) or weight.shape}; quantize without, or begin with the 16-bit weight"
        )


def _master(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format))


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to their dtype; a step that shrinks to nothing stays the least there is."""
    stored = scales.to(dtype)
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    return torch.where(stored == 0, torch.full_like(stored, least).copysign(stored), stored)


class _StraightThrough(torch.autograd.Function):
    """Other values in a tensor's place, with its gradient."""

    @staticmethod
    def forward(tensor: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _straight_through(tensor: Tensor, values: Tensor) -> Tensor:
    out: Tensor = _StraightThrough.apply(tensor, values)  # type: ignore[no-untyped-call]
    return out


class _LearnedStep(torch.autograd.Function):
    """The values of a stored weight, with the gradients of LSQ to master weight and scales.

    With ``v = w / s`` and the levels of the grid from `low` to `high` the rounded weight is ``level * s``.
    Its derivative in w is 1 for v in low..high, else 0; in s ``level - v`` there, else ``level``.
    """

    @staticmethod
    def forward(weight: Tensor, scales: Tensor, values: Tensor, stored: QuantizedWeight) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, _, _, stored = inputs
        # Of the values, which are as large as the weight, the codes are enough.
        ctx.save_for_backward(weight, stored.codes, stored.scales, stored.zeros)
        ctx.scheme = stored.scheme

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, codes, scales, zeros = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        K = weight.shape[1]
        shape = tuple(weight.shape)
        values = dequantize_groupwise(
            QuantizedWeight(codes=codes, scales=scales, zeros=zeros, shape=shape, scheme=scheme)
        )
        steps = _spread(scales, scheme, K)
        low, high = _ends(scheme, None if zeros is None else _spread(zeros, scheme, K))
        # An end itself is inside: the weights of a model that was quantized before lie on the levels, as
        # products that dividing by the step does not undo. A negative step has its highest level below.
        ends = low * steps, high * steps
        inside = (weight >= torch.minimum(*ends)) & (weight <= torch.maximum(*ends))
        slope = torch.where(inside, values - weight, values) / steps
        totals = split_groups(grad * slope, scheme).sum(-1).sum_to_size(scales.shape)
        weights = weight.numel() if scheme.per_tensor else scheme.group_length(K)
        highest = 1 if scheme.codebook else scheme.levels - 1 if scheme.zero_point else scheme.midpoint - 1
        return grad * inside, totals * (weights * highest) ** -0.5, None, None


def _spread(values: Tensor, scheme: Scheme, K: int) -> Tensor:
    """fp32 of each column, ``[N, K]``, or ``[1, K]`` per tensor."""
    return values.float().repeat_interleave(scheme.group_length(K), -1)[:, :K]


def _ends(scheme: Scheme, zeros: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """Lowest and highest level, what the codes of the ends stand for before the scale."""
    if scheme.codebook:
        ordered = codebook(scheme.codebook).ordered
        return ordered[0].item(), ordered[-1].item()
    middle = scheme.midpoint if zeros is None else zeros
    return -middle, scheme.levels - 1 - middle


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _rounded_activations(x: Tensor, stored: QuantizedWeight) -> Tensor:
    """Activations as compute ``"int8"`` sees them, fp32, with the gradient straight through."""
    values = fake_quantize(x.detach().reshape(-1, stored.K), stored).view(x.shape)
    return _straight_through(x.float(), values)
