"""Exporting: what goes in, what comes out, and what is refused before a file appears."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkern.checkpoints import QuantizedCheckpoint
from qkern.errors import FormatError, InputError, QkernError, UnsupportedError
from qkern.gguf import GGUFFile
from qkern.ops import dequantize_groupwise, gguf_decode, gguf_encode
from qkern.pipelines import export_gguf
from qkern.schemes import QuantizedWeight


def weights_of(path):
    with GGUFFile(path) as file:
        return dict(file.state_dict())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_f32_weights_come_back_unchanged(model_type, model_folder, tmp_path):
    folder, model = model_folder(model_type)
    report = export_gguf(folder, tmp_path / "model.gguf", "f32")
    weights = weights_of(tmp_path / "model.gguf")
    expected = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(weights) == set(expected) - tied
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    assert report.counts == {"f32": len(weights)}
    assert report.bpw_file == pytest.approx(8 * report.file_bytes / sum(w.numel() for w in weights.values()))


def test_without_grouped_queries_a_file_need_not_name_the_value_heads(model_folder, tmp_path):
    folder, model = model_folder("llama", num_key_value_heads=4)
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    with GGUFFile(tmp_path / "model.gguf") as file:
        del file.metadata["llama.attention.head_count_kv"]
        weights = dict(file.state_dict())
    expected = model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


def test_quantized_weights_are_those_of_the_op(shipped, exported):
    original = load_file(shipped / "model.safetensors")
    weights = weights_of(exported("q4_0", pure=True))
    for name, weight in weights.items():
        expected = original[name].float()
        if expected.dim() == 2:
            expected = gguf_decode(gguf_encode(expected, "q4_0"), "q4_0")
        assert torch.equal(weight, expected), name


def test_an_export_is_reproducible(shipped, exported, tmp_path):
    export_gguf(shipped, tmp_path / "again.gguf", "q4_k_m")
    assert (tmp_path / "again.gguf").read_bytes() == exported("q4_k_m").read_bytes()


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_a_quantized_checkpoint_is_decoded(format, shipped, tmp_path):
    from qkern.pipelines import quantize

    scheme = "w4g64z" if format == "awq" else "w4g64"
    quantize(shipped, method="rtn", scheme=scheme, output=tmp_path / "quantized", format=format)
    export_gguf(tmp_path / "quantized", tmp_path / "model.gguf", "f32")
    weights = weights_of(tmp_path / "model.gguf")
    quantized = 0
    with QuantizedCheckpoint(tmp_path / "quantized") as checkpoint:
        for name in checkpoint:
            value = checkpoint[name]
            if isinstance(value, QuantizedWeight):
                quantized += 1
                assert torch.equal(weights.pop(f"{name}.weight"), dequantize_groupwise(value))
            else:
                assert torch.equal(weights.pop(name), value.float())
    assert quantized == 28
    assert not weights


def test_a_head_of_its_own_is_kept_although_the_config_ties_it(model_folder, tmp_path):
    folder, model = model_folder("qwen2", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert torch.equal(weights_of(tmp_path / "model.gguf")["lm_head.weight"], model.lm_head.weight)


def change(folder, **changes):
    """Change tensors of a folder; None removes one."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, edit in changes.items():
        name = name.replace("__", ".")
        if edit is None:
            del tensors[name]
        else:
            tensors[name] = edit(tensors.get(name))
    save_file(tensors, file, metadata={"format": "pt"})


def poison(tensor):
    tensor[3, 5] = float("nan")
    return tensor


