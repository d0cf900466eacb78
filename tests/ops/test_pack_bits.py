"""pack_bits and unpack_bits: every backend against bit streams made with Python's integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qkern.errors import InputError
from qkern.ops import pack_bits, unpack_bits
from qkern.ops.pack_bits import LAYOUTS
from qkern.ops.pack_bits.reference import AWQ_ORDER

if TYPE_CHECKING:
    from types import ModuleType

OP = "pack_bits"
BITS = (2, 3, 4, 8)
SHAPES = [
    (8, 1),
    (8, 31),
    (16, 32),
    (24, 33),
    (8, 64),
    (136, 100),
    (8, 513),
    (40, 1029),
    (8, 0),
    (0, 8),
    (0, 0),
]
CASES = [(bits, layout) for bits in BITS for layout in LAYOUTS if layout != "awq" or bits == 4]


def random_codes(N: int, K: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * N + K)
    return torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=generator)


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def stream(codes: list[int], bits: int, per_word: int | None) -> list[int]:
    """Words of one row: a dense stream, or `per_word` codes to a word."""
    if per_word is None:
        value = sum(code << (i * bits) for i, code in enumerate(codes))
        words = -(-len(codes) * bits // 32)
        return [signed(value >> (32 * i) & 0xFFFFFFFF) for i in range(words)]
    pieces = [codes[i : i + per_word] for i in range(0, len(codes), per_word)]
    return [signed(sum(code << (i * bits) for i, code in enumerate(piece))) for piece in pieces]


def expected_words(codes: torch.Tensor, bits: int, layout: str) -> torch.Tensor:
    N, K = codes.shape
    if layout == "awq":
        rows = [
            [
                signed(sum(int(codes[8 * c + AWQ_ORDER[i], k]) << (4 * i) for i in range(8)))
                for c in range(N // 8)
            ]
            for k in range(K)
        ]
        return torch.tensor(rows, dtype=torch.int32).reshape(K, N // 8)
    per_word = 32 // bits if layout == "words" else None
    width = -(-K // per_word) if per_word else -(-K * bits // 32)
    rows = [stream(row, bits, per_word) for row in codes.tolist()]
    words = torch.tensor(rows, dtype=torch.int32).reshape(N, width)
    return words.T.contiguous() if layout == "gptq" else words


@pytest.mark.parametrize(("bits", "layout"), CASES)
@pytest.mark.parametrize("shape", [(8, 1), (16, 33), (24, 100), (8, 0), (0, 8)])
def test_pack_bits_gives_the_declared_words(
    backend: str, bits: int, layout: str, shape: tuple[int, int]
) -> None:
    codes = random_codes(*shape, bits)
    packed = pack_bits(codes, bits, layout=layout, backend=backend)
    assert torch.equal(packed, expected_words(codes, bits, layout))


@pytest.mark.parametrize(("bits", "layout"), CASES)
def test_pack_bits_equals_reference_and_is_reversible(backend: str, bits: int, layout: str) -> None:
    for shape in SHAPES:
        codes = random_codes(*shape, bits)
        packed = pack_bits(codes, bits, layout=layout, backend=backend)
        assert torch.equal(packed, pack_bits(codes, bits, layout=layout, backend="reference")), shape
        assert torch.equal(unpack_bits(packed, bits, shape, layout=layout, backend=backend), codes), shape


@given(data=st.data(), bits=st.sampled_from(BITS), layout=st.sampled_from([x for x in LAYOUTS if x != "awq"]))
def test_pack_bits_round_trips_any_shape(backend: str, data: st.DataObject, bits: int, layout: str) -> None:
    N, K = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 600))
    codes = random_codes(N, K, bits)
    codes[: data.draw(st.integers(0, N))] = (1 << bits) - 1
    packed = pack_bits(codes, bits, layout=layout, backend=backend)
    assert torch.equal(packed, pack_bits(codes, bits, layout=layout, backend="reference"))
    assert torch.equal(unpack_bits(packed, bits, (N, K), layout=layout, backend=backend), codes)


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3), bits=st.sampled_from(BITS))
def test_unpack_bits_reads_any_words(backend: str, words: list[int], bits: int) -> None:
    K = 96 // bits
    packed = torch.tensor([words], dtype=torch.int32)
    codes = unpack_bits(packed, bits, (1, K), backend=backend)
    value = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    assert codes.tolist() == [[value >> (bits * k) & ((1 << bits) - 1) for k in range(K)]]


@pytest.mark.parametrize(("bits", "layout"), CASES)
def test_pack_bits_reads_strided_codes(backend: str, bits: int, layout: str) -> None:
    whole = random_codes(32, 150, bits)
    for codes in (whole[::2, :97], whole[:, 3:70], whole[:16, ::2], whole.T[:96]):
        packed = pack_bits(codes, bits, layout=layout, backend=backend)
        assert torch.equal(packed, pack_bits(codes.contiguous(), bits, layout=layout, backend="reference"))
        strided = torch.zeros(packed.shape[0], 2 * packed.shape[1], dtype=torch.int32)[:, ::2]
        strided.copy_(packed)
        assert torch.equal(
            unpack_bits(strided, bits, tuple(codes.shape), layout=layout, backend=backend), codes
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pack_bits_refuses_codes_that_do_not_fit(backend: str, layout: str) -> None:
    codes = random_codes(16, 200, 4)
    codes[9, 199] = 16
    with pytest.raises(InputError, match=r"2\*\*bits = 16"):
        pack_bits(codes, 4, layout=layout, backend=backend)


def test_pack_bits_names_what_is_wrong() -> None:
    codes = random_codes(8, 8, 4)
    with pytest.raises(InputError, match="got 5"):
        pack_bits(codes, 5)
    with pytest.raises(InputError, match="'rows'"):
        pack_bits(codes, 4, layout="rows")
    with pytest.raises(InputError, match="N=7"):
        pack_bits(codes[:7], 4, layout="awq")
    with pytest.raises(InputError, match=r"torch\.int64"):
        pack_bits(codes.long(), 4)
    with pytest.raises(InputError, match=r"int32 \(8, 1\)"):
        unpack_bits(torch.zeros(8, 2, dtype=torch.int32), 4, (8, 8))
    with pytest.raises(InputError, match="unknown backend"):
        pack_bits(codes, 4, backend="gpu")


@pytest.mark.slow
def test_pack_bits_offsets_beyond_two_to_the_31() -> None:
    N, K = 33_000, 65_600  # 2.16e9 codes: rows near the end lie beyond 2**31 elements
    codes = torch.zeros(N, K, dtype=torch.uint8)
    codes[-1] = random_codes(1, K, 2)[0]
    packed = pack_bits(codes, 2, backend="cpu")
    assert torch.equal(packed[-1:], pack_bits(codes[-1:], 2, backend="reference"))
    assert torch.equal(unpack_bits(packed, 2, (N, K), backend="cpu")[-1], codes[-1])


@pytest.mark.parametrize(("bits", "layout"), [(8, "gptq"), (3, "gptq"), (4, "awq"), (3, "words")])
def test_pack_bits_past_the_caches_equals_reference(cpu_tier: str, bits: int, layout: str) -> None:
    # Results of 4 MiB and more are streamed in whole lines, where all of them are whole.
    for N in (2048, 2056):
        codes = random_codes(N, 5700, bits)
        packed = pack_bits(codes, bits, layout=layout, backend="cpu")
        assert torch.equal(packed, pack_bits(codes, bits, layout=layout, backend="reference"))
        assert torch.equal(unpack_bits(packed, bits, (N, 5700), layout=layout, backend="cpu"), codes)


# Several blocks along N and K; rows of codes and of words aligned to 16 bytes, to fewer, or not at all.
@pytest.mark.parametrize("shape", [(264, 1040), (264, 1031), (520, 136), (8, 16400), (8, 17000)])
@pytest.mark.parametrize(("bits", "layout"), CASES)
def test_cuda_tiles_equal_reference(
    emulator: ModuleType, bits: int, layout: str, shape: tuple[int, int]
) -> None:
    codes = random_codes(*shape, bits)
    packed = pack_bits(codes, bits, layout=layout, backend="cuda")
    assert torch.equal(packed, pack_bits(codes, bits, layout=layout, backend="reference"))
    assert torch.equal(unpack_bits(packed, bits, shape, layout=layout, backend="cuda"), codes)
    # Words that begin 4 bytes beyond a multiple of 16.
    moved = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view_as(packed)
    assert torch.equal(unpack_bits(moved, bits, shape, layout=layout, backend="cuda"), codes)


@pytest.mark.parametrize(("bits", "layout"), CASES)
def test_cuda_gives_the_same_whatever_the_order_of_threads(
    emulator: ModuleType, bits: int, layout: str
) -> None:
    for shape in ((72, 528), (40, 333)):
        codes = random_codes(*shape, bits)
        expected = pack_bits(codes, bits, layout=layout, backend="reference")
        for seed in range(1, 4):
            emulator.set_seed(seed)
            assert torch.equal(pack_bits(codes, bits, layout=layout, backend="cuda"), expected)
            assert torch.equal(unpack_bits(expected, bits, shape, layout=layout, backend="cuda"), codes)


@pytest.mark.parametrize(("bits", "layout"), [case for case in CASES if case[0] < 8])
def test_cuda_finds_a_code_that_does_not_fit_anywhere(emulator: ModuleType, bits: int, layout: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    for shape in ((264, 336), (264, 331)):
        whole = random_codes(*shape, bits)
        places = [(0, 0), (263, shape[1] - 1)]
        places += [tuple(int(torch.randint(0, n, (), generator=generator)) for n in shape) for _ in range(6)]
        for row, column in places:
            codes = whole.clone()
            codes[row, column] += 1 << int(torch.randint(bits, 8, (), generator=generator))
            with pytest.raises(InputError, match="got a larger one"):
                pack_bits(codes, bits, layout=layout, backend="cuda")
