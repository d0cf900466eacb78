"""dequant_matmul on the native CUDA kernels: one pass for few rows of x, torch's matmul on slabs for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops import _cuda
from qkern.ops._native import DTYPE_CODES
from qkern.ops.codebooks import codebook
from qkern.ops.dequant_matmul import cuda_layout, reference
from qkern.ops.dequant_matmul.checks import check_input
from qkern.ops.quantize_activations import cuda as quantize_activations
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qkern.ops.dequant_matmul.cuda_layout import Form
    from qkern.ops.registry import Request
    from qkern.schemes import PackedWeight

__all__ = ["PREFIX", "LinearHandle", "input_gradient", "matmul", "why_not"]

PREFIX: Final = cuda_layout.PREFIX
_SHIFT_CODES: Final = {"none": 0, "zeros": 1, "offsets": 2}
# Bytes of one decoded slab: half of the L2 of a large GPU, so that it is still there when torch reads it.
_SLAB_BYTES: Final = 24 << 20
_MAX_SPLITS: Final = 8
_ALIGNED: Final = 16
# By rows of x, up to the number on the left: rows of the weight and warps along K of a block, and how many
# blocks fit on a multiprocessor.
_BLOCKS: Final = {
    8: (cuda_layout.ROWS, 8, 2),
    16: (cuda_layout.ROWS, 8, 1),
    64: (2 * cuda_layout.ROWS, 2, 1),
}
# Blocks beyond those that run at once, as a share of them, which are better than half a device without work.
_MARGIN: Final = 1.1


def why_not(request: Request) -> str | None:
    """Why the native kernels cannot serve `request`."""
    return _cuda.why_not_cuda(request.device)


def _table_words(name: str, dtype: torch.dtype) -> list[int]:
    """Return the low bytes of a codebook's 16 values, then the high ones, as eight words."""
    raw = codebook(name).values.to(dtype).view(torch.uint8).view(16, 2).T.contiguous()
    return [word & 0xFFFFFFFF for word in raw.view(torch.int32).flatten().tolist()]


