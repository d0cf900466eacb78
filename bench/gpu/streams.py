"""Ops that read once and write once, held against a copy; GPTQ's column phase; the overhead of a call."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from contestant import relative_error
from gpu import timer
from table import differing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from gpu.report import Record, Report

BACKENDS = ("cuda", "triton")
# Rows at both ends that are compared with the reference.
COMPARED = 64


def ends(tensor: Tensor, axis: int = 0) -> Tensor:
    length = tensor.shape[axis]
    return torch.cat(
        [tensor.narrow(axis, 0, COMPARED), tensor.narrow(axis, length - COMPARED, COMPARED)], axis
    )


def noise(N: int, K: int, dtype: torch.dtype) -> Tensor:
    generator = timer.generator(0)
    return (0.02 * torch.randn(N, K, device=timer.DEVICE, generator=generator)).to(dtype)


def random_words(N: int, words: int) -> Tensor:
    limits = (-(2**31), 2**31)
    generator = timer.generator(0)
    return torch.randint(*limits, (N, words), dtype=torch.int32, device=timer.DEVICE, generator=generator)


def quantize_groupwise(case: str, N: int, K: int, backend: str) -> tuple[Callable[[], Any], int, float]:
    """``"w4g128 float16"``: the call, the bytes it has to move, and how much of a sample is wrong."""
    from qkern.ops import quantize_groupwise as op

    spelling, dtype = case.split()
    weight = noise(N, K, getattr(torch, dtype))
    made, truth = op(weight, spelling, backend=backend), op(ends(weight), spelling, backend="reference")
    parts = [(made.codes, truth.codes), (made.scales, truth.scales)]
    wrong = differing(tuple(ends(part) for part, _ in parts), tuple(part for _, part in parts))
    nbytes = weight.nbytes + made.codes.nbytes + made.scales.nbytes
    return functools.partial(op, weight, spelling, backend=backend), nbytes, wrong


def dequantize_groupwise(case: str, N: int, K: int, backend: str) -> tuple[Callable[[], Any], int, float]:
    from qkern.ops import dequantize_groupwise as op
    from qkern.schemes import QuantizedWeight, Scheme

    scheme, dtype = Scheme.parse(case.split()[0]), case.split()[1]
    words, scales = random_words(N, scheme.code_words(K)), noise(*scheme.scale_shape(N, K), torch.float16)
    quantized = QuantizedWeight(codes=words, scales=scales, shape=(N, K), scheme=scheme)
    sample = replace(quantized, codes=ends(words), scales=ends(scales), shape=(2 * COMPARED, K))
    made = op(quantized, getattr(torch, dtype), backend=backend)
    wrong = differing((ends(made),), (op(sample, made.dtype, backend="reference"),))
    nbytes = quantized.codes.nbytes + quantized.scales.nbytes + made.nbytes
    return functools.partial(op, quantized, made.dtype, backend=backend), nbytes, wrong


def pack_bits(case: str, N: int, K: int, backend: str) -> tuple[Callable[[], Any], int, float]:
    """``"4 dense"``."""
    from qkern.ops import pack_bits as op

    bits, layout = int(case.split()[0]), case.split()[1]
    codes = random_words(N, -(-K // 4)).view(torch.uint8)[:, :K] & (2**bits - 1)
    packed = op(codes, bits, layout=layout, backend=backend)
    sample = op(ends(codes), bits, layout=layout, backend="reference")
    wrong = differing((ends(packed, axis=1 if layout == "gptq" else 0),), (sample,))
    return (
        functools.partial(op, codes, bits, layout=layout, backend=backend),
        codes.nbytes + packed.nbytes,
        wrong,
    )


def unpack_bits(case: str, N: int, K: int, backend: str) -> tuple[Callable[[], Any], int, float]:
    from qkern.ops import unpack_bits as op

    bits, layout = int(case.split()[0]), case.split()[1]
    along_k = -(-K * bits // 32)
    packed = random_words(*((along_k, N) if layout == "gptq" else (N, along_k)))
    call = functools.partial(op, packed, bits, (N, K), layout=layout, backend=backend)
    some = ends(packed, axis=1 if layout == "gptq" else 0)
    codes, truth = call(), op(some, bits, (2 * COMPARED, K), layout=layout, backend="reference")
    return call, codes.nbytes + packed.nbytes, differing((ends(codes),), (truth,))


def quantize_activations(case: str, N: int, K: int, backend: str) -> tuple[Callable[[], Any], int, float]:
    from qkern.ops import quantize_activations as op

    x = noise(N, K, getattr(torch, case))
    codes, scales = op(x, backend=backend)
    truth = op(ends(x), backend="reference")
    wrong = differing((ends(codes), ends(scales)), truth)
    return functools.partial(op, x, backend=backend), x.nbytes + codes.nbytes + scales.nbytes, wrong


STREAMS = {
    "quantize_groupwise": quantize_groupwise,
    "dequantize_groupwise": dequantize_groupwise,
    "pack_bits": pack_bits,
    "unpack_bits": unpack_bits,
    "quantize_activations": quantize_activations,
}


def stream(task: Record, report: Report) -> None:
    """Time an op bound by memory as a user calls it: some look at a flag before they return."""
    from qkern.ops import registry

    N, K = map(int, task["shape"].split("x"))
    entries: dict[str, tuple[Any, int]] = {}
    facts: dict[str, Record] = {}
    for backend in BACKENDS:
        name = f"qkern {backend}"
        if name in report.skipped or (task["op"], backend) not in registry._IMPLEMENTATIONS:
            continue
        with report.attempt(name):
            call, nbytes, wrong = STREAMS[task["op"]](task["variant"], N, K, backend)
            if not wrong <= 0:
                report.absent(name, f"wrong result: {wrong:.2%} of a sample differ from the reference")
                continue
            entries[name] = call, 1
            facts[name] = {"bytes": nbytes, "error": wrong}
    report.race(entries, facts)


def gptq_update(task: Record, report: Report) -> None:
    """Time the column phase of GPTQ as `quantize_gptq` runs it, and the op alone on its 32 blocks."""
    from bench_gptq import layer_loss
    from qkern.ops import dequantize_groupwise, quantize_groupwise, registry
    from qkern.ops import gptq_update as op
    from qkern.quantizers import GPTQConfig, columns, gptq
    from qkern.schemes import Scheme

    report.say(at="the Hessian")
    N, K = map(int, task["shape"].split("x"))
    scheme, config = Scheme.parse(task["scheme"]), GPTQConfig(search="minmax")
    weight = noise(N, K, torch.float32)
    generator = timer.generator(1)
    x = torch.randn(2 * K, K, device=timer.DEVICE, generator=generator)
    x += torch.randn(2 * K, 64, device=timer.DEVICE, generator=generator) @ (
        torch.randn(64, K, device=timer.DEVICE, generator=generator) / 8
    )
    hessian = x.T @ x / len(x)
    blocks = range(0, K, config.block_size)
    calls: dict[str, Callable[[], Any]] = {}

    def phase() -> Callable[[], gptq._Run]:
        order, groups = gptq._column_order(hessian.diagonal(), scheme, config)
        factor = columns.factorize(hessian, config.damp, order)
        assert factor is not None
        ordered = gptq.block.gather(weight, order)

        def call() -> gptq._Run:
            # Without sweeps it works in the memory of its weight; the copy counts as a part of it.
            run = gptq._Run(ordered.clone(), hessian, order, factor, groups, scheme, config)
            run.quantize()
            return run

        return call

    def updates(backend: str) -> Callable[[], Any]:
        corner = torch.randn(128, 128, device=timer.DEVICE, generator=generator)
        corner = (0.1 * corner).triu(1) + torch.eye(128, device=timer.DEVICE)
        scales = quantize_groupwise(weight, scheme, backend="reference").scales.float()
        zeros = torch.full(scales.shape, scheme.midpoint, dtype=torch.uint8, device=timer.DEVICE)

        def one(start: int, rows: slice, backend: str) -> tuple[Tensor, Tensor]:
            index = indices[start]
            part = weight[rows, start : start + len(index)]
            size = len(index)
            corner_of = corner[:size, :size]
            return op(part, corner_of, scales[rows], zeros[rows], index, bits=scheme.bits, backend=backend)

        indices = {
            start: torch.arange(start, min(start + 128, K), dtype=torch.int32, device=timer.DEVICE)
            // scheme.group_length(K)
            for start in blocks
        }
        found, truth = (one(0, slice(0, COMPARED), which) for which in (backend, "reference"))
        if differing(found, truth) > 0:
            raise AssertionError("its codes or errors differ from the reference")
        return lambda: [one(start, slice(None), backend) for start in blocks]

    with report.attempt("qkern"):
        if "qkern" not in report.skipped:
            call = phase()
            lost = layer_loss(weight, dequantize_groupwise(call().result()), hessian)
            nearest = dequantize_groupwise(quantize_groupwise(weight, scheme, backend="reference"))
            rounded = layer_loss(weight, nearest, hessian)
            if not lost < rounded:
                raise AssertionError(f"a loss of {lost:.3g}, rounding to nearest has {rounded:.3g}")
            calls["qkern"] = call
    for backend in BACKENDS:
        name = f"qkern {backend}, the op alone"
        if name not in report.skipped and ("gptq_update", backend) in registry._IMPLEMENTATIONS:
            with report.attempt(name):
                calls[name] = updates(backend)
    report.race({name: (call, 1) for name, call in calls.items()}, {})


def overhead(task: Record, report: Report) -> None:
    """Time calls as the host sees them, on a layer so small that the device waits for the host."""
    from qkern.nn import QuantLinear
    from qkern.ops import dequant_matmul, pack_weight, quantize_groupwise

    N, K = map(int, task["shape"].split("x"))
    x = noise(1, K, torch.float16)
    dense = noise(N, K, torch.float16)
    calls: dict[str, Callable[[], Any]] = {}
    with report.attempt("launch"):
        timer.launch()
        calls["launch"] = timer.launch
    calls["torch float16"] = functools.partial(torch.nn.functional.linear, x, dense)
    truth = calls["torch float16"]()
    quantized = quantize_groupwise(dense, task["scheme"], backend="reference")

    def add(name: str, call: Callable[[], Tensor]) -> None:
        error = relative_error(call(), truth)
        if not error <= 0.2:  # as far as four bits are from sixteen
            raise AssertionError(f"error {error:.2g}, allowed 0.2")
        calls[name] = call

    with report.attempt("qkern QuantLinear"):
        layer = QuantLinear.from_quantized(quantized)
        layer.compute = "float"
        add("qkern QuantLinear", functools.partial(layer, x))
    for backend in BACKENDS:
        with report.attempt(f"qkern {backend}, the op"):
            packed = pack_weight(quantized, backend=backend)
            call = functools.partial(dequant_matmul, x, packed, compute="float")
            add(f"qkern {backend}, the op", call)
    report.say(at="all together")
    for name, times in timer.host_race(calls).items():
        report.times(name, times)
