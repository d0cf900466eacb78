"""Folders, shards, the writer's all-or-nothing, and files that are damaged or hostile."""

from __future__ import annotations

import json
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkern.checkpoints import (
    FORMATS,
    CheckpointWriter,
    TensorFolder,
    check_output,
    model_folder,
    new_folder,
    parse_size,
    read_json,
    read_quantized,
)
from qkern.checkpoints.shards import ShardWriter
from qkern.errors import FormatError, InputError, OutputError, QkernError, UnsupportedError
from qkern.ops import quantize_groupwise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def layer(seed: int = 0, scheme: str = "w4g32z", N: int = 64, K: int = 64) -> Any:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    return quantize_groupwise(weight, scheme)


def write(folder: Path, *, format: str | None = "gptq_v2", **kwargs: Any) -> Path:
    with CheckpointWriter(
        folder, format=format, max_shard_size=kwargs.pop("max_shard_size", "5GB")
    ) as writer:
        if format is not None:
            for i in range(3):
                writer.add_quantized(f"layers.{i}.up", layer(i), torch.full((64,), float(i)))
        writer.add_tensor("norm.weight", torch.ones(64, dtype=torch.bfloat16))
        writer.add_tensor("embed.weight", torch.arange(640.0).reshape(10, 64))
        return writer.finish(CONFIG, {"method": "rtn"}, skipped=["lm_head"], **kwargs)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(7, 7), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5MiB", 3 * 2**19), ("200KB", 200_000), ("9B", 9)],
)
def test_parse_size(size: int | str, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "5 XB", "-5GB", "0", 0, "5GB5"])
def test_parse_size_refuses(size: int | str) -> None:
    with pytest.raises(InputError, match="max_shard_size"):
        parse_size(size)


def test_shards_are_safetensors_of_bounded_size(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randint(0, 255, (7,), dtype=torch.uint8),
        "half": torch.randn(5, 3).half(),
        "bf16": torch.randn(4, 9).bfloat16(),
        "wide": torch.randn(3, 3, dtype=torch.float64),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "flag": torch.tensor([True, False]),
        "view": torch.arange(20, dtype=torch.int32).reshape(4, 5).t(),
        "large": torch.arange(100.0),
    }
    writer = ShardWriter(tmp_path, 128)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    with pytest.raises(InputError, match="odd was written twice"):
        writer.add("odd", tensors["odd"])
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        [*(file.name for file in files), "model.safetensors.index.json"]
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    found = {}
    for file in files:
        held = load_file(file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 128
        assert all(index["weight_map"][name] == file.name for name in held)
        with file.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
        assert length % 8 == 0
        for name, tensor in held.items():
            assert header[name]["data_offsets"][0] % tensor.element_size() == 0
        found |= held
    folder = TensorFolder(tmp_path)
    assert set(folder) == set(tensors) == set(found)
    for name, tensor in tensors.items():
        for copy in (found[name], folder[name]):
            assert copy.dtype == tensor.dtype
            assert copy.shape == tensor.shape
            assert torch.equal(copy, tensor)
        assert folder.shape(name) == tuple(tensor.shape)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "bitsandbytes"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "3KB"])
def test_write_and_read(tmp_path: Path, format: str, max_shard_size: str) -> None:
    folder = write(
        tmp_path / "out", format=format if format != "gptq" else "gptq_v2", max_shard_size=max_shard_size
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with read_quantized(folder) as checkpoint:
        assert list(checkpoint.entries) == [f"layers.{i}.up" for i in range(3)]
        assert len(checkpoint) == 8
        assert sorted(checkpoint.plain) == [
            "embed.weight",
            "layers.0.up.bias",
            "layers.1.up.bias",
            "layers.2.up.bias",
            "norm.weight",
        ]
        for i in range(3):
            expected, found = layer(i), checkpoint[f"layers.{i}.up"]
            assert torch.equal(found.codes, expected.codes)
            assert torch.equal(found.scales, expected.scales)
            assert torch.equal(found.zeros, expected.zeros)
        assert checkpoint["norm.weight"].dtype == torch.bfloat16
    recipe = read_json(folder / "qkern.json")
    assert recipe["method"] == "rtn"
    assert recipe["layers"]["layers.0.up"] == {"scheme": "w4g32z"}
    assert (folder / "quantize_config.json").exists() == format.startswith("gptq")
    config = read_json(folder / "config.json")
    assert config["quantization_config"]["quant_method"] == format.removesuffix("_v2")


def test_plain_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", format=None)
    assert set(load_file(folder / "model.safetensors")) == {"norm.weight", "embed.weight"}
    assert "quantization_config" not in read_json(folder / "config.json")
    with pytest.raises(UnsupportedError, match="not quantized"):
        read_quantized(folder)


def test_legacy_configuration_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "gptq", format="gptq_v2")
    config = read_json(folder / "config.json")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with read_quantized(folder) as checkpoint:
        assert checkpoint.format is FORMATS["gptq_v2"]
    folder = write(tmp_path / "awq", format="awq")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quant_config.json").write_text(
        json.dumps({"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"})
    )
    with read_quantized(folder) as checkpoint:
        assert torch.equal(checkpoint["layers.0.up"].codes, layer(0).codes)


