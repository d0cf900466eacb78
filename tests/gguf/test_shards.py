"""A model in several files: llama.cpp's names and keys, and nothing half-written."""

import errno
import json
from pathlib import Path

import pytest
import torch

import gguf
from qkern.errors import InputError, OutputError
from qkern.gguf import GGUFFile
from qkern.pipelines import export_gguf

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_llama_cpp_loads_all_files_from_the_first(shipped, exported, run_gguf, tmp_path):
    report = export_gguf(shipped, tmp_path / "model.gguf", "f32", max_shard_size="2MB")
    count = len(report.files)
    assert count > 3
    expected = [f"model-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    assert [file.name for file in report.files] == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == expected
    assert report.path == report.files[0]
    assert report.file_bytes == sum(file.stat().st_size for file in report.files)

    with GGUFFile(exported("f32")) as file:
        whole = {name: file[name].raw.numpy().tobytes() for name in file}
    parts = {}
    for number, path in enumerate(report.files):
        reader = gguf.GGUFReader(path)
        assert reader.get_field("split.no").contents() == number
        assert reader.get_field("split.count").contents() == count
        assert reader.get_field("split.tensors.count").contents() == len(whole)
        assert (reader.get_field("tokenizer.ggml.tokens") is not None) == (number == 0)
        raw = {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}
        assert len(raw) == 1 or sum(map(len, raw.values())) <= 2_000_000
        parts |= raw
    assert parts == whole
    assert list(parts) == list(whole)

    ids = torch.arange(40)[None]
    assert torch.equal(run_gguf(report.path)(ids), run_gguf(exported("f32"))(ids))


def test_command_line(shipped, tmp_path, capsys):
    from qkern.cli import main

    output = ("--output", str(tmp_path / "m.gguf"))
    with pytest.raises(SystemExit) as stop:
        main(["export-gguf", str(shipped), *output, "--type", "q8_0", "--max-shard-size", "1MB", "--json"])
    assert not stop.value.code
    report = json.loads(capsys.readouterr().out)
    assert [Path(file) for file in report["files"]] == sorted(tmp_path.iterdir())
    assert report["path"] == report["files"][0]
    with pytest.raises(SystemExit) as stop:
        main(["export-gguf", str(shipped), *output, "--type", "q8_0", "--modelfile"])
    assert not stop.value.code
    assert (tmp_path / "Modelfile").read_text().startswith("FROM ./m.gguf\n")


def test_a_dry_run_names_the_files_and_their_size(shipped, tmp_path):
    planned = export_gguf(shipped, tmp_path / "m.gguf", "q4_k_m", max_shard_size="1MB", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    written = export_gguf(shipped, tmp_path / "m.gguf", "q4_k_m", max_shard_size="1MB")
    assert len(written.files) > 1
    assert (planned.files, planned.file_bytes) == (written.files, written.file_bytes)


def test_what_fits_is_one_file(shipped, exported, tmp_path):
    report = export_gguf(shipped, tmp_path / "model.gguf", "q4_k_m", max_shard_size="5GB")
    assert report.files == (tmp_path / "model.gguf",)
    assert report.path.read_bytes() == exported("q4_k_m").read_bytes()


def test_files_in_the_way_and_sizes_that_are_none(shipped, tmp_path):
    with pytest.raises(InputError, match="max_shard_size must be a size"):
        export_gguf(shipped, tmp_path / "model.gguf", "q8_0", max_shard_size="many")
    report = export_gguf(shipped, tmp_path / "model.gguf", "q8_0", max_shard_size="1MB")
    for file in report.files[1:]:
        file.unlink()
    with pytest.raises(InputError, match=r"model-00001-of-0000\d.gguf exists"):
        export_gguf(shipped, tmp_path / "model.gguf", "q8_0", max_shard_size="1MB")
    assert list(tmp_path.iterdir()) == [report.path]


@pytest.mark.parametrize("after", [3, 40])
def test_a_full_disk_leaves_no_file(after, shipped, tmp_path, monkeypatch):
    written = []

    def full(self, tensor):
        written.append(tensor)
        if len(written) > after:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_gguf(shipped, tmp_path / "model.gguf", "f32", max_shard_size="1MB")
    assert list(tmp_path.iterdir()) == []
