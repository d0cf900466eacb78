"""What every checkpoint format answers: does it hold a layer, and how a layer becomes tensors and comes back.

A format knows tensors, names and configuration; files are `reader` and `writer`. All formats read and
write `QuantizedWeight`, so a conversion between two of them is a decode and an encode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from torch import Tensor

__all__ = [
    "Entry",
    "Format",
    "config_field",
    "exact_fp16",
    "make_scheme",
    "plain_reason",
    "refuse_unheld",
    "take",
    "trivial_index",
    "write_zeros",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a checkpoint's configuration says about one layer.

    Parameters
    ----------
    scheme : Scheme
        How its codes are to be read.
    act_order : bool
        Whether the columns may belong to groups out of order, so that the group index must be there.
    in_place : bool
        Codes are stored under the name of the plain weight.
    static : bool
        Activations have one scale, which must be there.
    threshold : float or None
        Columns of activations with a magnitude from here on are not quantized (LLM.int8()).
    """

    scheme: Scheme
    act_order: bool = False
    in_place: bool = False
    static: bool = False
    threshold: float | None = None


class Format(Protocol):
    """One checkpoint format; stateless."""

    @property
    def name(self) -> str:
        """Name on the command line."""
        ...

    @property
    def marker(self) -> str:
        """End of the name of a tensor that only a quantized layer has, for example ``qweight``."""
        ...

    @property
    def parts(self) -> frozenset[str]:
        """Ends of the names of a quantized layer's tensors, but for ``weight`` and ``bias``."""
        ...

    def holds(self, scheme: Scheme, N: int, K: int, *, act_order: bool = False) -> str | None:
        """Why the format cannot hold an ``[N, K]`` layer quantized so; None if it can."""
        ...

    def stored_bytes(self, scheme: Scheme, N: int, K: int) -> int:
        """Bytes of the tensors that `encode` makes of an ``[N, K]`` layer, scales in fp16."""
        ...

    def holds_together(self, schemes: Mapping[str, Scheme], skipped: Sequence[str] = ()) -> str | None:
        """Why layers with these schemes, and 16-bit linears `skipped`, cannot share a checkpoint."""
        ...

    def encode(self, name: str, qw: QuantizedWeight) -> dict[str, Tensor]:
        """Tensors of the layer `name`, full names to tensors.

        Raises
        ------
        UnsupportedError
            If the format cannot hold the weight without changing it.
        """
        ...

    def decode(self, name: str, tensors: Mapping[str, Tensor], entry: Entry) -> QuantizedWeight:
        """Read the layer `name` back; `tensors` has full names and may hold more than this layer.

        Raises
        ------
        FormatError
            If a tensor is missing or its dtype or shape contradicts the others or `entry`.
        """
        ...

    def config(
        self,
        schemes: Mapping[str, Scheme],
        *,
        act_order: bool = False,
        static: Collection[str] = (),
        skipped: Sequence[str] = (),
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``quantization_config`` of config.json.

        Parameters
        ----------
        schemes : mapping
            Scheme of every quantized layer by name.
        act_order : bool
            Whether any layer has a group index.
        static : collection of str
            Layers whose activations have one scale.
        skipped : sequence of str
            Linear layers that stay 16-bit.
        details : mapping or None
            More fields, such as ``damp_percent``; they cannot replace the format's own.
        """
        ...

    def sidecars(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Further JSON files, by name, that the format's readers expect."""
        ...

    def entry_of(self, config: Mapping[str, Any]) -> Callable[[str], Entry]:
        """Read a ``quantization_config``; what is returned says what it has about a layer by its name.

        Raises
        ------
        FormatError
            If it says nothing usable; the function that is returned too.
        """
        ...


def plain_reason(scheme: Scheme, what: str) -> str | None:
    """Why `what`, which stores integer codes and a scale a group, cannot hold `scheme`."""
    if scheme.codebook is not None:
        return f"{what} stores integer codes, not the {scheme.codebook} codebook"
    if scheme.double_quant:
        return f"{what} stores plain scales, not double-quantized ones"
    if scheme.act_bits is not None:
        return (
            f"{what} does not say that activations are quantized: drop a8 from {scheme}, as compute='int8' "
            "needs no mark, or use compressed-tensors"
        )
    if scheme.per_tensor:
        return f"{what} needs a scale per channel or group, not one per tensor"
    return None


def refuse_unheld(fmt: Format, name: str, qw: QuantizedWeight) -> None:
    """Raise UnsupportedError when `fmt` cannot hold `qw`."""
    if len(qw.shape) != 2:
        raise UnsupportedError(
            f"{name}: {fmt.name} holds matrices: got experts {qw.shape}; write each by itself"
        )
    if qw.offsets is not None:
        raise UnsupportedError(
            f"{name}: {fmt.name} holds integer zero points: got float offsets (w = q * s + m); "
            "requantize the layer with zero points, or export it to GGUF's Q4_1"
        )
    reason = fmt.holds(qw.scheme, qw.N, qw.K, act_order=qw.group_index is not None)
    if reason is not None:
        raise UnsupportedError(f"{name}: {reason}")


def exact_fp16(name: str, tensor: Tensor) -> Tensor:
    """`tensor` in fp16.

    Raises
    ------
    UnsupportedError
        If a value would change.
    """
    half = tensor.to(torch.float16)
    if not torch.equal(half.to(tensor.dtype), tensor):
        raise UnsupportedError(
            f"{name}: this format stores fp16 scales and {tensor.dtype} ones here do not fit exactly; "
            "quantize with scale_dtype=torch.float16, or use format='compressed-tensors', which keeps them"
        )
    return half


def trivial_index(scheme: Scheme, K: int) -> Tensor:
    """Group of each column when the columns are in order: int32 ``[K]``."""
    return torch.arange(K, dtype=torch.int32, device="cpu") // scheme.group_length(K)


def write_zeros(qw: QuantizedWeight) -> Tensor:
    """Zero points uint8 ``[N, G]``, those of the symmetric grid included."""
    if qw.zeros is not None:
        return qw.zeros
    return torch.full(qw.scales.shape, qw.scheme.midpoint, dtype=torch.uint8, device="cpu")


def take(
    tensors: Mapping[str, Tensor],
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
) -> Tensor:
    """Fetch a tensor and check it; None in `shape` fits any size.

    Raises
    ------
    FormatError
        If it is missing, or of another dtype or shape.
    """
    if name not in tensors:
        raise FormatError(f"tensor {name} is missing: the layer is incomplete; fetch the checkpoint again")
    tensor = tensors[name]
    fits = len(shape) == tensor.dim() and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype not in dtypes or not fits:
        wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise FormatError(
            f"tensor {name} must be {kinds} {wanted}: got {str(tensor.dtype).removeprefix('torch.')} "
            f"{list(tensor.shape)}; the file contradicts its configuration"
        )
    return tensor


def config_field(config: Mapping[str, Any], key: str, kind: type, default: Any = ...) -> Any:
    """Field `key` of a configuration, checked for its type (a bool is no int here).

    Raises
    ------
    FormatError
        If it is missing without a default or of another type.
    """
    value = config.get(key, default)
    if value is ...:
        raise FormatError(
            f"quantization_config has no {key!r}: {kind.__name__} needed; fetch the checkpoint again"
        )
    if value is default:
        return value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FormatError(
            f"quantization_config: {key!r} must be {kind.__name__}: got {value!r}; fetch the checkpoint again"
        )
    return value


def make_scheme(bits: int, group_size: int | None, zero_point: bool) -> Scheme:
    """Scheme of a file; -1 and None mean one group a channel.

    Raises
    ------
    FormatError
        If qkern has no such scheme.
    """
    try:
        return Scheme(bits=bits, group_size=None if group_size == -1 else group_size, zero_point=zero_point)
    except InputError as error:
        raise FormatError(f"quantization_config: {error}") from None