def test_companions_are_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "modeling_x.py",
        "notes.md",
    ):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    folder = write(tmp_path / "out", tokenizer_from=source, custom_files=["modeling_x.py"])
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "modeling_x.py"):
        assert (folder / name).read_text() == name
    assert (folder / "additional_chat_templates" / "tool.jinja").read_text() == "tool"
    assert not (folder / "notes.md").exists()
    with pytest.raises(InputError, match=r"\.\./x\.py"):
        write(tmp_path / "other", tokenizer_from=source, custom_files=["../x.py"])
    assert not (tmp_path / "other").exists()


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    for name, problem in (("full", "not empty"), ("file", "no folder")):
        with pytest.raises(InputError, match=problem):
            check_output(tmp_path / name)
        with pytest.raises(InputError, match=problem):
            CheckpointWriter(tmp_path / name, format="gptq")
    (tmp_path / "empty").mkdir()
    assert write(tmp_path / "empty") == tmp_path / "empty"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert (tmp_path / "full" / "precious").read_text() == "data"


def test_an_output_in_the_model_folder_or_around_it_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "models" / "m"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    for output in (model, model / "q", model / "deep" / "q", tmp_path / "link" / "q", tmp_path / "models"):
        with pytest.raises(InputError, match=r"same or one inside the other.*beside it, .*m-quantized"):
            check_output(output, source=model)
    assert list(model.iterdir()) == []
    for source in (None, "", "owner/name", tmp_path / "missing"):
        assert check_output(model / "q", source=source) == model / "q"
    assert check_output(tmp_path / "models" / "m-q", source=model) == tmp_path / "models" / "m-q"


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_folders_that_cannot_be_replaced_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"the current folder.*name a folder in it: model"):
        check_output(".")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda path: path.name == "disk")
    with pytest.raises(InputError, match=r"mount point.*name a folder in it"):
        check_output("disk")


def test_what_another_writer_left_behind_is_not_touched(tmp_path: Path) -> None:
    first = CheckpointWriter(tmp_path / "out", format=None)  # as of a run that was killed
    write(tmp_path / "out")
    assert first._folder.is_dir()
    first.abort()


def test_any_failure_leaves_nothing(tmp_path: Path) -> None:
    def leave_early() -> None:
        with CheckpointWriter(tmp_path / "a", format="gptq") as writer:
            writer.add_quantized("m", layer(scheme="w4g32"))

    def crash() -> None:
        with CheckpointWriter(tmp_path / "b", format="gptq") as writer:
            writer.add_quantized("m", layer(scheme="w4g32"))
            raise KeyboardInterrupt

    def unheld() -> None:
        with CheckpointWriter(tmp_path / "c", format="awq") as writer:
            writer.add_quantized("m", layer(scheme="w3g32"))

    def nothing_quantized() -> None:
        with CheckpointWriter(tmp_path / "d", format="awq") as writer:
            writer.add_tensor("m", torch.ones(3))
            writer.finish(CONFIG)

    def bad_recipe() -> None:
        with CheckpointWriter(tmp_path / "e", format="gptq") as writer:
            writer.add_quantized("m", layer(scheme="w4g32"))
            writer.finish(CONFIG, {"error": float("nan")})

    for action, error in (
        (leave_early, InputError),
        (crash, KeyboardInterrupt),
        (unheld, UnsupportedError),
        (nothing_quantized, InputError),
        (bad_recipe, InputError),
    ):
        with pytest.raises(error):
            action()
        assert list(tmp_path.iterdir()) == [], action.__name__