class _Weight:
    """A validated blob: its native object, what the layout id said, and the columns of x."""

    def __init__(self, blob: Tensor, layout: str, N: int, K: int, scheme: Scheme) -> None:
        self.form: Form
        if blob.data_ptr() % _ALIGNED:
            raise InputError(
                f"the blob of a packed weight must lie at a multiple of {_ALIGNED} bytes: got one that is "
                f"{blob.data_ptr() % _ALIGNED} beyond, a slice of a larger tensor; clone it"
            )
        self.form, views = cuda_layout.parts(blob, layout, N, K, scheme)
        self.N, self.K, self.device, self.address = N, K, blob.device, blob.data_ptr()
        self.columns = views.get("columns")

        def address(name: str) -> int:
            return views[name].data_ptr() if name in views else 0

        tables = [[0] * 8] * 2
        if scheme.codebook is not None:
            tables = [_table_words(scheme.codebook, dtype) for dtype in (torch.float16, torch.bfloat16)]
        self.native = _cuda.module().Linear(
            codes=address("codes"),
            scales=address("scales"),
            shifts=address("shifts"),
            N=N,
            groups=self.form.groups,
            group_columns=self.form.group_columns,
            bits=scheme.bits,
            shift=_SHIFT_CODES[self.form.shift],
            scale_dtype=DTYPE_CODES[self.form.scale_dtype],
            table=address("table"),
            tables=tables,
        )
        self.plain = self.columns is None and K % 8 == 0  # x can be read where it lies
        capability = _cuda.capability(self.device)
        # Those that the tensor cores multiply.
        self.dtypes = {torch.float16, torch.bfloat16} if capability >= (8, 0) else {torch.float16}
        self.clusters = capability >= (9, 0)
        # Sums for offsets need registers that many rows of x leave to nobody.
        native = _cuda.module()
        self.most = native.FEW_TOKENS if self.form.shift == "offsets" else native.MATMUL_TOKENS
        self.splits_by_rows = [self.splits_for(M) for M in range(1, self.most + 1)]

    def splits(self, blocks: int, warps: int, resident: int) -> int:
        """Blocks along K: as many as run at once with `blocks` for each, if a warp has two tiles.

        `warps` of a block share K, `resident` blocks fit on a multiprocessor.
        """
        most, splits = _MARGIN * resident * _cuda.processors(self.device), 1
        while splits < _MAX_SPLITS and 2 * blocks * splits <= most and self.form.tiles >= 4 * splits * warps:
            splits *= 2
        return splits

    def splits_for(self, M: int) -> int:
        """Blocks along K of the float product of `M` rows."""
        rows, warps, resident = next(block for limit, block in _BLOCKS.items() if limit >= M)
        return self.splits(-(-self.N // rows), warps, resident)

    def multiply(self, x: Tensor, dtype: torch.dtype, M: int, bias: Tensor | None, out: Tensor) -> None:
        """``out = x [..., K] @ W.T + bias`` for `M` rows of `dtype`, fp16 or bf16, at most `most`."""
        stream, address, K = _cuda.stream(self.device), x.data_ptr(), self.K
        stride = K
        if not (self.plain and x.is_contiguous()):
            x = x.reshape(M, K)
            address, (stride, step) = x.data_ptr(), x.stride()
            if not self.plain or step != 1 or stride % 8:
                address = 1  # as if it were not aligned
        if address % _ALIGNED:
            x, stride = x.contiguous(), self.form.columns
            ordered = x.new_empty(M, stride)
            _cuda.module().gather_columns(
                x=x.data_ptr(),
                M=M,
                K=K,
                x_stride=K,
                columns=_cuda.pointer(self.columns),
                padded=stride,
                out=ordered.data_ptr(),
                stream=stream,
            )
            x, address, K = ordered, ordered.data_ptr(), stride
        splits = self.splits_by_rows[M - 1]
        partials = None
        if splits > 1 and not self.clusters:
            partials = torch.empty(splits, M, self.N, dtype=torch.float32, device=self.device)
        # Names would cost a microsecond: see the binding.
        self.native(
            address,
            DTYPE_CODES[dtype],
            M,
            K,
            stride,
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else DTYPE_CODES[bias.dtype],
            out.data_ptr(),
            0 if partials is None else partials.data_ptr(),
            splits,
            stream,
        )

    def slabs(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight as floats, columns as the layout has them, a slab at a time."""
        width = self.form.columns
        step = max(_SLAB_BYTES // (width * dtype.itemsize) // cuda_layout.ROWS, 1) * cuda_layout.ROWS
        for first in range(0, self.N, step):
            rows = min(step, self.N - first)
            slab = torch.empty(rows, width, dtype=dtype, device=self.device)
            self.native.decode(
                out=slab.data_ptr(),
                dtype=DTYPE_CODES[dtype],
                first_row=first,
                rows=rows,
                stream=_cuda.stream(self.device),
            )
            yield slice(first, first + rows), slab

    def by_slabs(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [M, K] @ W.T + bias`` through torch's matmul."""
        out = x.new_empty(x.shape[0], self.N)
        if self.columns is not None:
            # One more column, of zeros, for those that are no column of x.
            padded = torch.nn.functional.pad(x, (0, 1))
            x = padded[:, torch.where(self.columns < 0, self.K, self.columns)]
        for rows, slab in self.slabs(x.dtype):
            part = x @ slab[:, : x.shape[1]].T
            # A bias of fp32 is added in fp32.
            out[:, rows] = part if bias is None else (part + bias[rows]).to(out.dtype)
        return out

    def gradient(self, grad: Tensor) -> Tensor:
        """``grad [M, N] @ W``, summed over the slabs in fp32."""
        total = torch.zeros(grad.shape[0], self.form.columns, dtype=torch.float32, device=self.device)
        for rows, slab in self.slabs(grad.dtype):
            total += (grad[:, rows] @ slab).float()
        if self.columns is None:
            return total[:, : self.K].to(grad.dtype)
        back = torch.empty(grad.shape[0], self.K + 1, dtype=torch.float32, device=self.device)
        back[:, torch.where(self.columns < 0, self.K, self.columns)] = total
        return back[:, : self.K].to(grad.dtype)


# What was validated, by the blob's id; a blob that moved is validated again.
_KNOWN: Final[dict[int, tuple[ref[Tensor], int, tuple[Any, ...], _Weight]]] = {}


def _weight(blob: Tensor, layout: str, N: int, K: int, spelling: str) -> _Weight:
    key, address, what = id(blob), blob.data_ptr(), (layout, N, K, spelling)
    known = _KNOWN.get(key)
    if known is not None and known[0]() is blob and known[1] == address and known[2] == what:
        return known[3]
    reason = _cuda.why_not_cuda(blob.device)
    if reason is not None:
        raise InputError(
            f"the weight is packed for CUDA, which cannot run: {reason}; pack it for where it is now, with "
            "pack_weight(unpack_weight(weight))"
        )
    weight = _Weight(blob, layout, N, K, Scheme.parse(spelling))
    _KNOWN[key] = ref(blob, lambda _: _KNOWN.pop(key, None)), address, what, weight
    return weight


def matmul(
    x: Tensor, blob: Tensor, bias: Tensor | None, layout: str, N: int, K: int, spelling: str, compute: str
) -> Tensor:
    """``x [..., K] @ W.T + bias``; shapes and dtypes are validated by the caller."""
    weight = _weight(blob, layout, N, K, spelling)
    check_input(x, K, weight.device)
    x = x.detach()
    if compute == "float" or x.numel() == 0 or N == 0:
        return _product(weight, x, bias)
    if bias is not None:
        _check_bias(bias, weight, x.dtype)
    rows, scheme = x.reshape(x.shape[:-1].numel(), K), Scheme.parse(spelling)
    if reference.activations_by_token(scheme, weight.form.groups):
        codes, scales = quantize_activations.quantize(rows, K)
        # The torch op: the package int8_matmul imports this one.
        out: Tensor = torch.ops.qkern.int8_matmul(
            codes, scales, blob, bias, None, layout, N, K, spelling, x.dtype
        )
    else:
        qw = cuda_layout.unpack(blob, layout, N, K, scheme)
        out = reference.matmul(rows, qw, bias, True)
    return out.view(*x.shape[:-1], N)


def _check_bias(bias: Tensor, weight: _Weight, dtype: torch.dtype) -> None:
    fits = bias.shape == (weight.N,) and bias.dtype in (dtype, torch.float32) and bias.is_contiguous()
    if not fits or bias.device != weight.device:
        raise InputError(
            f"bias must be contiguous [{weight.N}] of x's dtype or fp32 on {weight.device}, where the weight "
            f"is: got {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        )


def _product(weight: _Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., K] @ W.T + bias`` in floats."""
    if bias is not None:
        _check_bias(bias, weight, x.dtype)
    if not _cuda.is_current(weight.device):
        with torch.cuda.device(weight.device):
            return _product(weight, x, bias)
    N, K, dtype = weight.N, weight.K, x.dtype
    *leading, _ = x.shape
    M = x.numel() // K if K else 0
    if weight.most >= M > 0 and N and dtype in weight.dtypes:
        out = x.new_empty(*leading, N)
        weight.multiply(x, dtype, M, bias, out)
        return out
    if M == 0 or N == 0:
        out = x.new_zeros(*leading, N)
        return out if bias is None else out + bias.to(dtype)
    rows = x.reshape(M, K)
    # The tensor cores of sm_75 have no bf16.
    widened = dtype == torch.bfloat16 and dtype not in weight.dtypes
    out = weight.by_slabs(rows.float() if widened else rows, bias)
    return out.to(dtype).view(*leading, N)


class LinearHandle:
    """A packed weight on a GPU that was validated once and is called with a few microseconds of overhead.

    For inference in eager mode, as the one of the CPU: no autograd, no dispatch.

    Parameters
    ----------
    packed : PackedWeight
        In the layout of the native CUDA kernels; its blob is kept alive.

    Raises
    ------
    InputError
        If the layout does not go with the blob.
    """

    __slots__ = ("_blob", "_packed", "_weight", "auto", "device")

    def __init__(self, packed: PackedWeight) -> None:
        self._packed, self._blob, self.device = packed, packed.blob, packed.blob.device
        self.auto: Final = "float" if packed.scheme.act_bits is None else "int8"
        self._weight = self._attached()

    def _attached(self) -> _Weight:
        packed = self._packed
        return _weight(packed.blob, packed.layout, packed.N, packed.K, packed.spelling)

    def __call__(self, x: Tensor, bias: Tensor | None = None, compute: str = "float") -> Tensor:
        """``x [..., K] @ W.T + bias`` in x's dtype; x and bias on the weight's device.

        Raises
        ------
        InputError
            On a wrong shape, dtype or device.
        """
        weight, shape = self._weight, x.shape
        if not shape or shape[-1] != weight.K or x.dtype not in DTYPE_CODES or x.device != self.device:
            check_input(x, weight.K, self.device)
        if compute != "float":
            packed = self._packed
            return matmul(x, self._blob, bias, packed.layout, packed.N, packed.K, packed.spelling, compute)
        if self._blob.data_ptr() != weight.address:
            weight = self._weight = self._attached()
        return _product(weight, x, bias)


def input_gradient(grad: Tensor, blob: Tensor, layout: str, N: int, K: int, spelling: str) -> Tensor:
    """``grad [M, N] @ W`` in grad's dtype; arguments are validated by the caller."""
    if grad.numel() == 0 or K == 0:
        return grad.new_zeros(grad.shape[0], K)
    weight = _weight(blob, layout, N, K, spelling)
    with _cuda.on_device(weight.device):
        return weight.gradient(grad)
