"""Speed of the GGUF decoders, beside the gguf package's: bytes of fp32 output a second.

python bench/bench_gguf_decode.py [--shape 256x4096] [--cases q4_k] [--threads 1] [--tier avx512]
"""

from __future__ import annotations

from typing import Any

import table
from bench_gguf_encode import TYPES
from contestant import Job, relative_error
from table import VERSION

__all__ = ["VERSION", "prepare"]

CASES = [f"{name} {package}" for name in ("f16", *TYPES, "bf16") for package in ("qkern", "gguf")]


def prepare(case: dict[str, Any]) -> Job:
    import torch

    from gguf import GGMLQuantizationType, quants
    from qkern.ops import gguf_decode, gguf_encode
    from qkern.ops.gguf_types import GGUF_TYPES

    name, package = case["variant"].split()
    x = torch.randn(case["N"], case["K"], generator=torch.Generator().manual_seed(0))
    raw = gguf_encode(x, name)
    bytes_, kind = raw.numpy(), GGMLQuantizationType(GGUF_TYPES[name].id)
    calls = {"qkern": lambda: gguf_decode(raw, name), "gguf": lambda: quants.dequantize(bytes_, kind)}
    return Job(
        calls=[calls[package]],
        error=relative_error(gguf_decode(raw, name), torch.from_numpy(quants.dequantize(bytes_, kind))),
        allowed=1e-6,
        bytes=x.nbytes,
        facts={"tier": table.tier()} if package == "qkern" else {},
    )


if __name__ == "__main__":
    table.main(__doc__, __file__, CASES, N=256)
