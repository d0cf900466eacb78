"""dequant_matmul on Triton: sums for few rows of x, tensor cores for many, from one packed layout."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import torch
from torch import Tensor

from qkern.ops import _triton
from qkern.ops.dequant_matmul import reference, triton_layout
from qkern.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qkern.ops.registry import Request

__all__ = ["PREFIX", "Config", "input_gradient", "matmul", "why_not"]

PREFIX: Final = triton_layout.PREFIX
_SHIFT_CODES: Final = {"none": 0, "zeros": 1, "offsets": 2}
# Up to as many rows of x by sums; the tensor cores' tiles are twice as wide.
_FEW: Final = 8
_MAX_SPLITS: Final = 8
# Bytes of one decoded slab: half of the L2 of a large GPU, so that it is still there when torch reads it.
_SLAB_BYTES: Final = 24 << 20
_DECODE_ROWS, _DECODE_WORDS = 16, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Tile of one program and how Triton compiles it.

    Parameters
    ----------
    tokens, rows, words : int
        Rows of x, rows of the weight and words of each, powers of two.
    warps, stages : int
        Of the compiled program.
    """

    tokens: int
    rows: int
    words: int
    warps: int = 4
    stages: int = 2


# By rows of x, up to the number on the left; `words` of many rows are those of a chunk of 256 columns.
_FEW_CONFIGS: Final = {
    1: Config(tokens=1, rows=16, words=64),
    2: Config(tokens=2, rows=16, words=64),
    4: Config(tokens=4, rows=8, words=64),
    8: Config(tokens=8, rows=8, words=64),
}
_MANY_CONFIGS: Final = {
    16: Config(tokens=16, rows=64, words=32, stages=3),
    32: Config(tokens=32, rows=64, words=32, stages=3),
    64: Config(tokens=64, rows=64, words=32),
    math.inf: Config(tokens=64, rows=128, words=32, warps=8),
}
_CHUNK_COLUMNS: Final = 256
# Shared memory of a device whose programs may take the last tile.
_WIDEST_BYTES: Final = 96 << 10
# What QKERN_TRITON_AUTOTUNE=1 tries beside the table.
_OTHER_ROWS: Final = (8, 16, 32, 64, 128)
_OTHER_WARPS: Final = (2, 4, 8)
# Of a thread, where a tile is summed up: with more the compiler takes half a minute.
_MOST_SUMS: Final = 128


def why_not(request: Request) -> str | None:
    """Why the kernels cannot serve `request`."""
    return _triton.why_not_triton(request.device)


def _power_below(value: int) -> int:
    return 1 << (max(value, 1).bit_length() - 1)


