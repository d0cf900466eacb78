"""Time a token and resident bytes of a 7B-shaped MLP, bf16 against low-bit weights."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from qkern import _progress
from qkern.ops import pack_weight
from qkern.ops.dequant_matmul import LinearHandle
from qkern.schemes import PackedWeight, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["SpeedRow", "run_speed"]

HIDDEN: Final = 3584
INTERMEDIATE: Final = 18944  # Qwen2.5-7B
SCHEMES: Final = ("w8g128", "w4g128", "w3g128", "w2g128")
# Weights are rotated over more than this, so that no token finds its weights in a cache.
ROTATED_BYTES: Final = 512 << 20
ROUNDS: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """Median time of one token through gate, up and down projections."""

    weights: str
    ms_a_token: float
    speedup: float
    resident_bytes: int


def run_speed(hidden: int = HIDDEN, intermediate: int = INTERMEDIATE, rounds: int = ROUNDS) -> list[SpeedRow]:
    """Measure every scheme and bf16 in one interleaved run.

    Parameters
    ----------
    hidden, intermediate : int
        Shape of the MLP.
    rounds : int
        Measurements of each; the median is reported.

    Returns
    -------
    list of SpeedRow
        bf16 first; `speedup` is against it.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, hidden, generator=generator)
    contenders = {"bf16": _dense(x.bfloat16(), intermediate, generator)}
    with _progress.task("Packing", total=len(SCHEMES), unit="scheme") as progress:
        for name in SCHEMES:
            contenders[name] = _quantized(x, Scheme.parse(name), intermediate, generator)
            progress.advance(note=name)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.inference_mode(), _progress.task("Timing", total=rounds, unit="round") as progress:
        for number in range(-1, rounds):  # the first round warms up
            for name, (token, copies, _) in contenders.items():
                started = time.perf_counter()
                for copy in range(copies):
                    token(copy)
                if number >= 0:
                    times[name].append((time.perf_counter() - started) / copies * 1e3)
            if number >= 0:
                progress.advance()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        SpeedRow(
            weights=name,
            ms_a_token=medians[name],
            speedup=medians["bf16"] / medians[name],
            resident_bytes=resident,
        )
        for name, (_, _, resident) in contenders.items()
    ]


def _copies(resident: int) -> int:
    return -(-ROTATED_BYTES // resident) + 1


def _dense(
    x: Tensor, intermediate: int, generator: torch.Generator
) -> tuple[Callable[[int], Tensor], int, int]:
    hidden = x.shape[-1]
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    weights = [torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for shape in shapes]
    resident = sum(weight.nbytes for weight in weights)
    rotated = [[weight.clone() for weight in weights] for _ in range(_copies(resident))]

    def token(copy: int) -> Tensor:
        gate, up, down = rotated[copy]
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    return token, len(rotated), resident


def _quantized(
    x: Tensor, scheme: Scheme, intermediate: int, generator: torch.Generator
) -> tuple[Callable[[int], Tensor], int, int]:
    hidden = x.shape[-1]
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    packed = [pack_weight(_random_weight(N, K, scheme, generator)) for N, K in shapes]
    resident = sum(weight.blob.nbytes for weight in packed)
    rotated = [[LinearHandle(_clone(weight)) for weight in packed] for _ in range(_copies(resident))]

    def token(copy: int) -> Tensor:
        gate, up, down = rotated[copy]
        return down(F.silu(gate(x, None, "int8")) * up(x, None, "int8"), None, "int8")

    return token, len(rotated), resident


def _random_weight(N: int, K: int, scheme: Scheme, generator: torch.Generator) -> QuantizedWeight:
    words = (N, scheme.code_words(K))
    codes = torch.randint(-(2**31), 2**31, words, generator=generator, dtype=torch.int64).to(torch.int32)
    scales = torch.full(scheme.scale_shape(N, K), 0.02 / scheme.midpoint, dtype=torch.float16)
    return QuantizedWeight(codes=codes, scales=scales, shape=(N, K), scheme=scheme)


def _clone(weight: PackedWeight) -> PackedWeight:
    return PackedWeight(
        blob=weight.blob.clone(), layout=weight.layout, N=weight.N, K=weight.K, scheme=weight.scheme
    )
