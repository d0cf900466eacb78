"""Files of importance matrices: both forms, what llama.cpp writes into them, and damaged ones."""

import math
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch

import gguf
from qkern.errors import FormatError, InputError, QkernError
from qkern.gguf import Imatrix, ImatrixEntry, read_imatrix, write_imatrix


def entry(matrices, columns, counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(counts)
    sums = torch.rand(matrices, columns, generator=generator) * 100 * (counts[:, None] > 0)
    return ImatrixEntry(sums=sums, counts=counts)


@pytest.fixture
def matrix():
    return Imatrix(
        entries={
            "blk.1.ffn_up_exps.weight": entry(3, 8, [7, 0, 25], seed=1),
            "blk.0.attn_q.weight": entry(1, 16, [32]),
        },
        datasets=("first.txt", "text \u00e9.txt"),
        chunk_count=4,
        chunk_size=8,
    )


def same(ours, theirs):
    assert set(ours.entries) == set(theirs.entries)
    for name, one in ours.entries.items():
        assert torch.equal(one.sums, theirs.entries[name].sums)
        assert torch.equal(one.counts, theirs.entries[name].counts)


def test_the_gguf_form_comes_back(matrix, tmp_path):
    write_imatrix(tmp_path / "x.gguf", matrix)
    read = read_imatrix(tmp_path / "x.gguf")
    same(matrix, read)
    assert read.datasets == matrix.datasets
    assert (read.chunk_count, read.chunk_size) == (4, 8)


def test_the_gguf_form_is_that_of_llama_cpp(matrix, tmp_path):
    write_imatrix(tmp_path / "x.gguf", matrix)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert set(fields) == {
        "general.type",
        "imatrix.datasets",
        "imatrix.chunk_count",
        "imatrix.chunk_size",
    }
    assert fields["general.type"].contents() == "imatrix"
    assert fields["imatrix.datasets"].contents() == ["first.txt", "text \u00e9.txt"]
    for name, value in (("chunk_count", 4), ("chunk_size", 8)):
        assert fields[f"imatrix.{name}"].types == [gguf.GGUFValueType.UINT32]
        assert fields[f"imatrix.{name}"].contents() == value
    shapes = {tensor.name: (tensor.shape.tolist(), tensor.tensor_type) for tensor in reader.tensors}
    f32 = gguf.GGMLQuantizationType.F32
    # Sorted, dimensions in ggml's order, a last one of 1 left out.
    assert list(shapes.items()) == [
        ("blk.0.attn_q.weight.in_sum2", ([16], f32)),
        ("blk.0.attn_q.weight.counts", ([1], f32)),
        ("blk.1.ffn_up_exps.weight.in_sum2", ([8, 3], f32)),
        ("blk.1.ffn_up_exps.weight.counts", ([1, 3], f32)),
    ]


def test_tensors_of_newer_files_are_left_alone(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "none")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    for ending in ("in_sum2", "in_sum"):
        writer.add_tensor(f"blk.0.attn_v.weight.{ending}", np.arange(8, dtype=np.float32))
    writer.add_tensor("blk.0.attn_v.weight.counts", np.array([4], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_imatrix(tmp_path / "x.gguf")
    assert torch.equal(read.entries["blk.0.attn_v.weight"].mean, torch.arange(8.0)[None] / 4)


def binary(*, entries=(("a", 2, [1.0, 3.0]),), count=None, chunks=2, dataset=b"t.txt", end=b""):
    """The old form; anything in it can be wrong."""
    parts = [struct.pack("<i", len(entries) if count is None else count)]
    for name, calls, values in entries:
        raw = name if isinstance(name, bytes) else name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", calls, len(values))]
        parts += [struct.pack(f"<{len(values)}f", *values)]
    if chunks is not None:
        parts.append(struct.pack("<i", chunks))
    if dataset is not None:
        parts += [struct.pack("<i", len(dataset)), dataset]
    return b"".join(parts) + end


def opened(tmp_path, content):
    path = tmp_path / "x.dat"
    path.write_bytes(content)
    return read_imatrix(path)


def test_the_old_form_is_that_of_llama_cpp(matrix, tmp_path):
    write_imatrix(tmp_path / "y.dat", matrix)
    experts = matrix.entries["blk.1.ffn_up_exps.weight"].mean * 4  # 25 tokens are four chunks of 8
    experts[1] = 4.0  # nothing came there: a mean of 1
    expected = binary(
        entries=(
            ("blk.0.attn_q.weight", 4, (matrix.entries["blk.0.attn_q.weight"].mean * 4).flatten().tolist()),
            ("blk.1.ffn_up_exps.weight", 4, experts.flatten().tolist()),
        ),
        chunks=4,
        dataset="text \u00e9.txt".encode(),
    )
    assert (tmp_path / "y.dat").read_bytes() == expected
    read = read_imatrix(tmp_path / "y.dat")
    means = read.entries["blk.0.attn_q.weight"].mean
    assert torch.equal(means, matrix.entries["blk.0.attn_q.weight"].mean)
    assert read.importance("blk.1.ffn_up_exps.weight", (3, 5, 8)).tolist() == (experts / 4).tolist()
    assert read.datasets == ("text \u00e9.txt",)
    assert read.chunk_count == 4


@pytest.mark.parametrize(
    ("content", "chunks", "datasets"),
    [
        (binary(), 2, ("t.txt",)),
        (binary(dataset=b""), 2, ()),
        (binary(dataset=None, chunks=9), 9, ()),
        (binary(dataset=None, chunks=None), 2, ()),
        (binary(entries=(("a", 0, [1.0, 3.0]),), dataset=None, chunks=None), 1, ()),
    ],
)
def test_the_first_old_files_end_early(content, chunks, datasets, tmp_path):
    read = opened(tmp_path, content)
    assert (read.chunk_count, read.datasets) == (chunks, datasets)
    importance = read.importance("a", (5, 2))
    assert torch.allclose(importance / importance.sum(), torch.tensor([0.25, 0.75]))


BAD_BINARY = {
    "nothing": b"",
    "three bytes": b"\1\0\0",
    "no entries": binary(count=0),
    "negative entries": binary(count=-1),
    "too many entries": binary(count=2**31 - 1, chunks=None, dataset=None),
    "text": b"In the beginning God created the heaven and the earth.",
    "empty name": binary(entries=((b"", 2, [1.0]),)),
    "name length": struct.pack("<ii", 1, 2**31 - 1) + b"a",
    "negative name length": struct.pack("<ii", 1, -5) + bytes(64),
    "name is no text": binary(entries=((b"\xff\xfe", 2, [1.0]),)),
    "negative chunks": binary(entries=(("a", -1, [1.0]),)),
    "no values": binary(entries=(("a", 1, []),)),
    "negative values count": struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, -1) + bytes(64),
    "values past the end": struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1) + bytes(64),
    "NaN": binary(entries=(("a", 1, [1.0, math.nan]),)),
    "Inf": binary(entries=(("a", 1, [1.0, math.inf]),)),
    "negative value": binary(entries=(("a", 1, [1.0, -1.0]),)),
    "twice": binary(entries=(("a", 1, [1.0]),) * 2),
    "cut": binary()[:-1],
    "text past the end": binary(dataset=None) + struct.pack("<i", 2**31 - 1),
    "more behind": binary(end=b"\0"),
}


@pytest.mark.parametrize("what", BAD_BINARY)
def test_what_is_wrong_with_an_old_file_is_said(what, tmp_path):
    with pytest.raises(FormatError, match=r"x\.dat is no importance matrix, neither .*: .*; fetch it again"):
        opened(tmp_path, BAD_BINARY[what])


def gguf_file(path, *, kind="imatrix", metadata=(("chunk_count", 1), ("chunk_size", 8)), tensors=None):
    writer = gguf.GGUFWriter(path, "")
    if kind is not None:
        writer.add_type(kind)
    for name, value in metadata:
        if isinstance(value, str):
            writer.add_string(f"imatrix.{name}", value)
        else:
            writer.add_uint32(f"imatrix.{name}", value)
    pair = {"a.in_sum2": np.ones(8, np.float32), "a.counts": np.ones(1, np.float32)}
    for name, value in (pair | (tensors or {})).items():
        if value is not None:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ones(*shape, value=1.0, dtype=np.float32):
    return np.full(shape, value, dtype)


BAD_GGUF = {
    "no type": ({"kind": None}, "general.type is None"),
    "a model": ({"kind": "model"}, "general.type is 'model'"),
    "no chunk count": ({"metadata": (("chunk_size", 8),)}, "imatrix.chunk_count must be a count: got None"),
    "chunk size": ({"metadata": (("chunk_count", 1), ("chunk_size", "8"))}, "imatrix.chunk_size .* got '8'"),
    "datasets": (
        {"metadata": (("chunk_count", 1), ("chunk_size", 8), ("datasets", "a"))},
        "imatrix.datasets must be a list of names: got 'a'",
    ),
    "nothing": ({"tensors": {"a.in_sum2": None, "a.counts": None, "b": ones(2)}}, "it needs pairs"),
    "no sums": ({"tensors": {"a.in_sum2": None}}, r"incomplete are \['a'\]"),
    "no counts": ({"tensors": {"b.in_sum2": ones(8)}}, r"incomplete are \['b'\]"),
    "half": ({"tensors": {"a.in_sum2": ones(8, dtype=np.float16)}}, "'a.in_sum2' must be f32"),
    "counts": ({"tensors": {"a.counts": ones(3, 1)}}, "a has 8 sums, which 3 counts do not divide"),
    "NaN": ({"tensors": {"a.in_sum2": ones(8, value=np.nan)}}, "a.in_sum2 has NaN, Inf or negative"),
    "Inf": ({"tensors": {"a.in_sum2": ones(8, value=np.inf)}}, "a.in_sum2 has NaN, Inf or negative"),
    "negative": ({"tensors": {"a.in_sum2": ones(8, value=-1.0)}}, "a.in_sum2 has NaN, Inf or negative"),
    "negative count": ({"tensors": {"a.counts": ones(1, value=-1.0)}}, "a.counts has NaN, Inf or negative"),
}


@pytest.mark.parametrize("what", BAD_GGUF)
def test_what_is_wrong_with_a_gguf_is_said(what, tmp_path):
    options, message = BAD_GGUF[what]
    path = gguf_file(tmp_path / "x.gguf", **options)
    with pytest.raises(FormatError, match=rf"x\.gguf is a GGUF, but no importance matrix: .*{message}"):
        read_imatrix(path)


def test_a_huge_count_is_a_count(tmp_path):
    path = gguf_file(tmp_path / "x.gguf", tensors={"a.counts": ones(1, value=3e38)})
    assert bool((read_imatrix(path).entries["a"].mean > 0).all())


def test_the_old_form_holds_counts_beyond_its_integers(tmp_path):
    sums = torch.tensor([[1.0, 3.0]])
    entries = {
        "a": ImatrixEntry(sums=sums, counts=torch.tensor([2**62])),
        # The mean of the second would overflow, times the chunks of the first.
        "b": ImatrixEntry(sums=torch.tensor([[1.0], [1e38]]), counts=torch.tensor([2**62, 1])),
    }
    write_imatrix(tmp_path / "x.dat", Imatrix(entries=entries, chunk_count=2**32 - 1, chunk_size=0))
    read = read_imatrix(tmp_path / "x.dat")
    assert read.chunk_count == 2**31 - 1
    importance = read.importance("a", (5, 2))
    assert torch.allclose(importance * 2.0**62, sums[0])
    assert read.importance("b", (2, 5, 1))[1].item() == torch.tensor(1e38).item()


ODD_WORDS = (0, 1, -1, 2**31 - 1, -(2**31), 0x7FC00000, 0x7F800000, 0x7F7FFFFF, 0x00000001)


def mutated(original, generator):
    """The file with some bytes or words changed, parts of it left out or twice there, or its end missing."""
    damaged = bytearray(original)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(damaged))
        match generator.randrange(8):
            case 0:
                damaged[place : place + generator.randint(1, 8)] = b""
            case 1:
                damaged[place:place] = damaged[place : place + generator.randint(1, 64)]
            case 2 | 3 | 4:
                damaged[place : place + 4] = struct.pack("<i", generator.choice(ODD_WORDS))
            case _:
                damaged[place] = generator.choice((0, 1, 127, 128, 255, damaged[place] ^ 1))
    if generator.random() < 0.2:
        del damaged[generator.randrange(len(damaged)) :]
    return bytes(damaged)


