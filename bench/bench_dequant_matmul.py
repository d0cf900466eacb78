"""Speed of dequant_matmul beside other libraries' products and this machine's ceilings.

    python bench/bench_dequant_matmul.py [--set quick] [--threads 2] [--peers-python PYTHON]
    python bench/bench_dequant_matmul.py --shapes 18944x3584,small --schemes w4g128,nf4g64 --rows 1,8,512

All contestants of a shape and a scheme are measured in one interleaved run, each in a process of its own,
their weights rotated over --rotate MB so that they come from memory. GB/s counts the information of a weight,
N * K * (bits + 16 / group) / 8: padding is loss. ``of read`` and ``of peak`` hold it against the bandwidth
and the int8 (compute int8 and onnxruntime, ggml) or bf16 or fp32 peak measured in the same run.
--slabs compares compute float with and without torch's matmul on decoded slabs, which sets the thresholds in
python/qkern/ops/dequant_matmul/cpu.py.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
import tomllib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import measure
import roofline
from contestant import Job, copies, relative_error, sample_rows, time_job
from peers import information

if TYPE_CHECKING:
    from qkern.schemes import QuantizedWeight

PEERS = ("torch_dense", "torch_int4pack", "onnxruntime_nbits", "ggml", "bitsandbytes_nf4")
COMPUTES = ("int8 bf16", "float bf16", "float fp32", "int8 fp32", "int8 fp16", "float fp16")  # and dtype of x
# Which of the machine's products a contestant uses, by how its name starts.
PRODUCTS = {
    "qkern int8": "int8",
    "onnxruntime": "int8",
    "ggml": "int8",
    "torch int_mm": "int8",
    "torch fp32": "fp32",
}
# int8 activations in groups of 128; bf16 weights or activations and a bf16 result.
ALLOWED = {"int8": 1.5e-2, "float": 6e-3}


def VERSION() -> str:
    import qkern

    return f"qkern {qkern.__version__}"


def random_weight(N: int, K: int, spelling: str) -> QuantizedWeight:
    """Any codes do for timing; the scales keep the products finite."""
    import torch

    from qkern.schemes import QuantizedWeight, Scheme

    scheme, generator = Scheme.parse(spelling), torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (N, scheme.code_words(K)), generator=generator, dtype=torch.int32)
    shape = scheme.scale_shape(N, K)
    zeros = None
    if scheme.zero_point:
        zeros = torch.randint(0, scheme.levels, shape, generator=generator, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=generator) * 0.01 + 0.01).half()
    return QuantizedWeight(codes=words, scales=scales, shape=(N, K), scheme=scheme, zeros=zeros)


@functools.lru_cache(maxsize=1)
def handles(scheme: str, N: int, K: int, rotate: int) -> tuple[list[Any], Any]:
    """Make handles on copies of a packed weight, and decode the rows that are checked."""
    from qkern.ops import dequantize_groupwise, pack_weight
    from qkern.ops.dequant_matmul import LinearHandle

    qw = random_weight(N, K, scheme)
    rows, packed = sample_rows(N), pack_weight(qw, backend="cpu")
    zeros = None if qw.zeros is None else qw.zeros[rows]
    some = replace(qw, codes=qw.codes[rows], scales=qw.scales[rows], zeros=zeros, shape=(len(rows), K))
    decoded = dequantize_groupwise(some, backend="reference").double()
    count = copies(packed.blob.numel(), rotate)
    made = [LinearHandle(replace(packed, blob=packed.blob.clone())) for _ in range(count)]
    return made, decoded


def prepare(case: dict[str, Any]) -> Job:
    import torch

    from qkern.ops._native import core

    N, K, M, (_, compute, dtype) = case["N"], case["K"], case["M"], case["variant"].split()
    made, decoded = handles(case["scheme"], N, K, case["rotate"])
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1))
    x = x.to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    return Job(
        calls=[functools.partial(handle, x, None, compute) for handle in made],
        error=relative_error(made[0](x, None, compute)[:, sample_rows(N)], x.double() @ decoded.T),
        allowed=1e-5 if (compute, dtype) == ("float", "fp32") else ALLOWED[compute],
        bytes=information(case["scheme"], N, K),
        operations=2 * M * N * K,
        facts={"tier": core().active_tier()},
    )


def contestants(scheme: str, N: int, K: int, rows: list[int], options: Any) -> list[measure.Contestant]:
    """List qkern's variants and those of every peer that can hold such weights, for each M."""
    entries = [("bench_dequant_matmul", f"qkern {variant}") for variant in options.computes]
    for name in () if options.no_peers else PEERS:
        peer = importlib.import_module(f"peers.{name}")
        entries += [(f"peers.{name}", variant) for variant in peer.variants(scheme)]
    return [
        measure.Contestant(
            name=f"{variant}",
            module=module,
            tier=options.tier if module == "bench_dequant_matmul" else None,
            case={
                "variant": variant,
                "scheme": scheme,
                "N": N,
                "K": K,
                "M": M,
                "rotate": options.rotate << 20,
            },
        )
        for M in rows
        for module, variant in entries
    ]


