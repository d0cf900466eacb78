"""`QuantLinear`: a drop-in linear layer whose weight is quantized."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from qkern.errors import InputError, UnsupportedError
from qkern.nn.state import FORM, INPUT_SCALE, QuantModule, form_of
from qkern.ops import pack_weight, quantize_groupwise, unpack_weight
from qkern.ops.dequant_matmul import LinearHandle, cuda, resolve_compute
from qkern.ops.dequant_matmul.checks import check_input
from qkern.ops.dequant_matmul.cpu import LAYOUT as CPU_LAYOUT
from qkern.ops.int8_matmul.cpu import StaticHandle
from qkern.schemes import PackedWeight, QuantizedWeight, Scheme, as_scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "COMPUTE",
    "QuantLinear",
    "is_conv1d",
    "is_plain_call",
    "needs_grad",
    "transformed",
    "weight_and_bias",
]

COMPUTE: Final = ("auto", "float", "int8")

Handle: TypeAlias = LinearHandle | StaticHandle | cuda.LinearHandle

# Looked up once: each is asked in every call, and the way to it costs as much as the answer.
_dispatch_modes: Final = torch._C._len_torch_dispatch_stack
_function_modes: Final = torch._C._len_torch_function_stack
_transform: Final = torch._C._functorch.peek_interpreter_stack
_trace: Final = torch._C._get_tracing_state
_profiled: Final = torch._C._autograd._profiler_enabled

# Two threads may meet at the first forward of the same module; one may read the weight while another packs.
_PACKING: Final = threading.RLock()


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' ``Conv1D``: a linear layer that stores its weight as ``[K, N]``."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


class QuantLinear(QuantModule):
    """A linear layer with a quantized weight, ``y = x @ dequant(W).T + bias``.

    It is *loading* (buffers ``codes, scales, zeros, offsets, group_index, nested, input_scale``; what
    ``state_dict`` shows and ``load_state_dict`` reads; meta device allowed) or *packed* (one blob in the
    layout of the kernels, and the input scale). The first forward packs it, and then the other form-2 buffers
    are gone; moving it to another device, loading into it, pickling and copying bring them back. Dtype casts
    never touch the weight. The output has the dtype of the input, and the bias is used in it too.

    Make one with `from_linear`, `from_quantized` or `empty`.

    Parameters
    ----------
    scheme : Scheme
        Scheme of the weight.
    out_features, in_features : int
        N and K.

    Attributes
    ----------
    compute : str
        ``"auto"`` (int8 activations for inference on a CPU, else float), ``"float"`` or ``"int8"``. A model
        that was put into training by ``train()`` is not at inference, even where no gradient is taken:
        checkpointing runs a layer without them first, and must get the same again.
    bias : nn.Parameter or None
        ``[N]``, not trained.
    layout : str or None
        Layout of the packed blob; None in the loading state.
    """

    blob: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, scheme: Scheme, out_features: int, in_features: int) -> None:
        super().__init__(scheme, out_features, in_features)
        self._named_compute = self._compute = "auto"
        self._trains = False
        self.layout: str | None = None
        self.register_buffer("blob", None, persistent=False)
        # First: torch.export of a bare module miscounts a buffer that comes after some that are None.
        self._buffers = {"blob": self._buffers.pop("blob"), **self._buffers}
        self.register_parameter("bias", None)
        self._spelling = str(scheme)
        self._stored_bits = 0
        self._handle: Handle | None = None

    # Making one ------------------------------------------------------------------------------------------

    @classmethod
    def from_linear(cls, linear: nn.Module, scheme: Scheme | str, **quantize: Any) -> Self:
        """Quantize a linear layer by rounding to the nearest code.

        Parameters
        ----------
        linear : nn.Linear or transformers Conv1D
            Its weight is read, its bias is copied. On the meta device the result is empty.
        scheme : Scheme or str
            For example ``"w4g128"``.
        **quantize
            Further arguments of `qkern.ops.quantize_groupwise`, such as ``search="mse"``.

        Raises
        ------
        UnsupportedError
            If `linear` is another kind of module.
        InputError
            If the weight has NaN or Inf.
        """
        scheme = as_scheme(scheme)
        weight, bias = weight_and_bias(linear)
        if weight.device.type == "meta":
            N, K = weight.shape
            made = cls.empty(
                N,
                K,
                scheme,
                bias=bias is not None,
                scale_dtype=quantize.get("scale_dtype") or torch.float16,
                bias_dtype=weight.dtype,
                device="meta",
            )
        else:
            made = cls.from_quantized(quantize_groupwise(weight, scheme, **quantize), bias)
        made.training = linear.training
        return made

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Wrap a weight that was quantized already; its tensors are shared until the first forward.

        Parameters
        ----------
        weight : QuantizedWeight
            One matrix ``[N, K]``.
        bias : Tensor, optional
            ``[N]``; copied.
        dtype : torch.dtype, optional
            Dtype in which the bias is kept; default: its own.

        Raises
        ------
        InputError
            If the bias does not fit.
        UnsupportedError
            On a stack of experts.
        """
        made = cls(weight.scheme, *weight.shape[-2:])
        made._adopt(weight)
        if bias is not None:
            if tuple(bias.shape) != (weight.N,):
                raise InputError(f"bias must be [{weight.N}]: got {tuple(bias.shape)}")
            kept = bias.detach().to(weight.device, dtype or bias.dtype, copy=True)
            made.bias = nn.Parameter(kept, requires_grad=False)
        return made

    def with_weight(self, weight: QuantizedWeight, bias: Tensor | None = None) -> Self:
        """Return a layer of the same kind, with the same settings, that has another weight.

        Parameters
        ----------
        weight : QuantizedWeight
            One matrix ``[N, K]``.
        bias : Tensor, optional
            ``[N]``; copied, in the dtype of this layer's.

        Raises
        ------
        InputError
            As `from_quantized`.
        """
        made = self.from_quantized(weight, bias, None if self.bias is None else self.bias.dtype)
        made.training, made._trains = self.training, self._trains
        made.compute = self.compute
        return made

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        scheme: Scheme | str,
        *,
        bias: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        bias_dtype: torch.dtype | None = None,
        offsets: bool = False,
        group_index: bool = False,
        input_scale: bool = False,
        device: torch.device | str | None = None,
    ) -> Self:
        """Make a layer in the loading state with unset contents, to be filled by ``load_state_dict``.

        Parameters
        ----------
        out_features, in_features : int
            N and K.
        scheme : Scheme or str
            Its ``z`` says that there are zero points.
        bias : bool
            Whether there is a bias.
        scale_dtype : torch.dtype
            Dtype of the scales; loading scales of another dtype replaces it.
        bias_dtype : torch.dtype, optional
            Default: torch's default dtype.
        offsets : bool
            Zero points are stored as float offsets instead.
        group_index : bool
            Columns name their groups (act-order).
        input_scale : bool
            The activations have one static scale.
        device : torch.device or str, optional
            ``"meta"`` allocates nothing.
        """
        made = cls(as_scheme(scheme), out_features, in_features)
        made._adopt_empty(
            scale_dtype=scale_dtype,
            offsets=offsets,
            group_index=group_index,
            input_scale=input_scale,
            device=device,
        )
        if bias:
            made.bias = nn.Parameter(
                torch.empty(out_features, dtype=bias_dtype, device=device), requires_grad=False
            )
        return made

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return a dense layer with the decoded weight and a copy of the bias, both frozen.

        Parameters
        ----------
        dtype : torch.dtype
            fp32, fp16 or bf16.

        Raises
        ------
        InputError
            On another dtype, or if there is no weight yet.
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(dtype, copy=True)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        linear.training = self.training
        return linear

    # The two states --------------------------------------------------------------------------------------

    def pack(self) -> Self:
        """Bring the weight into the layout of the kernels; the first forward does it by itself.

        Raises
        ------
        InputError
            If the weight is on the meta device.
        """
        with _PACKING:
            if self.layout is None:
                self._pack()
        return self

    def _pack(self) -> None:
        weight = self.quantized()
        if weight.codes.is_meta:
            raise InputError(
                "the weight is on the meta device and has no values: load a state_dict with assign=True first"
            )
        if type(weight.codes) is not Tensor:
            raise InputError(
                f"a weight in a {type(weight.codes).__name__} cannot be packed: call pack() on the module "
                "before tracing or exporting it"
            )
        with _outside_of_modes():
            packed = pack_weight(weight)
        self._stored_bits = weight.stored_bits
        self._buffers["blob"] = packed.blob
        self._handle = _handle_of(packed)
        # Last: another thread that reads a layout must find the blob.
        self.layout = packed.layout
        for name in FORM:
            if name != INPUT_SCALE:
                self._buffers[name] = None

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _packed_by_now(self) -> bool:
        # torch.compile runs this for real while it traces, then guards on the state that it left.
        self.pack()
        return True

    def unpack(self) -> Self:
        """Return to the loading state; the weight is the same bit for bit."""
        with _PACKING:
            if self.layout is not None:
                self._adopt(self.quantized())
        return self

    def quantized(self) -> QuantizedWeight:
        """Return the weight in its neutral form, in either state."""
        with _PACKING:
            if self.layout is None:
                return super().quantized()
            packed = self._packed()
        with _outside_of_modes():
            return unpack_weight(packed)

    def _packed(self) -> PackedWeight:
        assert self.blob is not None
        assert self.layout is not None
        return PackedWeight(
            blob=self.blob,
            layout=self.layout,
            N=self.out_features,
            K=self.in_features,
            scheme=self.scheme,
            input_scale=self.input_scale,
        )

    def _restore(self) -> None:
        self.unpack()

    def _forget(self) -> None:
        self.layout = None
        self._handle = None
        self._buffers["blob"] = None

    @property
    def stored_bits(self) -> int:
        """Bits that the weight needs in a file; see `QuantizedWeight.stored_bits`."""
        return self.quantized().stored_bits if self.layout is None else self._stored_bits

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        blob = self.blob
        if self.layout is None or blob is None or _moves(fn, blob):
            super()._apply(fn, recurse)
            return self
        hidden = {name: self._buffers[name] for name in ("blob", INPUT_SCALE)}
        self._buffers.update(dict.fromkeys(hidden))  # from nn.Module, which might cast them
        try:
            nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(hidden)
        self._handle = _handle_of(self._packed())
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout is not None:
            for name, tensor in form_of(self.quantized()).items():
                if tensor is not None:
                    destination[prefix + name] = tensor

    def __getstate__(self) -> dict[str, Any]:
        with _PACKING:
            state = self.__dict__ | {"_buffers": self._buffers.copy()}
        if state["layout"] is not None:
            state |= {
                "_buffers": {**state["_buffers"], **form_of(self.quantized()), "blob": None},
                "layout": None,
                "_handle": None,
            }
        return state

    @property
    def compute(self) -> str:
        """Arithmetic of `forward`: ``"auto"``, ``"float"`` or ``"int8"``."""
        return self._named_compute

    @compute.setter
    def compute(self, value: str) -> None:
        if value not in COMPUTE:
            raise InputError(f"unknown compute: got {value!r}, allowed are {', '.join(COMPUTE)}")
        self._named_compute = value
        self._settle_compute()

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's; until ``eval()`` what is ``"auto"`` is not inference."""
        # `training` alone does not tell: modules are made with it set, and many never leave that state.
        self._trains = mode
        self._settle_compute()
        return super().train(mode)

    def _settle_compute(self) -> None:
        """Set what a call looks at."""
        floats = self._trains and self._named_compute == "auto" and self.scheme.act_bits is None
        self._compute = "float" if floats else self._named_compute

    # Running ---------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., K]`` by the weight; the result is ``[..., N]`` in x's dtype.

        Raises
        ------
        InputError
            If the dtype, the last dimension or the device of `x` is not what the weight takes.
        """
        if type(x) is not Tensor:
            check_input(x, self.in_features)  # a list, say, has none of what is looked at below
        tracing = torch.compiler.is_compiling()
        if tracing:
            # Before anything is looked at: a tracer goes on with what it saw first.
            self._packed_by_now()
        elif self.layout is None:
            if self._has_no_values():
                return self._shape_only(x)
            self.pack()
        # Straight from the dictionary: nn.Module's attribute look-up costs half a microsecond.
        bias: Tensor | None = self._parameters["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = self._bias_for(x)
        # The handle skips the dispatcher, which costs more than a small product.
        handle = self._handle
        if not tracing and handle is not None and is_plain_call(x, bias, handle.device):
            return handle(x, bias, handle.auto if self._compute == "auto" else self._compute)
        return self._dispatch(x, bias)

    def _bias_for(self, x: Tensor) -> Tensor | None:
        """Return the bias in a dtype that goes with x."""
        bias = self._parameters["bias"]
        if bias is not None and bias.dtype not in (x.dtype, torch.float32):
            return bias.to(x.dtype)
        return bias

    def _dispatch(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Call the torch op: what autograd, compilers, modes and profilers see."""
        blob = self.blob
        assert blob is not None
        check_input(x, self.in_features, None if x.is_meta else blob.device)
        if forward_ad._current_level >= 0 and _has_tangent(x):
            raise UnsupportedError(
                "QuantLinear has no forward-mode derivative: use reverse mode (backward, torch.func.vjp)"
            )
        compute = resolve_compute(self._compute, x, self.scheme, needs_grad=needs_grad(x, bias))
        out: Tensor = torch.ops.qkern.dequant_matmul(
            x,
            blob,
            bias,
            self.layout,
            self.out_features,
            self.in_features,
            self._spelling,
            compute,
            self.input_scale,
        )
        return out

    def _has_no_values(self) -> bool:
        """Whether the weight is a shape only: on the meta device, or a fake tensor."""
        codes = self.codes  # once: another thread may just be packing it
        return codes is not None and (codes.is_meta or type(codes) is not Tensor)

    def _shape_only(self, x: Tensor) -> Tensor:
        check_input(x, self.in_features)
        if not x.is_meta and type(x) is Tensor:
            raise InputError(
                "the weight is on the meta device and has no values: load a state_dict with assign=True first"
            )
        return x.new_empty(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape, scheme and state, for ``repr``."""
        if self.layout is not None:
            state = f"packed as {self.layout}"
        elif self.codes is None or self.codes.is_meta:
            state = "no values yet"
        else:
            state = "packs at the first forward"
        return f"{super().extra_repr()}, bias={self.bias is not None}, compute={self.compute}, {state}"


def weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``[N, K]`` and bias ``[N]`` of a linear layer."""
    if isinstance(linear, nn.Linear):
        return linear.weight.detach(), linear.bias
    if is_conv1d(linear):
        weight: Tensor = linear.weight  # type: ignore[assignment]
        return weight.detach().t(), linear.bias  # type: ignore[return-value]
    raise UnsupportedError(
        f"from_linear takes an nn.Linear or a transformers Conv1D: got {type(linear).__name__}; "
        "quantize its weight with qkern.ops.quantize_groupwise and use from_quantized"
    )


@contextmanager
def _outside_of_modes() -> Iterator[None]:
    """Real tensors, made as if no mode of torch were active.

    Inference tensors could not take part in autograd later, fake ones have no address, and a default
    device would move what the native kernels are about to fill.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
    ):
        yield


def _handle_of(packed: PackedWeight) -> Handle | None:
    if packed.input_scale is not None:
        return StaticHandle(packed) if packed.layout == CPU_LAYOUT and packed.K else None
    if packed.layout == CPU_LAYOUT:
        return LinearHandle(packed)
    return cuda.LinearHandle(packed) if packed.layout.startswith(cuda.PREFIX) else None


def needs_grad(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd wants to know of a product of x."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def is_plain_call(x: Tensor, bias: Tensor | None, device: torch.device) -> bool:
    """Whether nobody but the caller would notice that a call on `device` bypasses torch's dispatcher."""
    return (
        type(x) is Tensor
        and x.device == device
        and not needs_grad(x, bias)
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and _transform() is None
        and _trace() is None
        and not _profiled()
        and forward_ad._current_level < 0
    )


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active."""
    # Not `_transform`, whose answer torch.compile does not follow.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _moves(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> bool:
    """Whether a module conversion gives `tensor` another device or other storage than its own."""
    probe = tensor[:1]
    moved = fn(probe)
    return moved.device != tensor.device or (
        moved.dtype == probe.dtype and moved.data_ptr() != tensor.data_ptr()
    )
