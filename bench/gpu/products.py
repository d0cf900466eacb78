"""Products with a quantized weight on a GPU: qkern's backends, torch's, and other libraries' kernels.

A contestant is made once for a weight: a function of x for each rotated copy. Weights are quantized and
decoded by the plain torch reference, so that nothing that is checked depends on a kernel that is timed.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from contestant import relative_error
from gpu import timer
from gpu.report import OtherScheme

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from gpu.report import Record, Report
    from qkern.schemes import PackedWeight, QuantizedWeight

    Run = Callable[[Tensor], Tensor]

# Beyond this a result is wrong, not rounded: a bf16 product is at 3e-3. (bitsandbytes has a grid of its own.)
WRONG = {"bitsandbytes": 0.2}
WRONG_AT_ALL = 0.02
# Rows of x at which gemlite, which tunes itself for minutes, takes part.
FEW_SIZES = {"gemlite": (1, 8, 64)}
# Dtype of x where it is not that of the case.
DTYPES = {
    "torch float16": torch.float16,
    "torch bfloat16": torch.bfloat16,
    "torch int4pack": torch.bfloat16,
}


@dataclass
class Weight:
    """A weight, what it decodes to, and the contestants that were made for it."""

    quantized: QuantizedWeight
    decoded: Tensor
    dtype: torch.dtype
    made: dict[str, list[Run] | Exception]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.quantized.stored_bits // 8

    def runs(self, name: str) -> list[Run]:
        """One function of x for each copy of the weight."""
        if name not in self.made:
            dense = name.startswith("torch ") and name != "torch int4pack"
            count = timer.copies_of(2 * self.decoded.numel() if dense else self.nbytes)
            try:
                self.made[name] = CONTESTANTS[name](self, count)
            except Exception as problem:  # once is enough to know; its frames hold memory of the device
                self.made[name] = problem.with_traceback(None)
        made = self.made[name]
        if isinstance(made, Exception):
            raise made
        return made


@functools.lru_cache(maxsize=1)
def weight_of(scheme: str, shape: str, dtype: str) -> Weight:
    """Make a weight with its contestants still to be made."""
    from qkern.ops import dequantize_groupwise, quantize_groupwise

    N, K = map(int, shape.split("x"))
    generator = timer.generator(N + K)
    full = 0.02 * torch.randn(N, K, device=timer.DEVICE, generator=generator)
    quantized = quantize_groupwise(full, scheme, backend="reference")
    decoded = dequantize_groupwise(quantized, backend="reference")
    return Weight(quantized, decoded, getattr(torch, dtype), {})


def clone(packed: PackedWeight) -> PackedWeight:
    return replace(packed, blob=packed.blob.clone())


def qkern(backend: str, weight: Weight, count: int) -> list[Run]:
    from qkern.ops import dequant_matmul, pack_weight

    packed = pack_weight(weight.quantized, backend=backend)
    return [functools.partial(dequant_matmul, weight=clone(packed), compute="float") for _ in range(count)]


def linear(dtype: torch.dtype, weight: Weight, count: int) -> list[Run]:
    dense = weight.decoded.to(dtype)

    return [functools.partial(torch.nn.functional.linear, weight=dense.clone()) for _ in range(count)]


def int4pack(weight: Weight, count: int) -> list[Run]:
    from qkern.ops import unpack_bits

    quantized, scheme = weight.quantized, weight.quantized.scheme
    if (
        scheme.bits != 4
        or scheme.codebook
        or scheme.zero_point
        or scheme.group_size not in (32, 64, 128, 256)
    ):
        raise OtherScheme
    codes = unpack_bits(quantized.codes, 4, quantized.shape, backend="reference")
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    scales = quantized.scales.bfloat16()
    both = torch.stack([scales, torch.zeros_like(scales)], -1).permute(1, 0, 2).contiguous()

    def one(own: Tensor) -> Run:
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, own, scheme.group_size, both)

    return [one(packed.clone()) for _ in range(count)]


def humming(weight: Weight, count: int) -> list[Run]:
    quantized, scheme = weight.quantized, weight.quantized.scheme
    if scheme.codebook or scheme.per_tensor:
        raise OtherScheme
    from humming.layer import HummingLayer

    from qkern.ops import pack_bits

    config = {"dtype": f"uint{scheme.bits}", "group_size": scheme.group_size or 0}
    # Its codes are the same dense stream, and mean the same: q - 2^(b-1) without zero points.
    tensors = {"weight": quantized.codes, "weight_scale": quantized.scales.to(weight.dtype)}
    if quantized.zeros is not None:
        config["has_zero_point"] = True
        zeros = pack_bits(quantized.zeros.T.contiguous(), scheme.bits, backend="reference")
        tensors["zero_point"] = zeros.T.contiguous()
    N, K = quantized.shape
    layer = HummingLayer(shape_n=N, shape_k=K, weight_config=config, torch_dtype=weight.dtype)
    layer = layer.to(timer.DEVICE)
    layer.load_from_tensors(tensors)
    layer.transform()
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def gemlite(weight: Weight, count: int) -> list[Run]:
    quantized, scheme = weight.quantized, weight.quantized.scheme
    if scheme.codebook or scheme.per_tensor or scheme.bits == 3:
        raise OtherScheme
    from gemlite.helper import A16Wn

    from qkern.ops import unpack_bits

    codes = unpack_bits(quantized.codes, scheme.bits, quantized.shape, backend="reference")
    scales = quantized.scales.to(weight.dtype)
    zeros = torch.full_like(scales, scheme.midpoint) if quantized.zeros is None else quantized.zeros
    maker = A16Wn(device=timer.DEVICE, dtype=weight.dtype)
    group = scheme.group_size or quantized.K
    return [maker.from_weights(codes, scales, zeros, scheme.bits, group) for _ in range(count)]


def bitsandbytes(weight: Weight, count: int) -> list[Run]:
    if str(weight.quantized.scheme) != "nf4g64":
        raise OtherScheme
    import bitsandbytes as library
    from bitsandbytes import functional

    dense = weight.decoded.to(weight.dtype)

    def one() -> Run:
        own, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
        return lambda x: library.matmul_4bit(x, own.t(), state)

    return [one() for _ in range(count)]


CONTESTANTS: dict[str, Callable[[Weight, int], list[Run]]] = {
    "qkern cuda": functools.partial(qkern, "cuda"),
    "qkern triton": functools.partial(qkern, "triton"),
    "torch float16": functools.partial(linear, torch.float16),
    "torch bfloat16": functools.partial(linear, torch.bfloat16),
    "torch int4pack": int4pack,
    "Humming": humming,
    "gemlite": gemlite,
    "bitsandbytes": bitsandbytes,
}


def checked(run: Callable[[], Tensor], exact: Tensor, dtype: torch.dtype) -> float:
    """Error of a result in memory that held NaN before."""
    poison = torch.full(exact.shape, torch.nan, dtype=dtype, device=exact.device)
    del poison
    return relative_error(run(), exact)


def dequant_matmul(task: Record, report: Report) -> None:
    """Time ``x @ W.T`` by all contestants for one scheme, shape and number of rows of x."""
    report.say(at="the weight")
    weight = weight_of(task["scheme"], task["shape"], task["dtype"])
    (N, K), M = weight.quantized.shape, task["M"]
    generator = timer.generator(M)
    x = torch.randn(M, K, device=timer.DEVICE, generator=generator).to(weight.dtype)
    exact = x.double() @ weight.decoded.double().T
    dense = relative_error(torch.nn.functional.linear(x, weight.decoded.to(weight.dtype)), exact)
    entries: dict[str, tuple[Any, int]] = {}
    facts: dict[str, Record] = {}
    for name in CONTESTANTS:
        if name in report.skipped or M not in FEW_SIZES.get(name, (M,)):
            continue
        with report.attempt(name):
            own = x.to(DTYPES.get(name, x.dtype))
            calls = [functools.partial(run, own) for run in weight.runs(name)]
            error, allowed = checked(calls[0], exact, own.dtype), WRONG.get(name, WRONG_AT_ALL)
            if error <= allowed:
                replay, last = timer.captured(calls)
                last.fill_(torch.nan)
                replay()
                error = relative_error(last, exact)
            if not error <= allowed:  # NaN is not
                report.absent(name, f"wrong result: error {error:.2g}, allowed {allowed:.2g}")
                continue
            entries[name] = replay, len(calls)
            is_dense = name in ("torch float16", "torch bfloat16")
            facts[name] = {
                "bytes": 2 * N * K if is_dense else weight.nbytes,
                "operations": 2 * M * N * K,
                "error": error,
                "facts": {"copies": len(calls), "linear_error": dense},
            }
    report.race(entries, facts)


def int8_matmul(task: Record, report: Report) -> None:
    """Time int8 activations by an 8-bit weight; torch's own product makes the sums alone, without scales."""
    from qkern.errors import UnsupportedError
    from qkern.ops import int8_matmul as product
    from qkern.ops import pack_weight, registry, unpack_bits

    report.say(at="the weight")
    weight = weight_of("w8", task["shape"], "float16")
    quantized, M = weight.quantized, task["M"]
    N, K = quantized.shape
    generator = timer.generator(M)
    codes = torch.randint(-127, 128, (M, K), device=timer.DEVICE, generator=generator).to(torch.int8)
    scales = torch.rand(M, 1, device=timer.DEVICE, generator=generator) * 1e-3 + 1e-3
    integers = (unpack_bits(quantized.codes, 8, (N, K), backend="reference").int() - 128).to(torch.int8)
    sums = codes.double() @ integers.double().T
    exact = sums * scales.double() * quantized.scales.double().T
    count = timer.copies_of(weight.nbytes)

    def ours(backend: str) -> list[Run]:
        request = registry.Request(device=codes.device, scheme=quantized.scheme, dtype=torch.int8)
        reason = registry.explain("int8_matmul", registry.Backend(backend), request)
        if reason is not None:
            raise UnsupportedError(reason)
        packed = pack_weight(quantized, backend=backend)
        return [
            functools.partial(product, x_scales=scales, weight=clone(packed), out_dtype=torch.float16)
            for _ in range(count)
        ]

    def torchs() -> list[Run]:
        if M <= 16:
            raise OtherScheme
        return [functools.partial(torch._int_mm, mat2=integers.clone().T) for _ in range(count)]

    entries: dict[str, tuple[Any, int]] = {}
    facts: dict[str, Record] = {}
    for name, make in {
        "qkern cuda": functools.partial(ours, "cuda"),
        "qkern triton": functools.partial(ours, "triton"),
        "torch _int_mm": torchs,
    }.items():
        if name in report.skipped:
            continue
        with report.attempt(name):
            calls = [functools.partial(run, codes) for run in make()]
            truth = sums if name == "torch _int_mm" else exact
            error = checked(calls[0], truth, torch.float16)
            if not error <= 1e-3:
                report.absent(name, f"wrong result: error {error:.2g}, allowed 0.001")
                continue
            entries[name] = timer.captured(calls)[0], len(calls)
            work = {"bytes": weight.nbytes, "operations": 2 * M * N * K}
            facts[name] = {**work, "error": error, "facts": {"copies": len(calls)}}
    report.race(entries, facts)
