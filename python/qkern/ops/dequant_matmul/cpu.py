"""dequant_matmul on the native CPU kernels: packing, the handle that calls them, large products of floats."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import torch
from torch import Tensor

from qkern.errors import InputError, UnsupportedError
from qkern.ops._native import DTYPE_CODES, core, empty, pointer, threads, why_not_cpu
from qkern.ops.codebooks import codebook
from qkern.ops.dequant_matmul.checks import check_input
from qkern.ops.dequant_matmul.plain import nested_from_bytes, nested_to_bytes
from qkern.schemes import PackedWeight, QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qkern.ops.registry import Request

__all__ = [
    "LAYOUT",
    "LinearGroup",
    "LinearHandle",
    "input_gradient",
    "matmul",
    "matmul_group",
    "pack",
    "unpack",
    "why_not",
]

LAYOUT: Final = "cpu.k4x16"
# qk::ZeroKind of csrc/include/qkern/packed_weight.h.
_MIDPOINT, _ZEROS, _OFFSETS, _CODEBOOK = range(4)
_SCALE_DTYPES: Final = {code: dtype for dtype, code in DTYPE_CODES.items()}
# From this many rows of x, compute float decodes the weight a slab at a time and leaves the product to
# torch's matmul; below, and wherever no number is given, the native kernels are faster
# (bench/bench_dequant_matmul.py --slabs). Torch has what they lack where it multiplies bf16 in AMX tiles, and
# on ARM in vendor libraries.
_SLAB_ROWS_AMX: Final = 32
_SLAB_ROWS: Final = {"scalar": 48, "neon": 48, "neon_dotprod": 48}
# Bytes of one decoded slab: it should stay in the last-level cache until torch has read it.
_SLAB_BYTES: Final = 8 << 20
_PANEL: Final = 64
_ROW_UNIT: Final = 16


def why_not(request: Request) -> str | None:
    """Why the native kernels cannot serve `request`."""
    return why_not_cpu(request.device)


@functools.cache
def _torch_has_amx() -> bool:
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return probe is not None and bool(probe())


def slab_rows(dtype: torch.dtype) -> float:
    """Rows of x from which compute float goes through torch's matmul; infinity if it never does."""
    if dtype == torch.bfloat16 and _torch_has_amx():
        return _SLAB_ROWS_AMX
    return _SLAB_ROWS.get(core().active_tier(), math.inf)


def _by_torch(x: Tensor, K: int) -> bool:
    """Whether compute float leaves x ``[..., K]`` to torch's matmul."""
    return slab_rows(x.dtype) * K <= x.numel() > 0


