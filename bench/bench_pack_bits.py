"""Speed of pack_bits and unpack_bits, as bytes of codes and words a second, into fresh outputs.

python bench/bench_pack_bits.py [--shape 4096x4096] [--cases unpack,dense] [--threads 1] [--tier avx512]
"""

from __future__ import annotations

from typing import Any

import table
from contestant import Job
from table import VERSION

__all__ = ["VERSION", "prepare"]

CASES = [
    f"{verb} {bits} {layout}"
    for bits in (2, 3, 4, 8)
    for layout in ("dense", "gptq", "words", "awq")
    for verb in ("pack", "unpack")
    if layout != "awq" or bits == 4
]


def prepare(case: dict[str, Any]) -> Job:
    import torch

    from qkern.ops import pack_bits, unpack_bits

    verb, spelled, layout = case["variant"].split()
    bits, shape = int(spelled), (case["N"], case["K"])
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack_bits(codes, bits, layout=layout, backend="cpu")
    back = unpack_bits(packed, bits, shape, layout=layout, backend="cpu")
    few = pack_bits(codes[:64], bits, layout=layout, backend="reference")
    same = pack_bits(codes[:64], bits, layout=layout, backend="cpu")
    calls = {
        "pack": lambda: pack_bits(codes, bits, layout=layout, backend="cpu"),
        "unpack": lambda: unpack_bits(packed, bits, shape, layout=layout, backend="cpu"),
    }
    return Job(
        calls=[calls[verb]],
        error=table.differing((back, same), (codes, few)),
        bytes=codes.nbytes + packed.nbytes,
        facts={"tier": table.tier()},
    )


if __name__ == "__main__":
    table.main(__doc__, __file__, CASES)
