"""dequant_matmul on a GPU beside torch's linear and other libraries: interleaved, by graph replay.

    python bench/bench_gpu.py [--shapes 28672x4096,...] [--schemes w4g128,...] [--rows 1,8,64] [--seconds 400]

Each contestant gets copies of its weight, at least eight and 256 MB of them, and one CUDA graph that goes
through all of them, so that no weight is in the L2 cache when its turn comes. Times are medians over replays,
contestants in turns. Every result is checked against float64 before it is timed. The ceiling is a
device-to-device copy of 1 GiB in the same run, counted as bytes read plus bytes written; the percentage is
the weight's own bytes (codes, scales, zero points) at that rate over the time measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = "28672x4096,8192x28672,8192x8192,4096x14336,4096x4096"
SCHEMES = "w4g128,w4g128z,w8,w3g128,w2g64,nf4g64"
ROWS = "1,2,4,8,16,64,512,2048"
ROTATED_BYTES = 256 << 20
COPIES = 8
REPLAYS = 15


def events(run: Callable[[], None]) -> float:
    """Seconds of one run on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def copy_rate() -> float:
    """Bytes a second of a copy, read plus written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    seconds = [events(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * source.numel() / statistics.median(seconds[2:])


class OtherScheme(Exception):
    """A library does not have this scheme or dtype: no news."""


class Contestant:
    """One way to compute ``x @ W.T``: `calls[i]` uses copy i of its weight and the i-th input."""

    def __init__(self, name: str, calls: list[Callable[[], torch.Tensor]], nbytes: int) -> None:
        self.name, self.calls, self.nbytes = name, calls, nbytes
        self.seconds: list[float] = []
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()
        self.graph.replay()

    def measure(self) -> None:
        """Replay the graph once more."""
        self.seconds.append(events(self.graph.replay) / len(self.calls))


def copies_for(nbytes: int) -> int:
    return max(COPIES, -(-ROTATED_BYTES // nbytes))


def contestants(
    N: int, K: int, M: int, spelling: str, dtype: torch.dtype
) -> tuple[list[Contestant], list[str]]:
    """Those that are here, their results checked, and why the others are not."""
    from qkern.ops import dequant_matmul, dequantize_groupwise, pack_weight, quantize_groupwise
    from qkern.schemes import PackedWeight

    generator = torch.Generator(device="cuda").manual_seed(N + K)
    weight = torch.randn(N, K, device="cuda", generator=generator) * 0.02
    x = torch.randn(M, K, device="cuda", generator=generator).to(dtype)
    quantized = quantize_groupwise(weight, spelling)
    decoded = dequantize_groupwise(quantized)
    exact = x.double() @ decoded.double().T
    dense = decoded.to(dtype)
    found, absent = [], []

    def add(
        name: str, make: Callable[[int], list[Callable[[], torch.Tensor]]], nbytes: int, allowed: float
    ) -> None:
        try:
            calls = make(copies_for(nbytes))
            error = float((calls[0]().double() - exact).norm() / exact.norm())
            if not error <= allowed:
                absent.append(f"{name}: wrong result, error {error:.2e} of at most {allowed:.2e}")
                return
            found.append(Contestant(name, calls, nbytes))
        except OtherScheme:
            return
        except Exception as problem:  # a peer may fail in any way; that is a line in the report
            absent.append(f"{name}: {type(problem).__name__}: {str(problem).splitlines()[0][:120]}")

    error = float((torch.nn.functional.linear(x, dense).double() - exact).norm() / exact.norm())
    bits = quantized.stored_bits // 8

    def ours(backend: str) -> Callable[[int], list[Callable[[], torch.Tensor]]]:
        def make(count: int) -> list[Callable[[], torch.Tensor]]:
            packed = pack_weight(quantized, backend=backend)

            def one() -> Callable[[], torch.Tensor]:
                own = PackedWeight(
                    blob=packed.blob.clone(), layout=packed.layout, N=N, K=K, scheme=packed.scheme
                )
                return lambda: dequant_matmul(x, own, compute="float")

            return [one() for _ in range(count)]

        return make

    def linear(count: int) -> list[Callable[[], torch.Tensor]]:
        def one() -> Callable[[], torch.Tensor]:
            own = dense.clone()
            return lambda: torch.nn.functional.linear(x, own)

        return [one() for _ in range(count)]

    def int4pack(count: int) -> list[Callable[[], torch.Tensor]]:
        from qkern.ops import unpack_bits

        if spelling != "w4g128" or dtype != torch.bfloat16:
            raise OtherScheme
        codes = unpack_bits(quantized.codes, 4, (N, K))
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8)
        scales = quantized.scales.to(dtype)
        both = torch.stack([scales, torch.zeros_like(scales)], -1).permute(1, 0, 2).contiguous()

        def one() -> Callable[[], torch.Tensor]:
            own = packed.clone()
            return lambda: torch.ops.aten._weight_int4pack_mm(x, own, 128, both)

        return [one() for _ in range(count)]

    def bitsandbytes(count: int) -> list[Callable[[], torch.Tensor]]:
        import bitsandbytes.functional as bnb

        if spelling != "nf4g64":
            raise OtherScheme

        def one() -> Callable[[], torch.Tensor]:
            own, state = bnb.quantize_4bit(weight.to(dtype), blocksize=64, quant_type="nf4")
            import bitsandbytes

            return lambda: bitsandbytes.matmul_4bit(x, own.t(), state)

        return [one() for _ in range(count)]

    add("qkern cuda", ours("cuda"), bits, 2 * error)
    add("qkern triton", ours("triton"), bits, 2 * error)
    add(f"torch {str(dtype).removeprefix('torch.')}", linear, 2 * N * K, 2 * error)
    add("torch int4pack", int4pack, bits, 8 * error)
    add("bitsandbytes", bitsandbytes, bits, 0.2)
    return found, absent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=480.0, help="stop, and say so, when they are over")
    parser.add_argument("--output", type=Path, default=Path("bench/results/gpu/dequant_matmul.jsonl"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "bench_gpu.py needs a CUDA device: torch sees none\n")
    begin, dtype = time.monotonic(), getattr(torch, options.dtype)
    rate = copy_rate()
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}, copy {rate / 1e12:.2f} TB/s, {options.dtype}")
    records: list[dict[str, Any]] = []
    cases = [
        (scheme, shape, int(rows))
        for scheme in options.schemes.split(",")
        for shape in options.shapes.split(",")
        for rows in options.rows.split(",")
        if scheme == "w4g128" or int(rows) in (1, 8)
    ]
    for done, (scheme, shape, M) in enumerate(cases):
        if time.monotonic() - begin > options.seconds:
            print(f"stopped after {done} of {len(cases)} cases: time is over")
            break
        N, K = map(int, shape.split("x"))
        found, absent = contestants(N, K, M, scheme, dtype)
        for _ in range(REPLAYS):
            for contestant in found:
                contestant.measure()
        line = [f"{scheme:8} {shape:12} M={M:<5}"]
        for contestant in found:
            seconds = statistics.median(contestant.seconds)
            share = contestant.nbytes / rate / seconds
            line.append(f"{contestant.name} {seconds * 1e6:.1f} us {share:.0%}")
            records.append(
                {
                    "op": "dequant_matmul",
                    "gpu": gpu,
                    "torch": torch.__version__,
                    "dtype": options.dtype,
                    "copy_rate": rate,
                    "scheme": scheme,
                    "shape": shape,
                    "M": M,
                    "contestant": contestant.name,
                    "seconds": seconds,
                    "of_copy": share,
                    "spread": statistics.pstdev(contestant.seconds) / seconds,
                }
            )
        print("  ".join(line))
        for reason in absent:
            print(f"    absent: {reason}")
        del found
        torch.cuda.empty_cache()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{len(records)} records written to {options.output}")


if __name__ == "__main__":
    main()