def shares(record: dict[str, Any], ceilings: dict[str, list[float]]) -> tuple[float, float]:
    """Parts of the memory's bandwidth and of the peak of its product that a contestant reaches."""
    kind = next((kind for start, kind in PRODUCTS.items() if record["contestant"].startswith(start)), "bf16")
    if kind == "int8" and record.get("forced") == "avx2":
        kind = "int8 maddubs"
    peak = ceilings.get(kind) or ceilings.get("fp32", [])
    memory = ceilings.get("read") or ceilings.get("copy", [])  # on a GPU only copying is measured
    return roofline.part(record, "bytes", memory), roofline.part(record, "operations", peak)


def show(records: list[dict[str, Any]]) -> None:
    """Print a table: a line a contestant, milliseconds and the larger of its two shares for each M."""
    first, limits = records[0], roofline.ceilings(records)
    print(f"\n{first['shape']} {first['scheme']}, {first['threads']} threads; ", end="")
    print(f"{roofline.summary(records)} (GB/s and GOP/s)")
    records = [record for record in records if record["module"] != "roofline"]
    rows = sorted({record["case"]["M"] for record in records})
    found = {(record["contestant"], record["case"]["M"]): record for record in records}
    print(f"{'milliseconds':24}" + "".join(f"{f'M={M}':>17}" for M in rows))
    for name in dict.fromkeys(record["contestant"] for record in records):
        line = f"{name:24}"
        for M in rows:
            record = found[name, M]
            if "seconds" not in record:
                line += f"{'-':>17}"
                continue
            read, peak = shares(record, limits)
            limit = f"{100 * read:.0f}% r" if read >= peak else f"{100 * peak:.0f}% p"
            line += f"{1e3 * record['seconds']:10.3f}{limit:>7}"
        print(line)
    others = [record["others"] for record in records if "others" in record]
    if others:
        print("r: of the read bandwidth, p: of the product's peak; ", end="")
        print(f"others had {statistics.median(others):.2f} cores meanwhile")


def schemes(text: str) -> list[str]:
    """Type of an option that is schemes, separated by commas."""
    from qkern.errors import QkernError
    from qkern.schemes import Scheme

    try:
        return [str(Scheme.parse(part)) for part in text.split(",")]
    except QkernError as why:
        raise argparse.ArgumentTypeError(str(why)) from None


def computes(text: str) -> list[str]:
    """Type of an option that is some of `COMPUTES`, separated by commas."""
    if unknown := set(chosen := text.split(",")) - set(COMPUTES):
        raise argparse.ArgumentTypeError(f"allowed are {', '.join(COMPUTES)}: got {', '.join(unknown)}")
    return chosen


def compare_slabs(options: Any) -> None:
    import torch

    from qkern.ops.dequant_matmul import cpu

    N, K = options.shapes[0]
    torch.set_num_threads(options.threads)
    handle = handles(options.schemes[0], N, K, 0)[0][0]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for M in options.rows:
            x, medians = torch.randn(M, K).to(dtype), []
            for threshold in (1 << 60, 1):
                cpu.slab_rows = lambda _, threshold=threshold: threshold
                job = Job(calls=[functools.partial(handle, x, None, "float")])
                medians.append(
                    1e3 * statistics.median(time_job(job, options.seconds, measure.time.perf_counter))
                )
            print(f"{dtype!s:15} M {M:5}  kernel {medians[0]:8.2f} ms  slabs {medians[1]:8.2f} ms")


def main(arguments: list[str] | None = None) -> None:
    known = tomllib.loads((measure.BENCH / "shapes.toml").read_text())
    made = measure.parser(__doc__)
    made.add_argument("--set", default="quick", choices=known["sets"], help="named in bench/shapes.toml")
    types = {"shapes": measure.shapes(known["models"]), "schemes": schemes, "rows": measure.numbers}
    names = f"NxK or one of {', '.join(known['models'])}"
    for name, what in (("shapes", names), ("schemes", "such as w4g128"), ("rows", "of x")):
        made.add_argument(f"--{name}", type=types[name], help=f"{what}, separated by commas; else the set's")
    made.add_argument(
        "--computes", type=computes, default=",".join(COMPUTES[:3]), help=f"of {', '.join(COMPUTES)}"
    )
    made.add_argument("--slabs", action="store_true", help="compare compute float with and without slabs")
    options = measure.parse(made, arguments)
    for name, convert in types.items():
        if getattr(options, name) is None:
            setattr(options, name, convert(",".join(map(str, known["sets"][options.set][name]))))
    if options.slabs:
        compare_slabs(options)
        return
    wrong = False
    for N, K in options.shapes:
        for scheme in options.schemes:
            entries = contestants(scheme, N, K, options.rows, options)
            results = measure.race([*roofline.contestants(), *entries], options)
            group = {"shape": f"{N}x{K}", "scheme": scheme, "forced": options.tier}
            records = measure.records("dequant_matmul", results, options, **group)
            show(records)
            measure.save(records, options)
            wrong |= any(record.get("absent", "").startswith(measure.FAULTS) for record in records)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
