"""GPTQ of one linear at w4g128 beside GPTQModel, the same weight and Hessian: the whole and the column phase.

    python bench/bench_gptq.py [--shapes 3584x3584,3584x18944] [--gptqmodel-python PYTHON] [--rounds 3]
        [--variants 'qkern minmax' 'torch alone']

The column phase is everything but the factorization of the Hessian and, in qkern, the energy of the
weight by which it divides the error that it reports (GPTQModel reports the losses of its columns as they
are); the whole has both. `torch alone` makes the LAPACK and BLAS calls that no GPTQ can do without, and
nothing else: the two Cholesky factorizations and the inverse between them, and for each block of 128
columns the product that brings the error of those before to it. `loss` is tr((W-Q) H (W-Q)^T) over tr(W H
W^T). Columns are ordered by importance inside their group and groups by importance (`group-aware`) in
both, or as --order says.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import TYPE_CHECKING, Any

import measure
from contestant import Absent, Job
from table import VERSION, tier

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["VERSION", "prepare"]

VARIANTS = ("qkern", "qkern minmax", "qkern mse", "torch alone")


@functools.cache  # the contestants of a process share it: at K = 18944 it takes minutes and 1.7 GB
def layer(N: int, K: int) -> tuple[Any, Any]:
    """Weight with heavy tails, and a Hessian of correlated activations with a few large channels."""
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(N, K, generator=generator)
    weight[torch.rand(N, K, generator=generator) < 1e-3] *= 8
    tokens = max(K + K // 2, 2048)
    hessian = torch.zeros(K, K)
    common = torch.randn(64, K, generator=generator) / 8
    channels = torch.ones(K)
    channels[torch.randperm(K, generator=generator)[: max(K // 100, 1)]] = 10.0
    for _ in range(0, tokens, 2048):
        x = torch.randn(2048, K, generator=generator)
        x = (x + torch.randn(2048, 64, generator=generator) @ common) * channels
        hessian.addmm_(x.T, x, alpha=2 / tokens)
    return weight, hessian


def layer_loss(weight: Any, quantized: Any, hessian: Any) -> float:
    def energy(matrix: Any) -> float:
        return float(((matrix @ hessian) * matrix).double().sum())

    return energy(weight - quantized) / energy(weight)


def alone(weight: Any, hessian: Any) -> tuple[float, float]:
    """Make the calls that any GPTQ makes: seconds of the factorization and of the whole."""
    import torch

    begin = time.perf_counter()
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    root = torch.linalg.cholesky(inverse, upper=True)
    factor = time.perf_counter() - begin
    errors = torch.zeros_like(weight)
    for start in range(128, len(hessian), 128):
        errors[:, start : start + 128] = errors[:, :start] @ root[:start, start : start + 128]
    return factor, time.perf_counter() - begin


def job(run: Callable[[], tuple[float, float]], error: float, **facts: Any) -> Job:
    """Make a job of a function that tells the seconds of what is not the column phase, and of the whole."""
    columns: list[float] = []

    def call() -> float:
        factor, whole = run()
        columns.append(round(whole - factor, 5))
        return whole

    return Job(calls=[call], error=error, allowed=0.02, own_clock=True, facts={"columns": columns, **facts})


def prepare(case: dict[str, Any]) -> Job:
    from qkern.ops import dequantize_groupwise
    from qkern.quantizers import GPTQConfig, columns, gptq

    weight, hessian = layer(case["N"], case["K"])
    if case["variant"] == "torch alone":
        return job(lambda: alone(weight, hessian), 0.0)
    config = GPTQConfig(act_order=case["order"], search=case["variant"].partition(" ")[2] or "loss")
    apart = {name: getattr(columns, name, None) for name in ("factorize", "energy")}
    if None in apart.values():
        raise Absent(f"qkern.quantizers.columns lacks one of {list(apart)}: say here what replaced it")
    state: dict[str, Any] = {}

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments)
            state["apart"] += time.perf_counter() - begin
            return result

        return call

    def quantize() -> tuple[float, float]:
        state["apart"] = 0.0
        for name, function in apart.items():
            setattr(columns, name, timed(function))
        begin = time.perf_counter()
        state["weight"] = gptq.quantize_gptq(weight, hessian, "w4g128", config).weight
        whole = time.perf_counter() - begin
        for name, function in apart.items():
            setattr(columns, name, function)
        return state["apart"], whole

    quantize()
    lost = layer_loss(weight, dequantize_groupwise(state["weight"]), hessian)
    return job(quantize, lost, tier=tier(), loss=float(f"{lost:.5g}"))


def main(arguments: list[str] | None = None) -> None:
    made = measure.parser(__doc__)
    made.add_argument(
        "--shapes", type=measure.shapes({}), default="3584x3584", help="NxK, separated by commas"
    )
    made.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=VARIANTS,
        help="which of these, beside GPTQModel; the records of the others are dropped",
    )
    made.add_argument(
        "--order", default="group-aware", choices=("group-aware", "desc_act"), help="of columns"
    )
    made.set_defaults(rounds=3, seconds=0.0)
    options = measure.parse(made, arguments)
    for N, K in options.shapes:
        shape = f"{N}x{K}"
        entries = [("bench_gptq", variant) for variant in options.variants]
        entries += [] if options.no_peers else [("peers.gptqmodel_gptq", "GPTQModel")]
        results = measure.race(
            [
                measure.Contestant(
                    name=variant,
                    module=module,
                    tier=options.tier if variant.startswith("qkern") else None,
                    case={"variant": variant, "order": options.order, "N": N, "K": K},
                )
                for module, variant in entries
            ],
            options,
        )
        group = {"shape": shape, "scheme": "w4g128", "order": options.order, "forced": options.tier}
        records = measure.records("gptq", results, options, **group)
        print(f"GPTQ {shape} w4g128, {options.order}, {options.threads} threads")
        for record in records:
            if "seconds" not in record:
                print(f"{record['contestant']:16}{record['absent']}")
                continue
            facts = record["facts"]
            columns = f"columns {statistics.median(facts['columns']):9.3f} s  loss {facts.get('loss', '-')}"
            print(f"{record['contestant']:16}{record['seconds']:9.3f} s  {columns}")
        measure.save(records, options)


if __name__ == "__main__":
    main()