BROKEN = {
    "nan": (
        {"model__layers__1__mlp__up_proj__weight": poison},
        InputError,
        "model.layers.1.mlp.up_proj.weight has NaN",
    ),
    "missing": ({"model__norm__weight": None}, FormatError, r"missing are \['model.norm.weight'\]"),
    "left over": (
        {"model__extra__weight": lambda _: torch.ones(3)},
        FormatError,
        "left over are .*model.extra.weight",
    ),
    "shape": (
        {"model__layers__0__mlp__up_proj__weight": lambda t: t[:-1].contiguous()},
        InputError,
        r"model.layers.0.mlp.up_proj.weight must be \(96, 64\): got \(95, 64\)",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoints_leave_no_file(what, model_folder, tmp_path):
    changes, error, message = BROKEN[what]
    folder, _ = model_folder("qwen3")
    change(folder, **changes)
    with pytest.raises(error, match=message):
        export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_offered_is_named(model_folder, tmp_path):
    folder, _ = model_folder("qwen2")
    with pytest.raises(UnsupportedError, match="unknown GGUF type: got 'q3_k_xl', allowed are"):
        export_gguf(folder, tmp_path / "model.gguf", "q3_k_xl")
    config = json.loads((folder / "config.json").read_text())
    for edit, message in (
        (
            {"model_type": "gpt_neox"},
            "'gpt_neox' is not exported to GGUF: allowed are llama, mistral, qwen2, qwen3",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "'dynamic' is not exported to GGUF: allowed are default",
        ),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **edit}))
        with pytest.raises(UnsupportedError, match=message):
            export_gguf(folder, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be(shipped, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        export_gguf(tmp_path / "none", tmp_path / "model.gguf", "q8_0")
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        export_gguf(shipped, tmp_path / "none" / "model.gguf", "q8_0")
    (tmp_path / "model.gguf").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"model\.gguf exists"):
        export_gguf(shipped, tmp_path / "model.gguf", "q8_0")
    assert (tmp_path / "model.gguf").read_bytes() == b"mine"
    with pytest.raises(InputError, match=r"is a folder: name a file, .*model\.gguf"):
        export_gguf(shipped, tmp_path, "q8_0")


def test_in_the_model_folder_only_a_gguf_is_written(shipped, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in shipped.iterdir():
        (folder / file.name).symlink_to(file)
    for name in ("model-extra.safetensors", "deeper/x.bin"):
        with pytest.raises(InputError, match=r"must end in \.gguf, by which .* a model's own files: name it"):
            export_gguf(folder, folder / name, "q8_0")
    export_gguf(folder, folder / "model.gguf", "q8_0")
    assert {file.name for file in folder.iterdir()} == {file.name for file in shipped.iterdir()} | {
        "model.gguf"
    }


def test_a_full_disk_leaves_no_file(shipped, tmp_path, monkeypatch):
    import gguf

    written = []

    def full(self, tensor):
        written.append(tensor)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(QkernError, match=r"cannot write .*model\.gguf: No space left on device"):
        export_gguf(shipped, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_lost_its_end_is_not_placed(shipped, tmp_path, monkeypatch):
    import gguf

    close = gguf.GGUFWriter.close

    def lossy(self):
        close(self)
        file = next(tmp_path.iterdir())
        os.truncate(file, file.stat().st_size - 100)

    monkeypatch.setattr(gguf.GGUFWriter, "close", lossy)
    with pytest.raises(QkernError, match=r"cannot write .*model\.gguf: .*bytes were stored"):
        export_gguf(shipped, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_closed_leaves_nothing(shipped, tmp_path, monkeypatch):
    import gguf

    close = gguf.GGUFWriter.close

    def full(self):
        close(self)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "close", full)
    with pytest.raises(QkernError, match=r"cannot write .*model\.gguf: No space left on device"):
        export_gguf(shipped, tmp_path / "model.gguf", "q8_0")
    assert list(tmp_path.iterdir()) == []


def run_cli(*arguments):
    from qkern.cli import main

    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code or 0


def test_command_line(shipped, tmp_path, capsys):
    assert run_cli("export-gguf", shipped, "--output", tmp_path / "m.gguf", "--type", "q4_k", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["type"] == "q4_k_m"
    assert report["file_bytes"] == (tmp_path / "m.gguf").stat().st_size
    with GGUFFile(tmp_path / "m.gguf") as file:
        counted = [info.type.name for info in file.tensors.values()]
    assert report["tensors"] == {name: counted.count(name) for name in report["tensors"]}
    assert sum(report["tensors"].values()) == len(counted)

    output = tmp_path / f"[p]{'-long' * 20}.gguf"
    assert run_cli("export-gguf", shipped, "--output", output, "--type", "q4_0", "--pure") == 0
    table = capsys.readouterr().out
    assert table.splitlines()[-1].endswith(f": {output}")
    assert max(map(len, table.splitlines()[:-1])) <= 80
    assert "q4_0" in table
    assert "q6_k" not in table
    assert "bpw_file" in table

    assert run_cli("export-gguf", shipped, "--output", tmp_path / "m.gguf", "--type", "q8_0") == 1
    assert "m.gguf exists" in capsys.readouterr().err


def test_the_name_of_a_model_is_no_path(model_folder, tmp_path, monkeypatch):
    folder, _ = model_folder("llama")
    monkeypatch.chdir(folder)
    for name, model in (("path", folder), ("here", ".")):
        export_gguf(model, tmp_path / f"{name}.gguf", "f32")
        with GGUFFile(tmp_path / f"{name}.gguf") as file:
            assert file.metadata["general.name"] == folder.name


def test_biases_that_llama_cpp_does_not_read_are_refused(model_folder, tmp_path):
    folder, _ = model_folder("qwen3", attention_bias=True)
    with pytest.raises(
        UnsupportedError,
        match=r"attention_bias True is not what llama.cpp's qwen3 computes: allowed is False or None",
    ):
        export_gguf(folder, tmp_path / "model.gguf", "f32")
    assert list(tmp_path.iterdir()) == []