def _columns_by_group(qw: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Find where groups start, int32 ``[groups + 1]``, and the order of the columns (None: as they are)."""
    K, groups = qw.K, qw.scales.shape[1]
    if qw.group_index is None:
        starts = torch.arange(groups + 1, dtype=torch.int32, device="cpu") * max(qw.scheme.group_length(K), 1)
        return starts.clamp_(max=K), None
    index = qw.group_index
    if K and (int(index.min()) < 0 or int(index.max()) >= groups):
        raise InputError(
            f"group_index must lie in 0..{groups - 1}, the groups of the scales: "
            f"got {int(index.min())}..{int(index.max())}"
        )
    counts = torch.bincount(index, minlength=groups)
    starts = torch.zeros(groups + 1, dtype=torch.int32, device="cpu")
    starts[1:] = counts.cumsum(0)
    order = index.argsort(stable=True).to(torch.int32)
    in_place = bool((order == torch.arange(K, dtype=torch.int32, device="cpu")).all())
    return starts, None if in_place else order


def pack(qw: QuantizedWeight) -> PackedWeight:
    """Write a 2-D weight in the layout of the native kernels."""
    scheme, (N, K) = qw.scheme, qw.shape
    starts, order = _columns_by_group(qw)
    kind, zeros = _MIDPOINT, qw.zeros
    if scheme.codebook is not None:
        kind = _CODEBOOK
    elif qw.offsets is not None:
        kind, zeros = _OFFSETS, qw.offsets
    elif qw.zeros is not None:
        kind = _ZEROS
    extra = None if qw.nested is None else nested_to_bytes(qw.nested)
    extra_bytes = 0 if extra is None else extra.numel()
    codes, scales = qw.codes.contiguous(), qw.scales.contiguous()
    zeros = None if zeros is None else zeros.contiguous()
    table = codebook(scheme.codebook).values.contiguous() if scheme.codebook is not None else None
    shape = {
        "N": N,
        "K": K,
        "groups": scales.shape[1],
        "bits": scheme.bits,
        "zero_kind": kind,
        "scale_dtype": DTYPE_CODES[scales.dtype],
        "per_tensor": scheme.per_tensor,
        "group_start": pointer(starts),
        "extra_bytes": extra_bytes,
    }
    size = core().packed_bytes(**shape, permuted=order is not None)
    with torch.inference_mode(False):  # a tensor whose version tells whether it was written to
        blob = empty(size, dtype=torch.uint8)
    core().pack_weight(
        blob=pointer(blob),
        **shape,
        has_index=qw.group_index is not None,
        permutation=pointer(order),
        codes=pointer(codes),
        scales=pointer(scales),
        zeros=pointer(zeros),
        table=pointer(table),
        scheme=str(scheme),
        extra=pointer(extra),
        threads=threads(),
    )
    return PackedWeight(blob=blob, layout=LAYOUT, N=N, K=K, scheme=scheme)


def _blob(packed: PackedWeight | Tensor) -> Tensor:
    blob = packed.blob if isinstance(packed, PackedWeight) else packed
    if blob.dtype != torch.uint8 or blob.dim() != 1 or not blob.is_contiguous() or blob.device.type != "cpu":
        raise InputError(
            f"the blob of a {LAYOUT} weight must be contiguous uint8 [bytes] on the CPU: "
            f"got {blob.dtype} {tuple(blob.shape)} on {blob.device}; pack the weight again"
        )
    return blob


# What was validated, by the blob's id, so that a compiled model, which has only the blob at hand, does not
# read its header in every call. A blob that moved, or that torch knows to have changed, is validated again.
_VALIDATED: Final[dict[int, tuple[ref[Tensor], int, int, Any, tuple[int, int]]]] = {}


def _validated(blob: Tensor, N: int, K: int) -> tuple[int, Any]:
    """Address of a blob that holds a weight ``[N, K]``, and the native object for it."""
    key, address = id(blob), blob.data_ptr()
    version = -1 if blob.is_inference() else blob._version
    known = _VALIDATED.get(key)
    if known is not None and known[0]() is blob and known[1] == address and known[2] == version >= 0:
        native, shape = known[3], known[4]
    else:
        try:
            native = core().Linear(pointer(blob), _blob(blob).numel())
        except ValueError as error:
            raise _corrupt(error) from None
        shape = native.shape
        _VALIDATED[key] = ref(blob, lambda _: _VALIDATED.pop(key, None)), address, version, native, shape
    if shape != (N, K):
        raise _corrupt(f"it holds {list(shape)}, not [{N}, {K}]")
    return address, native


def _corrupt(reason: object) -> InputError:
    return InputError(f"packed weight is not sound: {reason}; pack it again from the quantized weight")


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """Undo `pack`, bit for bit.

    Raises
    ------
    InputError
        If the blob is corrupt or is not of the shape and scheme that `packed` names.
    """
    blob, scheme, N, K = _blob(packed), packed.scheme, packed.N, packed.K
    try:
        header = core().packed_header(pointer(blob), blob.numel())
    except ValueError as error:
        raise _corrupt(error) from None
    if (header["N"], header["K"], header["scheme"]) != (N, K, str(scheme)):
        raise _corrupt(f"it holds {header['scheme']} [{header['N']}, {header['K']}], not {scheme} [{N}, {K}]")
    if header["bits"] != scheme.bits:
        raise _corrupt(f"it holds codes of {header['bits']} bits, not those of {scheme}")
    # Per tensor there may be several groups all the same: a group index can name them.
    scale_shape = (1 if header["per_tensor"] else N, header["groups"])
    scale_dtype = _SCALE_DTYPES[header["scale_dtype"]]
    codes = empty(N, scheme.code_words(K), dtype=torch.int32)
    scales = empty(*scale_shape, dtype=scale_dtype)
    kind = header["zero_kind"]
    zeros = empty(*scale_shape, dtype=torch.uint8) if kind == _ZEROS else None
    offsets = empty(*scale_shape, dtype=scale_dtype) if kind == _OFFSETS else None
    index = empty(K, dtype=torch.int32) if header["has_index"] else None
    core().unpack_weight(
        blob=pointer(blob),
        bytes=blob.numel(),
        codes=pointer(codes),
        scales=pointer(scales),
        zeros=pointer(zeros if offsets is None else offsets),
        group_index=pointer(index),
        threads=threads(),
    )
    extra = blob[header["extra_offset"] : header["extra_offset"] + header["extra_bytes"]]
    return QuantizedWeight(
        codes=codes,
        scales=scales,
        shape=(N, K),
        scheme=scheme,
        zeros=zeros,
        offsets=offsets,
        group_index=index,
        nested=nested_from_bytes(extra) if extra.numel() else None,
    )


def _is_simple(x: Tensor, dtype: int, K: int, compute: str) -> bool:
    """Whether x ``[..., K]`` can go to the kernels as it is."""
    return (
        dtype >= 0
        and x.is_cpu
        and x.is_contiguous()
        and x.dim() > 0
        and x.shape[-1] == K
        and (compute == "int8" or compute == "float")
    )


def _rows_of(x: Tensor, K: int, compute: str, device: torch.device) -> tuple[Tensor, int]:
    """Check x, and return it with contiguous rows, and their stride."""
    check_input(x, K, device)
    if compute not in ("int8", "float"):
        raise InputError(f"unknown compute: got {compute!r}, allowed are 'int8' and 'float'")
    rows = x.reshape(-1, K) if K else x.reshape(x.shape[:-1].numel(), K)
    if K > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)


def _bias(bias: Tensor, N: int, dtype: int) -> tuple[int, int]:
    """Check a bias: its address and its dtype's code."""
    code = DTYPE_CODES.get(bias.dtype, -1)
    if code not in (0, dtype) or bias.shape != (N,) or not bias.is_contiguous() or not bias.is_cpu:
        raise InputError(
            f"bias must be contiguous [{N}] of x's dtype or fp32 on the CPU: "
            f"got {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        )
    return bias.data_ptr(), code


class LinearHandle:
    """A packed CPU weight that was validated once and is called with a few microseconds of overhead.

    For inference in eager mode: no autograd, no dispatch. Everything else goes through `dequant_matmul`.

    Parameters
    ----------
    packed : PackedWeight
        In the layout of the native CPU kernels; its blob is kept alive.

    Raises
    ------
    InputError
        If the blob is corrupt or belongs to another layout.
    """

    __slots__ = ("K", "N", "_address", "_blob", "_native")

    device: Final = torch.device("cpu")
    auto: Final = "int8"  # what compute "auto" is

    def __init__(self, packed: PackedWeight) -> None:
        if packed.layout != LAYOUT:
            raise InputError(
                f"LinearHandle needs the layout {LAYOUT}: got {packed.layout!r}; pack with backend='cpu'"
            )
        self._attach(packed.blob, packed.N, packed.K)

    @classmethod
    def _of(cls, blob: Tensor, N: int, K: int) -> LinearHandle:
        handle = cls.__new__(cls)
        handle._attach(blob, N, K)
        return handle

    def _attach(self, blob: Tensor, N: int, K: int) -> None:
        self._address, self._native = _validated(blob, N, K)
        self._blob, self.N, self.K = blob, N, K

    def __call__(self, x: Tensor, bias: Tensor | None = None, compute: str = "int8") -> Tensor:
        """``x [..., K] @ W.T + bias`` in x's dtype.

        Parameters
        ----------
        x : Tensor
            fp32, fp16 or bf16 ``[..., K]`` on the CPU, any strides.
        bias : Tensor or None
            ``[N]``, contiguous, of x's dtype or fp32.
        compute : str
            ``"int8"`` or ``"float"``.

        Raises
        ------
        InputError
            On a wrong shape or dtype.
        """
        if self._blob.data_ptr() != self._address:  # moved, as torch does to share memory with a process
            self._attach(self._blob, self.N, self.K)
        if compute == "float" and _by_torch(x, self.K):
            return self._by_slabs(x, bias)
        return _call(self._native, x, bias, self.N, self.K, compute)

    def _slabs(self, dtype: torch.dtype) -> list[tuple[int, int]]:
        step = max(_SLAB_BYTES // (max(self.K, 1) * dtype.itemsize) // _PANEL, 1) * _PANEL
        return [(first, min(first + step, self.N)) for first in range(0, self.N, step)]

    def _decode(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows first..last of the weight, transposed: ``[K, last - first]``."""
        rows = last - first
        # An odd multiple of the row unit: a power of two would map every line to a few cache sets.
        stride = -(-rows // _ROW_UNIT) * _ROW_UNIT
        stride += _ROW_UNIT if stride % (2 * _ROW_UNIT) == 0 else 0
        slab = empty(self.K, stride, dtype=dtype)
        self._native.decode(slab.data_ptr(), DTYPE_CODES[dtype], stride, first, rows, torch.get_num_threads())
        return slab[:, :rows]

    def _by_slabs(self, x: Tensor, bias: Tensor | None) -> Tensor:
        check_input(x, self.K, self._blob.device)
        if bias is not None:
            _bias(bias, self.N, DTYPE_CODES[x.dtype])
        # torch's fp16 matmul on a CPU is slow and sums in fp16 on some machines.
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
        values = x.detach().to(dtype)
        out = x.new_empty(*x.shape[:-1], self.N)
        for first, last in self._slabs(dtype):
            part = values @ self._decode(first, last, dtype)
            if bias is not None:
                part = part + bias[first:last]
            out[..., first:last] = part
        return out

    def input_gradient(self, grad: Tensor) -> Tensor:
        """``grad [M, N] @ W`` in grad's dtype, summed in fp32."""
        total = grad.new_zeros(grad.shape[0], self.K, dtype=torch.float32)
        for first, last in self._slabs(torch.float32):
            total.addmm_(grad[:, first:last].float(), self._decode(first, last, torch.float32).T)
        return total.to(grad.dtype)


class LinearGroup:
    """Packed CPU weights that read the same x: it is prepared once, and the threads share all the products.

    Parameters
    ----------
    handles : sequence of LinearHandle
        Up to 8 of them.

    Raises
    ------
    UnsupportedError
        If x has to be prepared differently for them: another K, bits, groups or order of columns, or int8
        activations with a scale a token.
    """

    __slots__ = ("_N", "_handles", "_natives")

    def __init__(self, handles: Sequence[LinearHandle]) -> None:
        if not all(isinstance(handle, LinearHandle) for handle in handles):
            raise UnsupportedError("only weights of the native CPU kernels run as one call")
        self._handles = tuple(handles)
        self._N = [handle.N for handle in self._handles]
        self._attach()

    def _attach(self) -> None:
        natives = tuple([handle._native for handle in self._handles])
        group = _native_group(natives)
        if group is None:
            raise UnsupportedError(
                "these weights do not run as one call: they differ in K, bits, groups or order of columns"
            )
        # In one assignment: another thread may be in the middle of a call.
        self._natives = natives, group

    def __call__(
        self, x: Tensor, biases: Sequence[Tensor | None], compute: str = "int8"
    ) -> tuple[Tensor, ...]:
        """``x @ W.T + bias`` for each weight; arguments and errors are those of `LinearHandle`."""
        handles = self._handles
        natives, group = self._natives
        for handle, native in zip(handles, natives):  # noqa: B905 - of one length, and this is hot
            if handle._blob.data_ptr() != handle._address:
                handle._attach(handle._blob, handle.N, handle.K)
            if handle._native is not native:
                self._attach()
                group = self._natives[1]
                break
        K = handles[0].K
        if compute == "float" and _by_torch(x, K):
            return tuple([handle(x, bias, compute) for handle, bias in zip(handles, biases, strict=True)])
        return tuple(_call_group(group, x, biases, self._N, K, compute))


def _call(native: Any, x: Tensor, bias: Tensor | None, N: int, K: int, compute: str) -> Tensor:
    lead, dtype, row_stride = x.shape[:-1], DTYPE_CODES.get(x.dtype, -1), K
    if not _is_simple(x, dtype, K, compute):
        x, row_stride = _rows_of(x, K, compute, torch.device("cpu"))
    bias_pointer, bias_dtype = (0, 0) if bias is None else _bias(bias, N, dtype)
    out = x.new_empty(*lead, N)
    M = lead.numel()
    if M and N:
        native(
            x.data_ptr(),
            dtype,
            M,
            row_stride,
            out.data_ptr(),
            bias_pointer,
            bias_dtype,
            compute == "int8",
            torch.get_num_threads(),
        )
    return out


def _call_group(
    native: Any, x: Tensor, biases: Sequence[Tensor | None], N: Sequence[int], K: int, compute: str
) -> list[Tensor]:
    lead, dtype, row_stride = x.shape[:-1], DTYPE_CODES.get(x.dtype, -1), K
    if not _is_simple(x, dtype, K, compute):
        x, row_stride = _rows_of(x, K, compute, torch.device("cpu"))
    checked = [(0, 0) if bias is None else _bias(bias, n, dtype) for bias, n in zip(biases, N, strict=True)]
    outs = [x.new_empty(*lead, n) for n in N]
    M = lead.numel()
    if M:
        native(
            x.data_ptr(),
            dtype,
            M,
            row_stride,
            [out.data_ptr() for out in outs],
            checked,
            compute == "int8",
            torch.get_num_threads(),
        )
    return outs


@functools.lru_cache(maxsize=4096)
def _native_group(natives: tuple[Any, ...]) -> Any:
    """Group of native weights, or None if they do not run as one call; holds no weight's memory."""
    try:
        return core().LinearGroup(natives)
    except ValueError:
        return None


def matmul(x: Tensor, blob: Tensor, bias: Tensor | None, N: int, K: int, compute: str) -> Tensor:
    """``x [..., K] @ W.T + bias``; arguments are validated by the caller."""
    if compute == "float" and _by_torch(x, K):
        return LinearHandle._of(blob, N, K)._by_slabs(x, bias)
    return _call(_validated(blob, N, K)[1], x, bias, N, K, compute)


def matmul_group(
    x: Tensor,
    blobs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    N: Sequence[int],
    K: int,
    compute: str,
) -> list[Tensor]:
    """``x @ W.T + bias`` for weights that share x, as one call where they allow it."""
    if compute == "int8" or not _by_torch(x, K):
        native = _native_group(tuple([_validated(blob, n, K)[1] for blob, n in zip(blobs, N, strict=True)]))
        if native is not None:
            return _call_group(native, x, biases, N, K, compute)
    each = zip(blobs, biases, N, strict=True)
    return [matmul(x, blob, bias, n, K, compute) for blob, bias, n in each]


def input_gradient(grad: Tensor, blob: Tensor, N: int, K: int) -> Tensor:
    """``grad [M, N] @ W``; arguments are validated by the caller."""
    return LinearHandle._of(blob, N, K).input_gradient(grad)
