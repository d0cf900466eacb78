"""bitsandbytes' 4-bit linear on the CPU, as its users call it: `Linear4bit` in evaluation, bf16."""

from __future__ import annotations

import functools
from typing import Any

from contestant import Absent, Job, copies, relative_error, sample_rows
from peers import information

INSTALL = "pip install bitsandbytes"


def VERSION() -> str:
    import bitsandbytes

    return f"bitsandbytes {bitsandbytes.__version__}"


def variants(scheme: str) -> list[str]:
    return [f"bitsandbytes {scheme[:3]}"] if scheme.startswith(("nf4", "fp4")) else []


@functools.lru_cache(maxsize=1)
def layers(kind: str, group: int, N: int, K: int, rotate: int) -> tuple[list[Any], Any]:
    """Make layers, and decode the rows that are checked."""
    import torch
    from bitsandbytes import nn

    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    made, decoded = [], None
    for _ in range(copies(N * K // 2, rotate)):
        layer = nn.Linear4bit(K, N, bias=False, compute_dtype=torch.bfloat16, quant_type=kind)
        options = {"quant_type": kind, "blocksize": group, "compress_statistics": False}
        layer.weight = nn.Params4bit(weight, requires_grad=False, **options)
        layer = layer.to("cpu").eval()
        if decoded is None:  # before the first call, which may rewrite the weight for its kernel
            decoded = decode(layer.weight, N, K, group)[sample_rows(N)]
        made.append(layer)
    return made, decoded


def decode(packed: Any, N: int, K: int, group: int) -> Any:
    """Weights of a `Params4bit` by its own table: the first of two codes lies in the high nibble."""
    import torch

    state = packed.quant_state
    data = packed.data.reshape(-1).view(torch.uint8)
    codes = torch.stack((data >> 4, data & 15), dim=1).reshape(-1, group).long()
    values = state.code.double()[codes] * state.absmax.double()[:, None]
    return values.reshape(N, K)


def prepare(case: dict[str, Any]) -> Job:
    import torch

    N, K, M, scheme = case["N"], case["K"], case["M"], case["scheme"]
    _, _, group = scheme.partition("g")
    if not group.isdigit() or N * K % int(group):
        raise Absent("has groups that divide the weight, and here plain scales")
    made, decoded = layers(scheme[:3], int(group), N, K, case["rotate"])
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    return Job(
        calls=[functools.partial(layer, x) for layer in made],
        error=relative_error(made[0](x)[:, sample_rows(N)], x.double() @ decoded.T),
        allowed=2e-2,
        bytes=information(scheme, N, K),
        operations=2 * M * N * K,
    )
