"""What every module with a quantized weight shares: the form-2 buffers and how they survive torch.

nn.Module casts floating-point buffers on ``.half()``, casts what it loads to what it holds, and copies
buffers one by one. A quantized weight is one value in several tensors, and none of that may touch it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from qkern.errors import InputError, UnsupportedError
from qkern.ops import dequantize_groupwise
from qkern.ops.dequant_matmul.plain import nested_from_bytes, nested_size, nested_to_bytes
from qkern.schemes import FLOAT_DTYPES, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["FORM", "INPUT_SCALE", "QuantModule", "form_of", "moved", "weight_of"]

INPUT_SCALE: Final = "input_scale"
"""The one form-2 buffer that is no part of a packed weight."""
FORM: Final = ("codes", "scales", "zeros", "offsets", "group_index", "nested", INPUT_SCALE)
"""Names of the form-2 buffers, as in a state_dict; `nested` has quantized scales as bytes."""

# Integers of the same width stand in for floats while nn.Module moves a buffer: it casts floats only.
_STAND_IN: Final = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def form_of(weight: QuantizedWeight) -> dict[str, Tensor | None]:
    """Tensors of a weight by the names of `FORM`."""
    nested = None if weight.nested is None else nested_to_bytes(weight.nested)
    return {**{name: getattr(weight, name) for name in FORM}, "nested": nested}


def weight_of(form: Mapping[str, Tensor | None], shape: tuple[int, ...], scheme: Scheme) -> QuantizedWeight:
    """Undo `form_of`; a weight without values, on the meta device, has no nested scales."""
    raw = form["nested"]
    nested = None if raw is None or raw.is_meta else nested_from_bytes(raw)
    parts: dict[str, Any] = {**form, "nested": nested}
    return QuantizedWeight(shape=shape, scheme=scheme, **parts)


class QuantModule(nn.Module):
    """Base of the modules with a quantized weight; in its *loading* state the weight is the form-2 buffers.

    Parameters
    ----------
    scheme : Scheme
        Scheme of the weight.
    out_features, in_features : int
        N and K of the weight.
    """

    codes: Tensor | None
    scales: Tensor | None
    zeros: Tensor | None
    offsets: Tensor | None
    group_index: Tensor | None
    nested: Tensor | None
    input_scale: Tensor | None

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features = out_features
        self.in_features = in_features
        for name in FORM:
            self.register_buffer(name, None)

    # The two hooks by which a subclass with a second form of the weight takes part.

    def _restore(self) -> None:
        """Make the form-2 buffers hold the weight."""

    def _forget(self) -> None:
        """Drop everything that was derived from the form-2 buffers: they may change now."""

    def quantized(self) -> QuantizedWeight:
        """Return the weight in its neutral form; in the loading state it shares the module's buffers."""
        if self.codes is None or self.scales is None:
            raise InputError(f"{type(self).__name__} has no weight yet: make it with from_quantized")
        form = {name: self._buffers[name] for name in FORM}
        return weight_of(form, (self.out_features, self.in_features), self.scheme)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode the weight: a new dense matrix ``[N, K]``, to which nothing that is written comes back.

        Parameters
        ----------
        dtype : torch.dtype
            fp32, fp16 or bf16.

        Raises
        ------
        InputError
            On another dtype, or if there is no weight yet.
        """
        weight = self.quantized()
        if weight.codes.is_meta:
            raise InputError(
                "the weight is on the meta device and has no values: load a state_dict with assign=True first"
            )
        return dequantize_groupwise(weight, dtype)

    def __getattr__(self, name: str) -> Any:
        # No property that decodes: it has no dtype of its own to take, each look (hasattr too) would cost a
        # whole matrix, and what initializers and weight tying write into it would be lost in silence.
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no attribute 'weight': its weight is quantized; "
                "dequantize(dtype) gives a dense copy, quantized() the codes and scales. Where other code "
                "must read it, leave that layer dense (skip= of replace_linears and quantize)"
            )
        return super().__getattr__(name)

    def _adopt(self, weight: QuantizedWeight) -> None:
        """Take the tensors of `weight`, without a copy, as the form-2 buffers."""
        if len(weight.shape) != 2:
            raise UnsupportedError(
                f"a module holds one matrix [N, K]: got a weight of shape {weight.shape}; "
                "make a module of each expert"
            )
        for name, tensor in form_of(weight).items():
            setattr(self, name, tensor)
        self._forget()

    def _adopt_empty(
        self,
        *,
        scale_dtype: torch.dtype,
        offsets: bool,
        group_index: bool,
        input_scale: bool = False,
        device: torch.device | str | None,
    ) -> None:
        N, K = self.out_features, self.in_features
        shape = self.scheme.scale_shape(N, K)
        self.codes = torch.empty(N, self.scheme.code_words(K), dtype=torch.int32, device=device)
        self.scales = torch.empty(shape, dtype=scale_dtype, device=device)
        if self.scheme.zero_point and not offsets:
            self.zeros = torch.empty(shape, dtype=torch.uint8, device=device)
        if offsets:
            self.offsets = torch.empty(shape, dtype=scale_dtype, device=device)
        if group_index:
            self.group_index = torch.empty(K, dtype=torch.int32, device=device)
        if self.scheme.double_quant:
            self.nested = torch.empty(nested_size(self.scales.numel()), dtype=torch.uint8, device=device)
        if input_scale:
            self.input_scale = torch.empty(1, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        self._restore()
        held = {name: self._buffers[name] for name in FORM}
        for name in FORM:
            self._buffers[name] = None  # hidden from nn.Module
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(held)
        for name, tensor in held.items():
            if tensor is not None:
                self._buffers[name] = moved(tensor, fn)
        self._forget()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Also when nothing of the weight arrives: strict loading then names what is missing.
        self._restore()
        held = {name: tensor for name in FORM if (tensor := self._buffers[name]) is not None}
        arriving = {name: state_dict[prefix + name] for name in FORM if prefix + name in state_dict}
        if held and all(isinstance(tensor, Tensor) for tensor in arriving.values()):
            self._refuse_other_scheme(prefix, held, arriving)
            for name, tensor in arriving.items():
                # nn.Module copies into a buffer: it gets the scales' dtype, and with act-order their number.
                buffer = held.get(name, tensor)
                if (buffer.dtype, buffer.shape) != (tensor.dtype, tensor.shape) and not tensor.is_meta:
                    self._buffers[name] = torch.empty_like(tensor, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget()

    def _refuse_other_scheme(self, prefix: str, held: dict[str, Tensor], arriving: dict[str, Tensor]) -> None:
        """Raise one error where nn.Module has one for each tensor; parts of a weight may arrive alone."""
        whole = "codes" not in arriving or arriving.keys() == held.keys()
        if whole and all(self._fits(name, held[name], arriving[name]) for name in held.keys() & arriving):
            return
        raise InputError(
            f"{prefix.removesuffix('.') or 'the state_dict'}: the weight that arrives is not one of this "
            f"{type(self).__name__}, {self.scheme} [{self.out_features}, {self.in_features}]: got "
            f"{_described(arriving)}; allowed is {_described(held)}, the scales in fp16, bf16 or fp32; "
            "make the module with the scheme that was saved, or read a checkpoint with qkern.load"
        )

    def _fits(self, name: str, held: Tensor, arriving: Tensor) -> bool:
        shape = arriving.shape
        if name in ("scales", "zeros", "offsets") and self.group_index is not None:
            shape = shape[:-1] + held.shape[-1:]  # files may number more groups than K / group_size
        if name == "nested":  # blocks may have another size than those made here
            return arriving.dtype == held.dtype and arriving.dim() == 1
        dtypes = FLOAT_DTYPES if name in ("scales", "offsets") else (held.dtype,)
        return shape == held.shape and arriving.dtype in dtypes

    def extra_repr(self) -> str:
        """Shape and scheme, for ``repr``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


def _described(form: dict[str, Tensor]) -> str:
    return ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in form.items()
    )


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a module conversion to a tensor without letting it change the dtype."""
    stand_in = _STAND_IN.get(tensor.dtype)
    plain = tensor if stand_in is None else tensor.view(stand_in)
    there = fn(plain)
    if there.dtype != plain.dtype:  # Module.type() casts integers too
        there = plain.to(there.device)
    return there if stand_in is None else there.view(tensor.dtype)
