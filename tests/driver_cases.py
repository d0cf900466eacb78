"""Runs the native kernels without Python on the other side, and compares with the Python references.

``python tests/driver_cases.py [EMULATOR ARGUMENTS...] DRIVER`` runs every case on every tier that the driver
(tests/cpp/driver.cpp) can run; tests/neon.sh does so for Arm. To add an op: write a generator of `Case` here,
add it to `GENERATORS`, and give the driver a run_<op>.
"""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qkern.ops import (
    dequant_matmul,
    dequantize_groupwise,
    gguf_decode,
    gguf_encode,
    gptq_update,
    int8_matmul,
    pack_bits,
    pack_weight,
    quantize_activations,
    quantize_groupwise,
)
from qkern.ops._native import DTYPE_CODES
from qkern.ops.codebooks import CODEBOOK_CODES
from qkern.ops.gguf_types import GGUF_TYPES
from qkern.ops.pack_bits.cpu import LAYOUT_CODES
from qkern.schemes import FLOAT_DTYPES, PackedWeight, QuantizedWeight, Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Case:
    """One call of a kernel: numbers, input buffers, and the outputs that are expected, bit for bit.

    With a `tolerance`, floats may differ by that part of the largest. A `status` of None accepts any.
    """

    op: str
    numbers: dict[str, int]
    inputs: dict[str, torch.Tensor | None]
    expected: dict[str, torch.Tensor | None]
    status: int | None = 0
    label: str = field(default="")
    tolerance: float = 0.0

    def encode(self) -> bytes:
        """Bytes of the case file."""

        def block(data: bytes) -> bytes:
            return struct.pack("<Q", len(data)) + data

        numbers = b"".join(
            block(name.encode()) + struct.pack("<q", value) for name, value in self.numbers.items()
        )
        buffers = [(name, 0, raw(tensor)) for name, tensor in self.inputs.items() if tensor is not None]
        # 0xee: an output that the kernel does not write is seen.
        outputs = [(name, 1, b"\xee" * len(raw(t))) for name, t in self.expected.items() if t is not None]
        body = b"".join(
            block(name.encode()) + bytes([is_output]) + block(data)
            for name, is_output, data in buffers + outputs
        )
        return (
            block(self.op.encode())
            + struct.pack("<Q", len(self.numbers))
            + numbers
            + struct.pack("<Q", len(buffers) + len(outputs))
            + body
        )


def raw(tensor: torch.Tensor) -> bytes:
    """Bytes of a tensor, row by row."""
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type
        tensor = tensor.view(torch.int16)
    return tensor.numpy().tobytes()


SHAPES = [(1, 1), (3, 17), (5, 64), (9, 300), (2, 513)]
SCHEMES = ["w2g16", "w3g32z", "w4g128", "w4g48z", "w8", "w8g64z", "nf4g64", "fp4g40"]