class _Weight:
    """A validated blob: its parts, what the layout id said, and what every launch is told of it."""

    def __init__(self, blob: Tensor, layout: str, N: int, K: int, scheme: Scheme) -> None:
        self.form, views = triton_layout.parts(blob, layout, N, K, scheme)
        self.N, self.K, self.device, self.scheme = N, K, blob.device, scheme
        self.kernels = _triton.kernels("dequant_matmul")
        self.columns = views.get("columns")
        codes = views["codes"]
        # What a kernel does not read still needs an address.
        self.tensors = [codes] + [views.get(name, codes) for name in ("thirds", "scales", "shifts", "table")]
        per_word = triton_layout.codes_per_word(scheme.bits)
        self.row_words = codes.shape[1]
        self.used_words = self.form.columns // per_word
        self.group_words = self.form.group_columns // per_word
        self.block = triton_layout.block_columns(self.form)
        self.block_words = self.block // per_word
        self.scale_stride = 0 if scheme.per_tensor else self.form.groups
        self.constants = {
            "BITS": scheme.bits,
            "SHIFT": _SHIFT_CODES[self.form.shift],
            "BOOK": scheme.codebook is not None,
            "BLOCK": self.block,
        }
        self.tuned: dict[tuple[int, torch.dtype], Config] = {}

    def config(self, M: int, dtype: torch.dtype) -> Config:
        """Look up the table and fit it: tiles stay within a row and, if they can, within a block."""
        if M <= _FEW:
            found = next(config for limit, config in _FEW_CONFIGS.items() if limit >= M)
            words = min(found.words, 1 << (self.used_words - 1).bit_length())
            return replace(found, words=words)
        if _triton.shared_memory(self.device) < _WIDEST_BYTES:
            # sm_75: the widest tile is for those that have more.
            M = min(M, 64)
        found = next(config for limit, config in _MANY_CONFIGS.items() if limit >= M)
        per_word = triton_layout.codes_per_word(self.scheme.bits)
        # A product takes 16 columns or more: where a block has fewer words, a tile spans groups.
        words = max(min(_CHUNK_COLUMNS // per_word, self.block_words), 16)
        if dtype == torch.float32:
            # Twice the bytes of every tile of x.
            found = replace(found, tokens=min(found.tokens, 32), stages=1)
        if self.scheme.codebook is not None:
            # Each stage would hold what every code looks up, four bytes a weight.
            found = replace(found, stages=1)
        return replace(found, words=words)

    def splits(self, config: Config, M: int, chunks: int) -> int:
        """Programs along K: enough to fill the device twice, if each has two chunks or more."""
        blocks = -(-self.N // config.rows) * -(-M // config.tokens)
        wanted = -(-2 * _triton.processors(self.device) // max(blocks, 1))
        return max(min(_power_below(wanted), _power_below(chunks // 2), _MAX_SPLITS), 1)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [M, K] @ W.T + bias``."""
        M = x.shape[0]
        if self.columns is not None and M > _FEW:
            # One more column, of zeros, for those that are no column of x.
            x = torch.nn.functional.pad(x, (0, 1))[:, torch.where(self.columns < 0, self.K, self.columns)]
        elif x.stride(1) != 1:
            x = x.contiguous()
        config = self.config(M, x.dtype)
        if _triton.autotuned(self.device):
            config = self.best(config, x.dtype, lambda tile: self.launch(tile, x, bias))
        return self.launch(config, x, bias)

    def launch(self, config: Config, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply with a tile; x has the columns of the layout where M is large."""
        M = x.shape[0]
        out = x.new_empty((M, self.N), dtype=_triton.stored_dtype(x.dtype, self.device))
        chunks = -(-self.used_words // config.words)
        splits = self.splits(config, M, chunks)
        each = -(-chunks // splits)
        splits = -(-chunks // each)
        to = out if splits == 1 else x.new_empty((splits, M, self.N), dtype=torch.float32)
        has_bias = bias is not None
        added = out if bias is None else bias
        grid = (-(-self.N // config.rows), splits, -(-M // config.tokens))
        common = (*self.tensors, added, to, M, self.N, x.shape[1], self.row_words, self.used_words)
        counts = (self.scale_stride, self.group_words, each)
        tile = {"BM": config.tokens, "BN": config.rows, "BW": config.words}
        options = {"num_warps": config.warps, "num_stages": config.stages}
        here = self.constants | tile | options | {"BIAS": has_bias and splits == 1}
        here["CHUNKS"] = each if _triton.interpreted(self.device) else 0
        if M <= _FEW:
            columns = out if self.columns is None else self.columns
            here["MAPPED"] = self.columns is not None
            self.kernels.multiply_few[grid](x, x.stride(0), columns, *common, *counts, **here)
        else:
            here["ONE_GROUP"] = config.words <= self.block_words or self.form.groups == 1
            # The interpreter multiplies bf16 as if it were integers.
            here["WIDEN"] = _triton.interpreted(self.device) and x.dtype == torch.bfloat16
            self.kernels.multiply_many[grid](x, x.stride(0), *common, *counts, **here)
        if splits > 1:
            width = 256
            self.kernels.add_splits[(-(-self.N // width), M)](
                to, added, out, M, self.N, SPLITS=splits, BIAS=has_bias, BN=width
            )
        return out.to(x.dtype)

    def best(self, config: Config, dtype: torch.dtype, launch: Callable[[Config], Tensor]) -> Config:
        """Time the candidates around `config` once for each regime and dtype of x."""
        import triton

        key = config.tokens, dtype
        if key not in self.tuned:
            tried: list[tuple[float, int, Config]] = []
            for order, (rows, warps) in enumerate(itertools.product(_OTHER_ROWS, _OTHER_WARPS)):
                candidate = replace(config, rows=rows, warps=warps)
                if config.tokens <= _FEW and config.tokens * rows * config.words > _MOST_SUMS * 32 * warps:
                    continue
                try:
                    time = triton.testing.do_bench(lambda c=candidate: launch(c))
                except triton.runtime.errors.OutOfResources:
                    continue
                tried.append((time, order, candidate))
            self.tuned[key] = min(tried)[2] if tried else config
        return self.tuned[key]

    def slabs(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the weight as floats, columns as the layout has them, a slab at a time."""
        width = self.form.columns
        step = max(_SLAB_BYTES // max(width * dtype.itemsize, 1), 1)
        for first in range(0, self.N, step):
            rows = min(step, self.N - first)
            stored = _triton.stored_dtype(dtype, self.device)
            slab = torch.empty(rows, width, dtype=stored, device=self.device)
            grid = (-(-rows // _DECODE_ROWS), -(-self.used_words // _DECODE_WORDS))
            self.kernels.decode[grid](
                *self.tensors,
                slab,
                first,
                rows,
                width,
                self.row_words,
                self.used_words,
                self.scale_stride,
                self.group_words,
                **self.constants,
                BN=_DECODE_ROWS,
                BW=_DECODE_WORDS,
                enable_fp_fusion=False,
            )
            yield slice(first, first + rows), slab.to(dtype)

    def gradient(self, grad: Tensor) -> Tensor:
        """``grad [M, N] @ W``, summed over the slabs in fp32."""
        total = torch.zeros(grad.shape[0], self.form.columns, dtype=torch.float32, device=self.device)
        if total.numel():
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
    weight = _Weight(blob, layout, N, K, Scheme.parse(spelling))
    _KNOWN[key] = ref(blob, lambda _: _KNOWN.pop(key, None)), address, what, weight
    return weight


def matmul(
    x: Tensor, blob: Tensor, bias: Tensor | None, layout: str, N: int, K: int, spelling: str, compute: str
) -> Tensor:
    """``x [..., K] @ W.T + bias``; shapes and dtypes are validated by the caller."""
    lead = x.shape[:-1]
    rows, bias = x.detach().reshape(lead.numel(), K), None if bias is None else bias.detach()
    weight = _weight(blob, layout, N, K, spelling)
    if rows.numel() == 0 or N == 0:
        empty = rows.new_zeros(rows.shape[0], N)
        out = empty if bias is None else bias.to(x.dtype).expand_as(empty).clone()
    elif compute == "float":
        with _triton.on_device(weight.device):
            out = weight.multiply(rows, bias)
    elif reference.activations_by_token(weight.scheme, weight.form.groups):
        # The torch ops: the package int8_matmul imports this one.
        codes, scales = torch.ops.qkern.quantize_activations(rows, None)
        out = torch.ops.qkern.int8_matmul(codes, scales, blob, bias, None, layout, N, K, spelling, x.dtype)
    else:
        qw = triton_layout.unpack(blob, layout, N, K, weight.scheme)
        out = reference.matmul(rows, qw, bias, True)
    return out.view(*lead, N)


def input_gradient(grad: Tensor, blob: Tensor, layout: str, N: int, K: int, spelling: str) -> Tensor:
    """``grad [M, N] @ W`` in grad's dtype; arguments are validated by the caller."""
    weight = _weight(blob, layout, N, K, spelling)
    with _triton.on_device(weight.device):
        return weight.gradient(grad)
