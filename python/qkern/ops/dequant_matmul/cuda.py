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
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qkern.ops.dequant_matmul.cuda_layout import Form
    from qkern.ops.registry import Request

__all__ = ["PREFIX", "input_gradient", "matmul", "why_not"]

PREFIX: Final = cuda_layout.PREFIX
_SHIFT_CODES: Final = {"none": 0, "zeros": 1, "offsets": 2}
# Bytes of one decoded slab: half of the L2 of a large GPU, so that it is still there when torch reads it.
_SLAB_BYTES: Final = 24 << 20
_MAX_SPLITS: Final = 8
_ALIGNED: Final = 16
# Of a block, by whether it has few rows of x: rows of the weight, warps that share K, blocks of a multiprocessor.
_FEW_BLOCK: Final = (cuda_layout.ROWS, 8, 2)
_BATCH_BLOCK: Final = (2 * cuda_layout.ROWS, 2, 1)


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
        self.N, self.K, self.device = N, K, blob.device
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

    def takes(self, rows: Tensor) -> bool:
        """Whether one pass over the weight serves so many rows of x; sums for offsets need more registers."""
        native = _cuda.module()
        most = native.FEW_TOKENS if self.form.shift == "offsets" else native.MATMUL_TOKENS
        return rows.shape[0] <= most and rows.dtype != torch.float32

    def splits(self, M: int) -> int:
        """Blocks along K: enough to fill the device for `M` rows of x, if a warp has two tiles."""
        rows, warps, resident = _FEW_BLOCK if M <= _cuda.module().FEW_TOKENS else _BATCH_BLOCK
        blocks, wanted = -(-self.N // rows), resident * _cuda.processors(self.device)
        splits = 1
        while splits < _MAX_SPLITS and blocks * splits < wanted and self.form.tiles >= 4 * splits * warps:
            splits *= 2
        return splits

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [M, K] @ W.T + bias`` for what it `takes`."""
        stream = _cuda.stream(self.device)
        M, K, stride = x.shape[0], self.K, x.stride(0)
        aligned = x.stride(1) == 1 and K % 8 == 0 and stride % 8 == 0 and x.data_ptr() % 16 == 0
        if self.columns is not None or not aligned:
            x = x.contiguous()
            K = stride = self.form.columns
            ordered = x.new_empty(M, K)
            _cuda.module().gather_columns(
                x=x.data_ptr(),
                M=M,
                K=self.K,
                x_stride=self.K,
                columns=0 if self.columns is None else self.columns.data_ptr(),
                padded=K,
                out=ordered.data_ptr(),
                stream=stream,
            )
            x = ordered
        out = x.new_empty(M, self.N)
        splits = self.splits(M)
        clusters = _cuda.capability(self.device) >= (9, 0)
        partials = None
        if splits > 1 and not clusters:
            partials = torch.empty(splits, M, self.N, dtype=torch.float32, device=self.device)
        self.native(
            x=x.data_ptr(),
            dtype=DTYPE_CODES[x.dtype],
            M=M,
            K=K,
            x_stride=stride,
            bias=0 if bias is None else bias.data_ptr(),
            bias_dtype=0 if bias is None else DTYPE_CODES[bias.dtype],
            out=out.data_ptr(),
            partials=0 if partials is None else partials.data_ptr(),
            splits=splits,
            stream=stream,
        )
        return out

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
            # A bias of fp32 is added in fp32 and rounded once.
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


def _lacks_bf16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the tensor cores have no bf16: sm_75."""
    return dtype == torch.bfloat16 and _cuda.capability(device) < (8, 0)


# What was validated, by the blob's id; a blob that moved is validated again.
_KNOWN: Final[dict[int, tuple[ref[Tensor], int, tuple[Any, ...], _Weight]]] = {}


def _weight(blob: Tensor, layout: str, N: int, K: int, spelling: str) -> _Weight:
    key, address, what = id(blob), blob.data_ptr(), (layout, N, K, spelling)
    known = _KNOWN.get(key)
    if known is not None and known[0]() is blob and known[1] == address and known[2] == what:
        return known[3]
    weight = _Weight(blob, layout, N, K, Scheme.parse(spelling))
    _KNOWN[key] = ref(blob, lambda _: _KNOWN.pop(key, None)), address, what, weight
    return weight


def matmul(
    x: Tensor, blob: Tensor, bias: Tensor | None, layout: str, N: int, K: int, spelling: str, compute: str
) -> Tensor:
    """``x [..., K] @ W.T + bias``; shapes and dtypes are validated by the caller."""
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != blob.device:
            raise InputError(
                f"{name} is on the wrong device: got {tensor.device}, allowed is {blob.device}, where the "
                "weight is"
            )
    weight = _weight(blob, layout, N, K, spelling)
    lead = x.shape[:-1]
    rows = x.detach().reshape(lead.numel(), K)
    if rows.numel() == 0 or N == 0:
        out = (
            rows.new_zeros(lead.numel(), N)
            if bias is None
            else bias.to(x.dtype).expand(lead.numel(), N).clone()
        )
    elif compute == "int8":
        qw = cuda_layout.unpack(blob, layout, N, K, Scheme.parse(spelling))
        out = reference.matmul(rows, qw, bias, True)
    else:
        with _cuda.on_device(weight.device):
            if _lacks_bf16(weight.device, x.dtype):
                out = weight.by_slabs(rows.float(), bias).to(x.dtype)
            else:
                out = weight.multiply(rows, bias) if weight.takes(rows) else weight.by_slabs(rows, bias)
    return out.view(*lead, N)


def input_gradient(grad: Tensor, blob: Tensor, layout: str, N: int, K: int, spelling: str) -> Tensor:
    """``grad [M, N] @ W`` in grad's dtype; arguments are validated by the caller."""
    if grad.numel() == 0 or K == 0:
        return grad.new_zeros(grad.shape[0], K)
    weight = _weight(blob, layout, N, K, spelling)
    with _cuda.on_device(weight.device):
        return weight.gradient(grad)