def random_weight(N: int, K: int, dtype: torch.dtype) -> torch.Tensor:
    """The same numbers every time; one outlier, one zero group."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(100 * N + K))
    weight[0, K // 2] *= 50
    weight[N - 1, : K // 3] = 0
    return weight.to(dtype)


def grid_numbers(scheme: Scheme, N: int, K: int) -> dict[str, int]:
    """Numbers that quantization and dequantization share."""
    return {
        "N": N,
        "K": K,
        "group_size": scheme.group_length(K),
        "groups": scheme.num_groups(K),
        "bits": scheme.bits,
        "codebook": CODEBOOK_CODES[scheme.codebook],
    }


def quantize_cases() -> Iterator[Case]:
    for spelling in SCHEMES:
        scheme = Scheme.parse(spelling)
        for i, (N, K) in enumerate(SHAPES):
            dtype, scale_dtype = FLOAT_DTYPES[i % 3], FLOAT_DTYPES[(i + 1) % 3]
            weight = random_weight(N, K, dtype)
            importance = torch.rand(N, K, generator=torch.Generator().manual_seed(K)) if i % 2 else None
            for search in ("minmax", "mse"):
                weights = importance if search == "mse" else None
                qw = quantize_groupwise(
                    weight,
                    scheme,
                    importance=weights,
                    search=search,
                    scale_dtype=scale_dtype,
                    backend="reference",
                )
                numbers = {
                    **grid_numbers(scheme, N, K),
                    "dtype": DTYPE_CODES[dtype],
                    "asymmetric": int(scheme.zero_point),
                    "search_mse": int(search == "mse"),
                    "scale_dtype": DTYPE_CODES[scale_dtype],
                }
                yield Case(
                    "quantize_groupwise",
                    numbers,
                    {"weight": weight, "importance": weights},
                    {"scales": qw.scales, "zeros": qw.zeros, "codes": qw.codes},
                    label=f"{spelling} {search} {N}x{K}",
                )


def dequantize_cases() -> Iterator[Case]:
    for spelling in SCHEMES:
        for i, (N, K) in enumerate(SHAPES):
            scale_dtype = FLOAT_DTYPES[(i + 1) % 3]
            qw = quantize_groupwise(random_weight(N, K, torch.float32), spelling, scale_dtype=scale_dtype)
            for variant in ("plain", "offsets", "act-order"):
                weight = dequantize_variant(qw, variant)
                if weight is None:
                    continue
                for dtype in FLOAT_DTYPES:
                    numbers = {
                        **grid_numbers(qw.scheme, N, K),
                        "scale_dtype": DTYPE_CODES[scale_dtype],
                        "out_dtype": DTYPE_CODES[dtype],
                    }
                    inputs = {
                        "codes": weight.codes,
                        "scales": weight.scales,
                        "zeros": weight.zeros,
                        "offsets": weight.offsets,
                        "group_index": weight.group_index,
                    }
                    out = dequantize_groupwise(weight, dtype, backend="reference")
                    label = f"{spelling} {variant} {N}x{K} {dtype}"
                    yield Case("dequantize_groupwise", numbers, inputs, {"out": out}, label=label)


def dequantize_variant(qw: QuantizedWeight, variant: str) -> QuantizedWeight | None:
    """The weight with offsets for zeros, or with a group index; None if its scheme has no such form."""
    parts = {
        "codes": qw.codes,
        "scales": qw.scales,
        "zeros": qw.zeros,
        "shape": qw.shape,
        "scheme": qw.scheme,
    }
    generator = torch.Generator().manual_seed(7)
    if variant == "offsets":
        if not qw.scheme.zero_point:
            return None
        parts["offsets"] = torch.randn(qw.scales.shape, generator=generator).to(qw.scales.dtype)
        parts["zeros"] = None
    if variant == "act-order":
        if qw.scheme.group_size is None:
            return None
        groups = qw.scales.shape[1]
        parts["group_index"] = torch.randint(0, groups, (qw.K,), dtype=torch.int32, generator=generator)
    return QuantizedWeight(**parts)


def bits_cases() -> Iterator[Case]:
    for bits in (2, 3, 4, 8):
        for layout in LAYOUT_CODES:
            if layout == "awq" and bits != 4:
                continue
            for N, K in ((8, 1), (16, 33), (24, 100), (136, 70), (8, 1029)):
                generator = torch.Generator().manual_seed(N + K)
                codes = torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=generator)
                packed = pack_bits(codes, bits, layout=layout, backend="reference")
                numbers = {"N": N, "K": K, "bits": bits, "layout": LAYOUT_CODES[layout]}
                label = f"{bits} bits {layout} {N}x{K}"
                yield Case("pack_bits", numbers, {"codes": codes}, {"packed": packed}, label=label)
                yield Case("unpack_bits", numbers, {"packed": packed}, {"codes": codes}, label=label)


def gptq_cases() -> Iterator[Case]:
    for name in (None, "nf4", "fp4"):
        for N, B in ((1, 1), (17, 15), (16, 32), (33, 100), (20, 333)):
            generator = torch.Generator().manual_seed(N + B)
            weight = torch.randn(N, B, generator=generator)
            hinv = (0.1 * torch.randn(B, B, generator=generator)).triu(1) + torch.eye(B)
            scales = torch.rand(N, 3, generator=generator) + 0.2
            zeros = None if name else torch.randint(0, 16, (N, 3), dtype=torch.uint8, generator=generator)
            group_index = torch.randint(0, 3, (B,), dtype=torch.int32, generator=generator)
            codes, errors = gptq_update(
                weight, hinv, scales, zeros, group_index, bits=4, codebook=name, backend="reference"
            )
            yield Case(
                "gptq_update",
                {"N": N, "B": B, "groups": 3, "bits": 4, "codebook": CODEBOOK_CODES[name]},
                {
                    "weight": weight,
                    "hinv": hinv,
                    "scales": scales,
                    "zeros": zeros,
                    "group_index": group_index,
                },
                {"codes": codes, "errors": errors},
                label=f"{name or 'integer'} {N}x{B}",
            )


def activation_cases() -> Iterator[Case]:
    for i, (M, K) in enumerate(SHAPES):
        for group_size in (7, 128):
            dtype = FLOAT_DTYPES[i % 3]
            x = random_weight(M, K, dtype)
            codes, scales = quantize_activations(x, group_size=group_size, backend="reference")
            numbers = {"M": M, "K": K, "group_size": group_size, "dtype": DTYPE_CODES[dtype]}
            outputs = {"codes": codes, "scales": scales}
            yield Case("quantize_activations", numbers, {"x": x}, outputs, label=f"{M}x{K} {dtype}")
        codes, scales = quantize_activations(x, scale=0.01, zero=-7, backend="reference")
        numbers = {"M": M, "K": K, "group_size": K, "dtype": DTYPE_CODES[dtype], "zero": -7}
        yield Case(
            "quantize_activations",
            numbers,
            {"x": x, "scale": torch.tensor([0.01])},
            {"codes": codes, "scales": scales},
            label=f"static {M}x{K} {dtype}",
        )


# Forms of activations as the driver numbers them, see qk::PrepareArgs. A tier without bf16 pairs or int8
# digits takes floats in their place.
FORMS = {"int8": 0, "floats": 1, "pairs": 2, "digits": 3}
DIGIT_ROWS = 24  # qk::kDigitRows


def matmul_cases() -> Iterator[Case]:
    # Panels of 16, 32, 48 and 64 rows; few rows of x, more than the direct kernels take, more than a tile.
    for i, (spelling, (N, K)) in enumerate(itertools.product(SCHEMES, [(5, 33), (120, 300), (64, 256)])):
        dense = random_weight(N, K, torch.float32)
        qw = quantize_groupwise(dense, spelling, scale_dtype=FLOAT_DTYPES[i % 3])
        rows = {"plain": (3, 41), "offsets": (14, 20), "act-order": (140 if K == 33 else 1,)}
        for variant in rows:
            weight = dequantize_variant(qw, variant)
            if weight is None:
                continue
            packed = pack_weight(weight, backend="cpu")
            decoded = torch.zeros(K, -(-N // 16) * 16)
            decoded[:, :N] = dequantize_groupwise(weight, backend="reference").T
            for M in rows[variant]:
                label = f"{spelling} {variant} {M}x{N}x{K}"
                yield from matmul_forms(weight, packed, M, decoded, label)


def matmul_forms(
    weight: QuantizedWeight, packed: PackedWeight, M: int, decoded: torch.Tensor, label: str
) -> Iterator[Case]:
    """One product in every form that the bindings might choose."""
    codebook = weight.scheme.codebook is not None
    for dtype, form in itertools.product(FLOAT_DTYPES, FORMS):
        if (form == "pairs" and dtype != torch.bfloat16) or (
            form == "digits" and (codebook or M > DIGIT_ROWS)
        ):
            continue
        compute = "int8" if form == "int8" else "float"
        x = random_weight(M, weight.K, dtype)
        bias = torch.arange(weight.N, dtype=torch.float32) / weight.N
        expected = dequant_matmul(x, weight, bias, compute=compute, backend="reference")
        yield Case(
            "dequant_matmul",
            {**blob_numbers(packed), "M": M, "dtype": DTYPE_CODES[dtype], "form": FORMS[form]},
            {"blob": packed.blob, "x": x, "bias": bias},
            {"out": expected, "decoded": decoded},
            label=f"{label} {form} {dtype}",
            # The output's rounding; in fp32 the order of sums, or a codebook's 16 bits.
            tolerance={torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(
                dtype, 2e-4 if codebook and compute == "int8" else 2e-5
            ),
        )


def panel_cases() -> Iterator[Case]:
    for spelling, (N, K) in itertools.product([*SCHEMES, "w4t"], [(5, 33), (120, 300), (0, 48), (64, 256)]):
        qw = quantize_groupwise(random_weight(max(N, 1), K, torch.float32)[:N], spelling)
        for variant in ("plain", "offsets", "act-order"):
            weight = dequantize_variant(qw, variant)
            if weight is None:
                continue
            packed = pack_weight(weight, backend="cpu")
            zeros = weight.zeros if weight.offsets is None else weight.offsets
            yield Case(
                "panels",
                {
                    **blob_numbers(packed),
                    "per_tensor": int(qw.scheme.per_tensor),
                    "groups": weight.scales.shape[1],
                },
                {"blob": packed.blob},
                {"codes": weight.codes, "scales": weight.scales, "zeros": zeros},
                label=f"{spelling} {variant} {N}x{K}",
            )


def blob_numbers(packed: PackedWeight) -> dict[str, int]:
    """What the caller of a kernel knows of a blob."""
    return {"bytes": packed.blob.numel(), "N": packed.N, "K": packed.K, "bits": packed.scheme.bits}


def corrupt_cases() -> Iterator[Case]:
    """Blobs with a few bytes changed: refused or sound, but nothing beyond them is touched."""
    generator = torch.Generator().manual_seed(0)

    def chance(limit: int) -> int:
        return int(torch.randint(0, limit, (), generator=generator))

    N, K, M = 21, 70, 3
    values = (0, 1, -1, 4, 64, 255, 256, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63))
    for spelling, variant in itertools.product(
        ("w4g32z", "w3g16", "w8g64", "nf4g16"), ("plain", "act-order")
    ):
        weight = dequantize_variant(quantize_groupwise(random_weight(N, K, torch.float32), spelling), variant)
        packed = pack_weight(weight, backend="cpu")
        groups = weight.scales.shape[1]
        tables = 256 + 4 * (groups + 1) + (64 + 4 * K if variant == "act-order" else 0)
        for i in range(60):
            blob = packed.blob.clone()
            for _ in range(1 + chance(3)):
                if chance(2):
                    at = 4 * chance(tables // 4 - 1)
                    blob[at : at + 8] = torch.tensor([values[chance(len(values))]]).view(torch.uint8)
                else:
                    blob[chance(tables)] = chance(256)
            label = f"corrupt {spelling} {variant} {i}"
            # The outputs are scratch: what is in them does not matter.
            out = {"out": torch.zeros(M, N), "decoded": torch.zeros(K, -(-N // 16) * 16)}
            for form in FORMS:
                dtype = torch.bfloat16 if form == "pairs" else torch.float32
                numbers = {**blob_numbers(packed), "M": M, "dtype": DTYPE_CODES[dtype], "form": FORMS[form]}
                x = random_weight(M, K, dtype)
                yield Case(
                    "dequant_matmul", numbers, {"blob": blob, "x": x, **out}, {}, status=None, label=label
                )
            form = {"codes": weight.codes, "scales": weight.scales.float(), "zeros": torch.zeros(N, groups)}
            numbers = {**blob_numbers(packed), "per_tensor": 0, "groups": groups}
            yield Case("panels", numbers, {"blob": blob, **form}, {}, status=None, label=label)


def gguf_cases() -> Iterator[Case]:
    for kind in GGUF_TYPES.values():
        if kind.name == "f32":
            continue
        for N, K in ((1, 256), (5, 768), (3, 0)):
            x = random_weight(N, max(K, 1), torch.float32)[:, :K].contiguous()
            for importance in (None, torch.rand(K, generator=torch.Generator().manual_seed(K))):
                # The bits are the same in every tier, so those of the active one are what is expected.
                encoded = gguf_encode(x, kind.name, importance=importance)
                weights = None
                if importance is not None and K > 0:
                    weights = (importance.double() / importance.double().mean()).float()  # as the op does
                inputs = {"x": x, "importance": weights}
                numbers = {"type": kind.id, "N": N, "K": K}
                label = f"{kind.name} {N}x{K}"
                yield Case("gguf_encode", numbers, inputs, {"out": encoded}, label=label)
            decoded = gguf_decode(encoded, kind.name, backend="reference")
            yield Case("gguf_decode", numbers, {"raw": encoded}, {"out": decoded}, label=label)


def int8_cases() -> Iterator[Case]:
    for i, (spelling, (N, K)) in enumerate(
        itertools.product(("w8", "w8z", "w8t"), [(1, 1), (5, 33), (120, 300), (64, 1030)])
    ):
        qw = quantize_groupwise(random_weight(N, K, torch.float32), spelling, scale_dtype=FLOAT_DTYPES[i % 3])
        packed = pack_weight(qw, backend="cpu")
        dtype = FLOAT_DTYPES[(i + i // 4) % 3]
        for M, has_zeros in ((1, True), (7, False), (98, True)):
            generator = torch.Generator().manual_seed(N + M)
            x = torch.randint(-128, 128, (M, K), dtype=torch.int8, generator=generator)
            zeros = (
                torch.randint(-128, 128, (M, 1), dtype=torch.int8, generator=generator) if has_zeros else None
            )
            scales = torch.rand(M, 1, generator=generator)
            bias = torch.arange(N, dtype=torch.float32) / N
            product = {"x_zero": zeros, "backend": "reference"}
            yield Case(
                "int8_matmul",
                {"bytes": packed.blob.numel(), "M": M, "out_dtype": DTYPE_CODES[dtype]},
                {
                    "blob": packed.blob,
                    "x": x,
                    "scales": scales,
                    "zeros": None if zeros is None else zeros.int(),
                    "bias": bias,
                },
                {
                    "out": int8_matmul(x, scales, qw, bias, out_dtype=dtype, **product),
                    "int_out": int8_matmul(x, None, qw, out_dtype=torch.int32, **product),
                },
                label=f"{spelling} {M}x{N}x{K} {dtype}",
            )


GENERATORS = (
    quantize_cases,
    dequantize_cases,
    bits_cases,
    gptq_cases,
    activation_cases,
    panel_cases,
    matmul_cases,
    corrupt_cases,
    gguf_cases,
    int8_cases,
)


def agrees(expected: torch.Tensor, output: bytes, tolerance: float) -> bool:
    """Whether an output is what was expected."""
    if tolerance == 0.0 or not output:
        return raw(expected) == output
    got = torch.frombuffer(bytearray(output), dtype=expected.dtype).view(expected.shape).double()
    return bool((got - expected.double()).abs().max() <= tolerance * expected.double().abs().max())


def mismatches(cases: list[Case], outputs: bytes) -> list[str]:
    """One line for each case whose status or outputs differ."""
    lines, at = [], 0
    for case in cases:
        (status,) = struct.unpack_from("<q", outputs, at)
        at += 8
        wrong = [f"status {status}"] if case.status not in (status, None) else []
        for name, tensor in case.expected.items():
            if tensor is None:
                continue
            expected = raw(tensor)
            if not agrees(tensor, outputs[at : at + len(expected)], case.tolerance):
                wrong.append(name)
            at += len(expected)
        if wrong:
            lines.append(f"{case.op} {case.label}: {', '.join(wrong)}")
    if at != len(outputs):
        lines.append(f"the driver wrote {len(outputs)} bytes where {at} were expected")
    return lines


def main(command: list[str]) -> int:
    """Run every case on every tier of the driver that `command` starts."""
    cases = [case for generator in GENERATORS for case in generator()]
    tiers = subprocess.run([*command, "tiers"], check=True, capture_output=True, text=True).stdout.split()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "cases", Path(folder) / "outputs"
        source.write_bytes(b"".join(case.encode() for case in cases))
        for tier in tiers:
            subprocess.run([*command, tier, str(source), str(target)], check=True)
            wrong = mismatches(cases, target.read_bytes())
            print(f"{tier}: {len(cases) - len(wrong)} of {len(cases)} cases equal the references")
            print("".join(f"  {line}\n" for line in wrong), end="")
            failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
