"""The reader trusts nothing: every damaged file is a FormatError, within a moment and without memory."""

import random
import struct

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
    for name, dimensions, kind, offset in tensors:
        head += text(name) + struct.pack("<I", len(dimensions))
        head += struct.pack(f"<{len(dimensions)}Q", *dimensions) + struct.pack("<IQ", kind, offset)
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


def test_mutated_files_raise_nothing_else(exported, tmp_path):
    original = exported("q4_0").read_bytes()
    # The head alone carries structure; the data is cut so that 300 files cost little.
    content = original[:60_000] + bytes(64)
    generator = random.Random(0)
    small = build()
    refused = 0
    for trial in range(300):
        damaged = bytearray(small if trial % 3 else content)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(min(len(damaged), 400))] = generator.choice((0, 1, 127, 128, 255))
        if generator.random() < 0.2:
            del damaged[generator.randrange(len(damaged)) :]
        try:
            file = opened(tmp_path, bytes(damaged))
            for name in file:
                file[name].decode()
        except (FormatError, UnsupportedError):
            refused += 1
    assert refused > 150


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
