"""Speed of int8_matmul beside torch's products and this machine's ceilings.

    python bench/bench_int8_matmul.py [--shapes 18944x3584,small] [--rows 1,128,512] [--threads 2]

``codes`` is the op on int8 activations with a scale a token, ``linear`` a w8a8 layer on bf16 activations that
it quantizes in the same call, ``static`` the codes with a zero point. Everything else is as in
bench_dequant_matmul.py: one interleaved run a shape, weights rotated over --rotate MB, results checked first.
"""

from __future__ import annotations

import functools
import importlib
import sys
import tomllib
from typing import Any

import measure
import roofline
from bench_dequant_matmul import handles, show
from contestant import Job, relative_error, sample_rows
from peers import information
from table import VERSION

__all__ = ["VERSION", "prepare"]

VARIANTS = ("qkern int8 codes", "qkern int8 linear", "qkern int8 static")
PEERS = ("torch_dense", "torch_int_mm")
SCHEME = "w8a8"


def prepare(case: dict[str, Any]) -> Job:
    import torch

    from qkern.ops import int8_matmul, quantize_activations
    from qkern.ops._native import core
    from qkern.schemes import PackedWeight, Scheme

    N, K, M = case["N"], case["K"], case["M"]
    made, decoded = handles(SCHEME, N, K, case["rotate"])
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    facts = {"tier": core().active_tier()}
    work = {"bytes": information("w8", N, K), "operations": 2 * M * N * K, "facts": facts}
    if case["variant"] == "qkern int8 linear":
        calls = [functools.partial(handle, x) for handle in made]
        truth = x.double() @ decoded.T
        return Job(
            calls=calls, error=relative_error(calls[0]()[:, sample_rows(N)], truth), allowed=1.5e-2, **work
        )
    zero = 5 if case["variant"] == "qkern int8 static" else None
    if zero is None:
        codes, scales = quantize_activations(x)
    else:
        codes, scales = quantize_activations(x, scale=0.04, zero=zero)
    packed = [
        PackedWeight(blob=handle._blob, layout="cpu.k4x16", N=N, K=K, scheme=Scheme.parse(SCHEME))
        for handle in made
    ]
    calls = [
        functools.partial(int8_matmul, codes, scales, weight, out_dtype=torch.bfloat16, x_zero=zero)
        for weight in packed
    ]
    truth = (codes.double() - (zero or 0)) * scales.double() @ decoded.T
    # The result's rounding to bf16 alone.
    return Job(calls=calls, error=relative_error(calls[0]()[:, sample_rows(N)], truth), allowed=3e-3, **work)


def main(arguments: list[str] | None = None) -> None:
    known = tomllib.loads((measure.BENCH / "shapes.toml").read_text())
    made = measure.parser(__doc__)
    made.add_argument(
        "--shapes",
        type=measure.shapes(known["models"]),
        default="3584x3584",
        help=f"NxK or one of {', '.join(known['models'])}, separated by commas",
    )
    made.add_argument("--rows", type=measure.numbers, default="1,8,128,512", help="of x, separated by commas")
    options = measure.parse(made, arguments)
    peers = () if options.no_peers else PEERS
    named = [("bench_int8_matmul", variant) for variant in VARIANTS]
    for name in peers:
        named += [
            (f"peers.{name}", variant) for variant in importlib.import_module(f"peers.{name}").variants("w8")
        ]
    wrong = False
    for N, K in options.shapes:
        entries = [
            measure.Contestant(
                name=variant,
                module=module,
                tier=options.tier if module == "bench_int8_matmul" else None,
                case={
                    "variant": variant,
                    "scheme": SCHEME,
                    "N": N,
                    "K": K,
                    "M": M,
                    "rotate": options.rotate << 20,
                },
            )
            for M in options.rows
            for module, variant in named
        ]
        results = measure.race([*roofline.contestants(), *entries], options)
        group = {"shape": f"{N}x{K}", "scheme": SCHEME, "forced": options.tier}
        records = measure.records("int8_matmul", results, options, **group)
        show(records)
        measure.save(records, options)
        wrong |= any(record.get("absent", "").startswith(measure.FAULTS) for record in records)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
