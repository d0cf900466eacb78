"""Speed of pack_bits and unpack_bits, as bytes of codes and words a second, into fresh outputs.

python bench/bench_pack_bits.py [--rows 4096] [--columns 4096] [--threads 1] [--tier avx512]
"""

from __future__ import annotations

import torch

import measure
from qkern.ops import pack_bits, unpack_bits


def rows(N, K):
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8)
        for layout in ("dense", "gptq", "words", "awq"):
            if layout == "awq" and bits != 4:
                continue
            packed = pack_bits(codes, bits, layout=layout)
            moved, options = codes.nbytes + packed.nbytes, {"layout": layout, "backend": "cpu"}
            yield f"pack {bits} {layout}", moved, lambda c=codes, b=bits, o=options: pack_bits(c, b, **o)
            yield (
                f"unpack {bits} {layout}",
                moved,
                lambda p=packed, b=bits, o=options: unpack_bits(p, b, (N, K), **o),
            )


if __name__ == "__main__":
    measure.run(__doc__, rows)