def test_six_thousand_mutated_files(matrix, tmp_path):
    for name in ("m.gguf", "m.dat"):
        write_imatrix(tmp_path / name, matrix)
    originals = [(tmp_path / name).read_bytes() for name in ("m.gguf", "m.dat")]
    generator = random.Random(0)
    refused = [0, 0]
    for trial in range(6000):
        content = mutated(originals[trial % 2], generator)
        if trial % 20 < 2:  # tracing each would take most of the time
            tracemalloc.start()
        try:
            read = opened(tmp_path, content)
        except FormatError:
            refused[trial % 2] += 1
            read = None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * len(content) + 200_000
        if read is None:
            continue
        for one in read.entries.values():
            assert bool(torch.isfinite(one.mean).all())
            assert one.counts.min() >= 0
        # What was read can be written, whatever it says of itself.
        (tmp_path / "again.dat").unlink(missing_ok=True)
        write_imatrix(tmp_path / "again.dat", read)
    assert min(refused) > 1000
    assert max(refused) < 2990


def test_an_entry_of_another_size_is_of_another_model(matrix):
    assert matrix.importance("blk.9.attn_q.weight", (4, 16)) is None
    assert matrix.importance("blk.0.attn_q.weight", (4, 16)).shape == (16,)
    assert matrix.importance("blk.1.ffn_up_exps.weight", (3, 5, 8)).shape == (3, 8)
    for name, shape in (
        ("blk.0.attn_q.weight", (4, 17)),
        ("blk.1.ffn_up_exps.weight", (4, 5, 6)),
        ("blk.1.ffn_up_exps.weight", (5, 24)),
    ):
        with pytest.raises(InputError, match=rf"made for another model: {name} is \({shape[0]}, "):
            matrix.importance(name, shape)


def test_paths_that_cannot_be(matrix, tmp_path):
    with pytest.raises(InputError, match=r"no importance matrix at .*none\.gguf"):
        read_imatrix(tmp_path / "none.gguf")
    with pytest.raises(InputError, match=r"written as \.gguf, or as \.dat .*: got x\.bin"):
        write_imatrix(tmp_path / "x.bin", matrix)
    for name in ("x.gguf", "x.dat"):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(InputError, match=f"{name} exists"):
            write_imatrix(tmp_path / name, matrix)
        assert (tmp_path / name).read_bytes() == b"mine"
        with pytest.raises(InputError, match="does not exist; make it first"):
            write_imatrix(tmp_path / "none" / name, matrix)


def test_a_full_disk_leaves_no_file(matrix, tmp_path, monkeypatch):
    from pathlib import Path

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(QkernError, match=r"cannot write .*x\.dat: No space left on device; .*free space"):
        write_imatrix(tmp_path / "x.dat", matrix)
    assert list(tmp_path.iterdir()) == []
