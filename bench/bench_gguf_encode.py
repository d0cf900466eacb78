"""Speed and loss of the GGUF encoders, beside ggml's own: bytes of fp32 input a second.

python bench/bench_gguf_encode.py [--shape 256x4096] [--cases q4_k] [--threads 1] [--tier avx512]

`loss` is the squared error over the squared weights, weighted where the case says ``imatrix``; `worst` is the
largest ratio of qkern's to ggml's in a run of 256 weights, where llama-cpp-python is in qkern's environment.
"""

from __future__ import annotations

from typing import Any

import table
from contestant import Job
from table import VERSION

__all__ = ["VERSION", "prepare"]

TYPES = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
)
CASES = [*TYPES, *(f"{name} imatrix" for name in TYPES if name != "q8_0")]
# Relative squared errors that no sound encoder of so many bits exceeds on normal weights.
ALLOWED = {"q2": 0.1, "q3": 0.03, "q4": 0.01, "q5": 0.003, "q6": 1e-3, "q8": 1e-4, "iq4": 0.01}


def weights(case: dict[str, Any]) -> tuple[Any, Any, str]:
    """``[N, K]`` weights, their importance or None, and the name of the type."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case["N"], case["K"], generator=generator) * 0.02
    name, _, weighted = case["variant"].partition(" ")
    importance = torch.randn(case["K"], generator=generator).square() + 0.01 if weighted else None
    return x, importance, name


def loss(x: Any, decoded: Any, importance: Any) -> float:
    each = 1.0 if importance is None else importance.double()
    return float(((decoded.double() - x) ** 2 * each).sum() / (x.double() ** 2 * each).sum())


def prepare(case: dict[str, Any]) -> Job:
    from qkern.ops import gguf_decode, gguf_encode

    x, importance, name = weights(case)
    decoded = gguf_decode(gguf_encode(x, name, importance=importance), name)
    lost = loss(x, decoded, importance)
    facts = {"tier": table.tier(), "loss": float(f"{lost:.6g}")}
    try:
        from peers import ggml

        theirs = ggml.encoded(x, importance, name)[0]
    except ImportError:
        pass
    else:
        scale = 1.0 if importance is None else importance
        ours, theirs = (((y - x).square() * scale).reshape(-1, 256).sum(1) for y in (decoded, theirs))
        facts["worst"] = round(float((ours / theirs).max()), 3)
    return Job(
        calls=[lambda: gguf_encode(x, name, importance=importance)],
        error=lost,
        allowed=ALLOWED[name.split("_")[0]],
        bytes=x.nbytes,
        facts=facts,
    )


if __name__ == "__main__":
    table.main(__doc__, __file__, CASES, peers=("peers.ggml",), N=256)
