"""Run every kernel of a backend on tiny shapes, for compute-sanitizer to watch; results are checked as well.

    compute-sanitizer --tool memcheck python bench/gpu/sanitize.py [--backend cuda] [--seconds 200]

Each tensor has memory of its own, so that memcheck sees what goes beyond it. Ends with status 1 if a call
failed, a result is wrong, or an op of the backend has no case here; the last line counts the calls.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from contestant import relative_error
from table import differing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

Case = tuple[str, "Callable[[torch.device, str], bool]"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
SCHEMES = ("w2g64", "w3g32z", "w4g128", "w8", "nf4g64")
# Far above rounding in the dtype of x, far below a wrong result; tests/ops has the budgets.
ALLOWED = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-5}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Make normal values on the CPU: the fewer other kernels run, the faster is the sanitizer."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(values: Any, device: torch.device) -> Any:
    return None if values is None else values.to(device)


def same(found: tuple[Any, ...], truth: tuple[Any, ...]) -> bool:
    return differing(tuple(moved(part, torch.device("cpu")) for part in found), truth) == 0


def quantize_groupwise() -> Iterator[Case]:
    from qkern.ops import quantize_groupwise as op

    def run(spelling: str, search: str, device: torch.device, backend: str) -> bool:
        weight = noise(9, 200)
        found = op(weight.to(device), spelling, search=search, backend=backend)
        truth = op(weight, spelling, search=search, backend="reference")
        return same((found.codes, found.scales, found.zeros), (truth.codes, truth.scales, truth.zeros))

    for spelling, search in itertools.product((*SCHEMES, "w4z", "w8t"), ("minmax", "mse")):
        yield f"{spelling} {search}", lambda d, b, s=spelling, how=search: run(s, how, d, b)


def dequantize_groupwise() -> Iterator[Case]:
    from qkern.ops import dequantize_groupwise as op
    from qkern.ops import quantize_groupwise

    def run(spelling: str, dtype: torch.dtype, device: torch.device, backend: str) -> bool:
        quantized = quantize_groupwise(noise(9, 200), spelling, backend="reference")
        found = op(quantized.to(device), dtype, backend=backend)
        return same((found,), (op(quantized, dtype, backend="reference"),))

    for spelling, dtype in itertools.product((*SCHEMES, "w4z", "w8t"), FLOATS):
        yield f"{spelling} {dtype}", lambda d, b, s=spelling, to=dtype: run(s, to, d, b)


def pack_bits() -> Iterator[Case]:
    from qkern.ops import pack_bits as op
    from qkern.ops.pack_bits import LAYOUTS

    def run(bits: int, layout: str, device: torch.device, backend: str) -> bool:
        codes = torch.arange(16 * 77).view(16, 77).remainder(2**bits).to(torch.uint8)
        found = op(codes.to(device), bits, layout=layout, backend=backend)
        return same((found,), (op(codes, bits, layout=layout, backend="reference"),))

    for bits, layout in itertools.product((2, 3, 4, 8), LAYOUTS):
        if layout != "awq" or bits == 4:
            yield f"{bits} {layout}", lambda d, b, n=bits, how=layout: run(n, how, d, b)


def unpack_bits() -> Iterator[Case]:
    from qkern.ops import pack_bits as pack
    from qkern.ops import unpack_bits as op
    from qkern.ops.pack_bits import LAYOUTS

    def run(bits: int, layout: str, device: torch.device, backend: str) -> bool:
        codes = torch.arange(16 * 77).view(16, 77).remainder(2**bits).to(torch.uint8)
        packed = pack(codes, bits, layout=layout, backend="reference").to(device)
        return same((op(packed, bits, (16, 77), layout=layout, backend=backend),), (codes,))

    for bits, layout in itertools.product((2, 3, 4, 8), LAYOUTS):
        if layout != "awq" or bits == 4:
            yield f"{bits} {layout}", lambda d, b, n=bits, how=layout: run(n, how, d, b)


def gptq_update() -> Iterator[Case]:
    from qkern.ops import gptq_update as op

    def run(N: int, B: int, bits: int, codebook: str | None, device: torch.device, backend: str) -> bool:
        weight, hinv = noise(N, B), (0.1 * noise(B, B, seed=1)).triu(1) + torch.eye(B)
        index = torch.arange(B, dtype=torch.int32) // 7 % 3
        zeros = None if codebook else torch.full((N, 3), 2 ** (bits - 1), dtype=torch.uint8)
        parts = (weight, hinv, noise(N, 3, seed=2).abs() + 0.1, zeros, index)
        there = [moved(part, device) for part in parts]
        found = op(*there, bits=bits, codebook=codebook, backend=backend)
        return same(found, op(*parts, bits=bits, codebook=codebook, backend="reference"))

    for (N, B), (bits, book) in itertools.product(
        ((1, 1), (5, 128), (70, 33)), ((2, None), (4, None), (8, None), (4, "nf4"))
    ):
        yield f"{N}x{B} {book or bits}", lambda d, b, s=(N, B, bits, book): run(*s, d, b)
    yield "3x600 4", lambda d, b: run(3, 600, 4, None, d, b)


def weights(spelling: str, N: int, K: int, act_order: bool = False) -> Any:
    from dataclasses import replace

    from qkern.ops import quantize_groupwise

    quantized = quantize_groupwise(noise(N, K), spelling, backend="reference")
    if not act_order:
        return quantized
    groups = quantized.scales.shape[1]
    index = torch.randperm(K, generator=torch.Generator().manual_seed(3)) % groups
    return replace(quantized, group_index=index.to(torch.int32))


def product(
    what: tuple[str, int, int, int, torch.dtype, bool, bool], device: torch.device, backend: str
) -> bool:
    """Check a product and its gradient, or with `has_bias` a product with a bias."""
    from qkern.ops import dequant_matmul as op
    from qkern.ops import dequantize_groupwise, pack_weight

    spelling, N, K, M, dtype, has_bias, act_order = what
    quantized = weights(spelling, N, K, act_order)
    decoded = dequantize_groupwise(quantized, backend="reference")
    x, bias = noise(M, K, seed=4).to(dtype), noise(N, seed=5).to(dtype) if has_bias else None
    packed = pack_weight(quantized.to(device), backend=backend)
    there = x.to(device, copy=True).requires_grad_(not has_bias)
    found = op(there, packed, moved(bias, device), compute="float")
    exact = x.double() @ decoded.double().T + (0 if bias is None else bias.double())
    right = relative_error(found.detach().cpu(), exact) <= ALLOWED[dtype]
    if not has_bias:
        grad = noise(M, N, seed=6).to(dtype)
        found.backward(grad.to(device))
        right &= relative_error(there.grad.cpu(), grad.double() @ decoded.double()) <= ALLOWED[dtype]
    return right


def dequant_matmul() -> Iterator[Case]:
    few = [(s, 70, 256, M, torch.float16, True, False) for s in SCHEMES for M in (1, 8, 16)]
    many = [(s, 70, 256, M, torch.float16, False, False) for s in SCHEMES for M in (17, 40, 65)]
    others = [
        ("w4g128", 130, 2080, 3, torch.bfloat16, False, False),  # blocks share K
        ("w4g128", 64, 4096, 1, torch.float16, False, False),
        ("w4g128", 130, 2080, 40, torch.bfloat16, False, False),
        ("w4g32", 64, 100, 2, torch.float16, False, False),  # rows of x that are not aligned
        ("w4g7z", 65, 77, 5, torch.float16, False, False),
        ("w4g64", 70, 128, 4, torch.float16, False, True),
        ("w3g64z", 70, 128, 33, torch.bfloat16, False, True),
        ("w4g128", 70, 256, 7, torch.float32, False, False),
        ("w8t", 66, 96, 9, torch.float16, True, False),
    ]
    for what in (*few, *many, *others):
        spelling, N, K, M, dtype, has_bias, act_order = what
        name = f"{spelling} {N}x{K} M={M} {str(dtype).removeprefix('torch.')}"
        name += " bias" * has_bias + " act-order" * act_order
        yield name, lambda d, b, w=what: product(w, d, b)


def quantize_activations() -> Iterator[Case]:
    from qkern.ops import quantize_activations as op

    def run(
        M: int, K: int, dtype: torch.dtype, group: int | None, device: torch.device, backend: str
    ) -> bool:
        x = noise(M, K).to(dtype)
        found = op(x.to(device), group_size=group, backend=backend)
        return same(found, op(x, group_size=group, backend="reference"))

    for shape, dtype, group in itertools.product(((1, 1), (5, 200)), FLOATS, (None, 32)):
        yield f"{shape} {dtype} {group}", lambda d, b, s=(*shape, dtype, group): run(*s, d, b)


def int8_matmul() -> Iterator[Case]:
    from qkern.ops import int8_matmul as op
    from qkern.ops import pack_weight

    def run(spelling: str, M: int, dtype: torch.dtype, device: torch.device, backend: str) -> bool:
        quantized = weights(spelling, 70, 200)
        codes = (noise(M, 200) * 40).round().clamp(-128, 127).to(torch.int8)
        scales = None if dtype == torch.int32 else noise(M, 1, seed=1).abs()
        packed = pack_weight(quantized.to(device), backend=backend)
        found = op(codes.to(device), moved(scales, device), packed, out_dtype=dtype)
        truth = op(codes, scales, quantized, out_dtype=dtype, backend="reference")
        if dtype == torch.int32:
            return same((found,), (truth,))
        return relative_error(found.cpu(), truth) <= ALLOWED[dtype]

    for spelling, M, dtype in itertools.product(
        ("w8", "w8z", "w8t"), (1, 16, 17, 65), (torch.int32, torch.float16, torch.float32)
    ):
        yield f"{spelling} M={M} {dtype}", lambda d, b, s=(spelling, M, dtype): run(*s, d, b)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "pack_bits": pack_bits,
    "unpack_bits": unpack_bits,
    "quantize_groupwise": quantize_groupwise,
    "dequantize_groupwise": dequantize_groupwise,
    "gptq_update": gptq_update,
    "quantize_activations": quantize_activations,
    "int8_matmul": int8_matmul,
    "dequant_matmul": dequant_matmul,
}


def run(device: torch.device, backend: str, seconds: float) -> int:
    """Run all cases of a backend and print what came of them; 0 if all of them are right."""
    from qkern.ops import registry

    end, counts, wrong = time.monotonic() + seconds, dict.fromkeys(CASES, 0), 0
    has = [op for op, known in registry._IMPLEMENTATIONS if known == backend]
    for op in has:
        if op not in CASES:
            print(f"{op}: no case for it in {Path(__file__).name}")
            wrong += 1
    # In turns, so that every op has had some when the time is over.
    queues = [[(op, *case) for case in CASES[op]()] for op in CASES if op in has]
    turns = [case for round_ in itertools.zip_longest(*queues) for case in round_ if case is not None]
    for done, (op, name, call) in enumerate(turns):
        if time.monotonic() > end:
            print(f"stopped after {done} of {len(turns)} cases: time is over")
            break
        try:
            if not call(device, backend):
                print(f"{op} {name}: wrong result")
                wrong += 1
        except Exception as problem:
            print(f"{op} {name}: {type(problem).__name__}: {problem}", flush=True)
            wrong += 1
        counts[op] += 1
    ran = ", ".join(f"{op} {count}" for op, count in counts.items() if count)
    print(f"{backend}: {sum(counts.values())} calls, {wrong} wrong or missing ({ran or 'none'})", flush=True)
    return 1 if wrong or not all(counts[op] for op in has if op in counts) or not has else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton"))
    parser.add_argument("--seconds", type=float, default=200.0, help="after which no case is begun")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "sanitize.py needs a CUDA device: torch sees none\n")
    sys.exit(run(torch.device("cuda"), options.backend, options.seconds))


if __name__ == "__main__":
    main()