@contextmanager
def file_size_limit(count: int) -> Iterator[None]:
    """Writes beyond `count` bytes of a file fail as on a full disk, with another errno."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [500, 5000, 9000, 12_000])
def test_disk_full_in_the_middle(tmp_path: Path, limit: int) -> None:
    with file_size_limit(limit), pytest.raises(QkernError, match="no half-written output was left") as error:
        write(tmp_path / "out")
    assert "File too large" in str(error.value)
    assert str(tmp_path / "out") in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "report"
    with new_folder(output) as folder:
        (folder / "a.txt").write_text("a")
        assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == ["report"]
    assert (output / "a.txt").read_text() == "a"
    with pytest.raises(InputError, match="not empty"), new_folder(output):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), OSError(28, "No space left on device")])
def test_a_new_folder_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with new_folder(tmp_path / "deep" / "report") as folder:
            (folder / "half").write_text("half")
            raise error

    expected = OutputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="disk is full" if isinstance(error, OSError) else None):
        write()
    assert not list((tmp_path / "deep").iterdir())


def test_parent_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file; choose another"):
        CheckpointWriter(tmp_path / "file" / "out", format="gptq")


def test_model_folder(tmp_path: Path) -> None:
    assert model_folder(tmp_path) == tmp_path
    with pytest.raises(InputError, match="does not exist"):
        model_folder(tmp_path / "nothing")
    (tmp_path / "model.gguf").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        model_folder(tmp_path / "model.gguf")


def test_hub_ids_are_asked_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, allow_patterns, local_files_only))
        if name.startswith("nobody"):
            raise OSError("no such repository\nlong story")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_folder("somebody/model-7B") == tmp_path
    assert not any(pattern.endswith((".py", ".bin")) for pattern in asked[0][1])
    with pytest.raises(InputError, match=r"nobody/x .*: no such repository$"):
        model_folder("nobody/x")
    with pytest.raises(InputError, match=r"nobody/x is no folder .* on this disk: .*hf download nobody/x"):
        model_folder("nobody/x", fetch=False)
    assert [local for _, _, local in asked] == [False, False, True]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}}'])
def test_json_that_is_not_an_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json is missing"):
        read_quantized(tmp_path)
    with pytest.raises(FormatError, match="no safetensors"):
        TensorFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        TensorFolder(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert list(TensorFolder(tmp_path)) == ["a"]
    save_file({"b": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(FormatError, match="2 safetensors files"):
        TensorFolder(tmp_path)


def hostile_header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        hostile_header(b"{}", 2**62),
        hostile_header(b"not json"),
        hostile_header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
        hostile_header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}') + b"\0" * 4,
        hostile_header(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}') + b"\0" * 16,
        hostile_header(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}') + b"\0" * 4,
    ],
)
def test_hostile_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors is truncated or no safetensors file"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_truncated_shard_is_named(tmp_path: Path, keep: float) -> None:
    folder = write(tmp_path / "out", max_shard_size="3KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(FormatError, match=shard.name):
        read_quantized(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index: index.pop("weight_map"), "weight_map"),
        (lambda index: index.update(weight_map=[1]), "weight_map"),
        (lambda index: index["weight_map"].update(x=3), "weight_map"),
        (lambda index: index["weight_map"].update(x="../../secret.safetensors"), "same folder"),
        (lambda index: index["weight_map"].update(x="/etc/passwd"), "same folder"),
        (lambda index: index["weight_map"].update(x="model-9.safetensors"), "model-9.safetensors is missing"),
        (lambda index: index["weight_map"].update(x="model-00001-of-00007.safetensors"), "missing are x"),
        (lambda index: index["weight_map"].pop("norm.weight"), "left over are norm.weight"),
    ],
)
def test_hostile_index(tmp_path: Path, change: Any, problem: str) -> None:
    folder = write(tmp_path / "out", max_shard_size="3KB")
    count = len(list(folder.glob("model-*.safetensors")))
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text().replace(f"of-{count:05d}", "of-00007"))
    for shard in folder.glob("model-*.safetensors"):
        shard.rename(folder / shard.name.replace(f"of-{count:05d}", "of-00007"))
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(FormatError, match=problem):
        TensorFolder(folder)


def rewrite(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("layers.1.up.qweight"), r"layers\.1\.up\.\w+.* belong to layers without qweight"),
        (
            lambda t: t.pop("layers.1.up.scales"),
            r"model\.safetensors: tensor layers\.1\.up\.scales is missing",
        ),
        (lambda t: t["layers.1.up.scales"].fill_(float("nan")), "scales of layers.1.up have NaN"),
        (lambda t: t["layers.1.up.g_idx"].fill_(99), "g_idx must number groups"),
        (lambda t: t.update({"layers.1.up.weight": torch.ones(2)}), "layers.1.up are there both"),
        (lambda t: [t.pop(name) for name in list(t) if "up" in name], "no tensor name ends in .qweight"),
    ],
)
def test_incomplete_layers(tmp_path: Path, change: Any, problem: str) -> None:
    folder = write(tmp_path / "out")
    rewrite(folder, change)
    with pytest.raises(FormatError, match=problem), read_quantized(folder) as checkpoint:
        dict(checkpoint.items())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bits": 5}, "quantization_config: unsupported bits"),
        ({"quant_method": "aqlm"}, "quant_method 'aqlm' is not read"),
    ],
)
def test_configuration_errors_name_the_file(tmp_path: Path, change: dict, problem: str) -> None:
    folder = write(tmp_path / "out")
    config = read_json(folder / "config.json")
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=rf"config\.json: {problem}"):
        read_quantized(folder)
