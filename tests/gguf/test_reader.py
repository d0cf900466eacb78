"""The reader trusts nothing: every damaged file is a FormatError, within a moment and without memory."""

import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch

import gguf
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.gguf import GGUFFile, GGUFTensor
from qkern.ops import gguf_encode


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


PLAIN = text("k") + struct.pack("<II", 4, 7)


def build(
    *,
    magic=b"GGUF",
    version=3,
    tensors=(("a", (32, 2), 2, 0), ("b", (8,), 0, 64)),
    metadata=(PLAIN,),
    tensor_count=None,
    data=96,
):
    """A file with tensors of (name, dimensions, type, offset); anything in it can be wrong."""
    head = magic + struct.pack("<I", version)
    head += struct.pack("<QQ", len(tensors) if tensor_count is None else tensor_count, len(metadata))
    head += b"".join(metadata)
    head += b"".join(
        text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
        for name, dimensions, kind, offset in tensors
    )
    return head + bytes(-len(head) % 32) + bytes(data)


def opened(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


def test_a_small_file(tmp_path):
    with opened(tmp_path, build()) as file:
        assert list(file) == ["a", "b"]
        assert file.metadata == {"k": 7}
        assert file.tensors["a"].shape == (2, 32)
        assert torch.equal(file["a"].decode(), torch.zeros(2, 32))


LONG = struct.pack("<Q", 2**60)
BAD = {
    "nothing": b"",
    "cut magic": b"GG",
    "magic": build(magic=b"GGML"),
    "version": build(version=1),
    "tensor count": build(tensor_count=2**60),
    "too many tensors": build(tensor_count=3),
    "metadata twice": build(metadata=(text("k") + struct.pack("<II", 4, 7),) * 2),
    "key length": build(metadata=(LONG + b"k" + struct.pack("<II", 4, 7),)),
    "string length": build(metadata=(text("k") + struct.pack("<I", 8) + LONG,)),
    "array length": build(metadata=(text("k") + struct.pack("<II", 9, 4) + LONG,)),
    "array of strings": build(metadata=(text("k") + struct.pack("<II", 9, 8) + LONG,)),
    "deep arrays": build(metadata=(text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000,)),
    "metadata type": build(metadata=(text("k") + struct.pack("<II", 77, 7),)),
    "alignment": build(metadata=(text("general.alignment") + struct.pack("<II", 4, 33),)),
    "alignment 0": build(metadata=(text("general.alignment") + struct.pack("<II", 4, 0),)),
    "no dimensions": build(tensors=(("a", (), 0, 0),)),
    "many dimensions": build(tensors=(("a", (1,) * 9, 0, 0),)),
    "zero dimension": build(tensors=(("a", (32, 0), 0, 0),)),
    "huge shape": build(tensors=(("a", (2**40, 2**40), 0, 0),)),
    "type": build(tensors=(("a", (32,), 999, 0),)),
    "half a block": build(tensors=(("a", (33,), 2, 0),)),
    "past the end": build(tensors=(("a", (32, 64), 2, 0),)),
    "offset past the end": build(tensors=(("a", (32,), 2, 2**62),)),
    "offset not aligned": build(tensors=(("a", (32,), 2, 5),)),
    "overlap": build(tensors=(("a", (32, 2), 2, 0), ("b", (8,), 0, 32))),
    "name twice": build(tensors=(("a", (32,), 2, 0), ("a", (8,), 0, 32))),
    "no data": build(data=0),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_said(what, tmp_path):
    with pytest.raises(FormatError, match=r"x\.gguf is not a readable GGUF: .*; fetch or export it again"):
        opened(tmp_path, BAD[what])


ODD = (0, 1, 2, 31, 33, 2**16, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)
NAMES = ("", "a", "b", "general.alignment", "split.count", "split.no", "split.tensors.count", "x" * 70_000)


def odd_value(generator):
    """A metadata value, its type and its content both perhaps wrong."""
    kind = generator.choice((*range(14), 99))
    small, large = generator.choice(ODD) % 2**32, struct.pack("<Q", generator.choice(ODD))
    if kind == 8:
        return struct.pack("<I", kind) + generator.choice((text("word"), text("\u00e9"), large, b"\xff" * 12))
    if kind == 9:
        item = generator.choice((0, 4, 6, 7, 8, 9, 12, 99))
        count = generator.choice((large, struct.pack("<Q", 2)))
        return struct.pack("<II", kind, item) + count + generator.choice((b"", bytes(40), text("w") * 2))
    return struct.pack("<II", kind, small) + bytes(generator.choice((0, 0, 4)))


def odd_file(generator):
    """A file of which one thing or several are wrong."""
    tensors = [("a", (32, 2), 2, 0), ("b", (8,), 0, 64)]
    for _ in range(generator.choice((0, 0, 1, 2, 3))):
        dimensions = tuple(
            generator.choice((1, 2, 32, 256, *ODD)) for _ in range(generator.choice((0, 1, 1, 2, 3, 4, 5)))
        )
        offset = generator.choice((0, 32, 64, 96, 128, *ODD))
        name = generator.choice(("a", "b", "c", ""))
        tensors.append((name, dimensions, generator.choice((*range(45), 999)), offset))
    metadata = [
        text(generator.choice(NAMES)) + odd_value(generator) for _ in range(generator.choice((0, 1, 1, 2)))
    ]
    return build(
        magic=generator.choice((b"GGUF",) * 20 + (b"GGML", b"FUGG")),
        version=generator.choice((3,) * 20 + (2, 1, 0, 2**24 * 3)),
        tensors=generator.sample(tensors, len(tensors)),
        metadata=metadata,
        tensor_count=generator.choice((None,) * 10 + ODD),
        data=generator.choice((96, 96, 4096, 0)),
    )


def flipped(generator, content):
    """The same file with some bytes of its first thousand changed, or its end missing."""
    damaged = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(min(len(damaged), 1000))
        damaged[place] = generator.choice((0, 1, 127, 128, 255, damaged[place] ^ 1 << generator.randrange(8)))
    if generator.random() < 0.2:
        del damaged[generator.randrange(len(damaged)) :]
    return bytes(damaged)


# A dictionary entry, a name and a place cost Python more than the two dozen bytes they have in a file; the
# constant is what opening any file takes.
def most_memory(content):
    return 16 * len(content) + 200_000


def test_ten_thousand_damaged_files(exported, tmp_path):
    whole = exported("q4_0").read_bytes()
    with GGUFFile(exported("q4_0")) as file:
        head = min(info.offset for info in file.tensors.values())
    # Structure is in the head; the end of the data is cut, and with most flips the file is truncated anyway.
    real = whole[: head + 4096]
    generator = random.Random(0)
    refused = 0
    for trial in range(10_000):
        if trial % 50 == 0:
            content = flipped(generator, real)
        elif trial % 3:
            content = odd_file(generator)
        else:
            content = flipped(generator, build())
        if trial % 10 == 0:  # tracing each would take most of the time
            tracemalloc.start()
        try:
            with opened(tmp_path, content) as file:
                for name in file:
                    file[name].decode()
        except (FormatError, UnsupportedError):
            refused += 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most_memory(content)
    assert 5_000 < refused < 9_900


def entries(count):
    return tuple(text(str(number)) + struct.pack("<IB", 0, 1) for number in range(count))


def an_array(item, count, content):
    return (text("k") + struct.pack("<IIQ", 9, item, count) + content,)


MILLION = 1 << 20
GREEDY = {
    "bytes": build(metadata=an_array(0, 4 * MILLION, bytes(4 * MILLION))),
    "bools": build(metadata=an_array(7, 4 * MILLION, b"\1" * 4 * MILLION)),
    "floats": build(metadata=an_array(6, MILLION, bytes(4 * MILLION))),
    "empty strings": build(metadata=an_array(8, MILLION // 2, bytes(4 * MILLION))),
    "short strings": build(metadata=an_array(8, MILLION // 4, text("ab") * (MILLION // 4))),
    "a long string": build(metadata=(text("k") + struct.pack("<I", 8) + text("\u00e9" * MILLION),)),
    "a broken string": build(metadata=(text("k") + struct.pack("<IQ", 8, MILLION) + b"\xff" * MILLION,)),
    "keys": build(metadata=entries(60_000)),
    "tensors": build(tensors=[(str(number), (8,), 0, 32 * number) for number in range(20_000)], data=640_000),
}


@pytest.mark.parametrize("what", GREEDY)
def test_memory_is_bounded_by_the_file(what, tmp_path):
    content = GREEDY[what]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with GGUFFile(path) as file:
            assert len(file.metadata) + len(file.tensors) > 2
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (most_memory(content) if what in ("keys", "tensors") else 4 * len(content) + 200_000)


def test_more_entries_than_any_model_has_are_refused(tmp_path):
    with pytest.raises(FormatError, match="70000 metadata entries, allowed are 65536"):
        opened(tmp_path, build(metadata=entries(70_000)))
    with pytest.raises(FormatError, match="140000 tensors, allowed are 131072"):
        opened(tmp_path, build(tensor_count=140_000, data=24 * 140_000))


def test_time_is_linear_in_the_tensors(tmp_path):
    def seconds(count):
        path = tmp_path / f"{count}.gguf"
        tensors = [(str(number), (8,), 0, 32 * (count - 1 - number)) for number in range(count)]
        path.write_bytes(build(tensors=tensors, data=32 * count))
        start = time.process_time()
        with GGUFFile(path) as file:
            assert len(file) == count
        return time.process_time() - start

    # A hundred times as many: squared it would be ten thousand times.
    assert seconds(100_000) < 1000 * max(seconds(1000), 1e-3)


def test_arrays_of_metadata_are_sequences(tmp_path):
    numbers = an_array(4, 3, struct.pack("<3I", 7, 8, 2**32 - 1))
    with opened(tmp_path, build(metadata=numbers)) as file:
        found = file.metadata["k"]
    assert found == [7, 8, 2**32 - 1]
    assert found != [7, 8]
    assert found != "abc"
    assert (len(found), found[-1], found[1:], 8 in found) == (3, 2**32 - 1, [8, 2**32 - 1], True)
    assert type(found[0]) is int
    with pytest.raises(IndexError):
        found[3]
    words = an_array(8, 4, text("a") + text("") + text("\u00e9") + text("d"))
    with opened(tmp_path, build(metadata=words)) as file:
        found = file.metadata["k"]
    assert list(found) == ["a", "", "\u00e9", "d"]
    assert repr(found) == "['a', '', '\u00e9', ... 4 items]"


def test_the_gguf_package_writes_what_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "qwen2")
    writer.add_array("floats", [1.5, 2.5])
    writer.add_array("words", ["a", "\u00e9"])
    writer.add_bool("yes", True)
    weights = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("t", weights)
    writer.add_tensor("h", weights.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "w.gguf") as file:
        assert file.metadata["floats"] == [1.5, 2.5]
        assert file.metadata["words"] == ["a", "\u00e9"]
        assert file.metadata["yes"] is True
        assert torch.equal(file["t"].decode(), torch.from_numpy(weights))
        assert torch.equal(file["h"].decode(), torch.from_numpy(weights))


def test_every_tensor_of_an_export_is_what_the_gguf_package_reads(exported):
    path = exported("q4_k_m")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with GGUFFile(path) as file:
        assert set(file) == set(theirs)
        for name, tensor in theirs.items():
            expected = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(file[name].decode(), torch.from_numpy(expected.copy()))


def test_an_architecture_that_is_not_read_is_named(tmp_path):
    unknown = text("general.architecture") + struct.pack("<I", 8) + text("mamba")
    file = opened(tmp_path, build(metadata=(unknown,)))
    with pytest.raises(
        UnsupportedError,
        match=r"'mamba': read are bert, gemma2, llama, phi3, qwen2, qwen2moe, qwen3, qwen3moe",
    ):
        next(file.state_dict())


def test_hostile_hyperparameters(tmp_path):
    name = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    layers = text("llama.block_count") + struct.pack("<II", 4, 2**30)
    heads = text("llama.attention.head_count") + struct.pack("<II", 4, 4)
    with pytest.raises(FormatError, match="head_count must be a positive number: got None"):
        next(opened(tmp_path, build(metadata=(name, layers))).state_dict())
    with pytest.raises(FormatError, match="1073741824 layers, but only 2 tensors"):
        next(opened(tmp_path, build(metadata=(name, layers, heads))).state_dict())


def test_more_layers_than_any_model_has(tmp_path):
    name = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    layers = text("llama.block_count") + struct.pack("<II", 4, 1030)
    tensors = [(str(number), (8,), 0, 32 * number) for number in range(1030)]
    with (
        opened(tmp_path, build(metadata=(name, layers), tensors=tensors, data=32 * 1030)) as file,
        pytest.raises(FormatError, match="1030 layers, allowed are 1024"),
    ):
        _ = file.layers


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no GGUF file at"):
        GGUFFile(tmp_path / "missing.gguf")


def test_gguf_tensor_checks_its_bytes():
    raw = gguf_encode(torch.ones(2, 64), "q8_0").flatten()
    tensor = GGUFTensor(raw=raw, type="q8_0", shape=(2, 64))
    assert torch.allclose(tensor.decode(), torch.ones(2, 64), atol=1e-3)
    with pytest.raises(InputError, match="has 136 bytes"):
        GGUFTensor(raw=raw[:-1], type="q8_0", shape=(2, 64))
    with pytest.raises(InputError, match="blocks of 32"):
        GGUFTensor(raw=raw, type="q8_0", shape=(4, 31))
