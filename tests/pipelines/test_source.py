"""Folders as the layer-by-layer verbs see them: each expert has its linears, one layer at a time."""

import copy
import gc
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.calibration import LayerStream
from qkern.checkpoints import QuantizedCheckpoint, TensorFolder
from qkern.errors import FormatError, UnsupportedError
from qkern.nn import unfuse_experts
from qkern.pipelines import source
from qkern.pipelines.source import open_source

IDS = torch.randint(3, 96, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mixture(tiny, tmp_path, monkeypatch):
    """Maker of folders that hold each expert by itself, and the model; nothing may load them whole."""
    monkeypatch.setattr(source, "load_whole", lambda *_: pytest.fail("it was loaded whole"))

    def make(model_type, **sizes):
        model = tiny(model_type, **sizes)
        model.save_pretrained(tmp_path / model_type)
        assert any(".experts.0." in name for name in load_file(tmp_path / model_type / "model.safetensors"))
        return tmp_path / model_type, model

    return make


def equal(opened, model):
    unfused = copy.deepcopy(model)
    assert unfuse_experts(unfused)
    for name, expected in unfused.state_dict().items():
        assert torch.equal(opened.weights.get(name), expected), name
        header = opened.header(name)
        assert (header.is_meta, header.shape, header.dtype) == (True, expected.shape, expected.dtype)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_weights_are_those_that_transformers_has_in_memory(model_type, tied, mixture, caplog):
    folder, model = mixture(model_type, tie_word_embeddings=tied)
    equal(open_source(folder), model)
    equal(open_source(model), model)
    assert caplog.records == []
    matrix = qkern.imatrix(folder, calibration=IDS)
    whole = qkern.imatrix(model, calibration=IDS)
    assert set(matrix.entries) == set(whole.entries)
    for name, entry in matrix.entries.items():
        assert torch.equal(entry.sums, whole.entries[name].sums), name
        assert torch.equal(entry.counts, whole.entries[name].counts)


@pytest.mark.parametrize(
    ("model_type", "dense"),
    [("qwen2_moe", {"mlp_only_layers": [0]}), ("qwen3_moe", {"decoder_sparse_step": 2})],
)
def test_layers_without_experts_have_none(model_type, dense, mixture, tmp_path):
    folder, model = mixture(model_type, num_hidden_layers=4, **dense)
    equal(open_source(folder), model)
    report = qkern.quantize(folder, method="rtn", scheme="w4g16", skip=["experts"], output=tmp_path / "out")
    assert any(name.endswith("layers.0.mlp.up_proj") for name in report.layers)
    assert not any(".experts." in name for name in report.layers)
    with pytest.raises(UnsupportedError, match=r"is not what llama\.cpp's"):
        qkern.imatrix(folder, calibration=IDS)


def alive():
    """Bytes of the parameters in memory."""
    found = [value for value in gc.get_objects() if type(value) is torch.nn.Parameter and not value.is_meta]
    return sum({value.data_ptr(): value.untyped_storage().nbytes() for value in found}.values())


def test_one_layer_is_in_memory_at_a_time(mixture, monkeypatch):
    folder, model = mixture("mixtral", num_hidden_layers=6, num_local_experts=8, hidden_size=128)
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    del model
    advance, seen = LayerStream.advance, []

    def counting(self, index):
        seen.append(alive())
        advance(self, index)

    monkeypatch.setattr(LayerStream, "advance", counting)
    gc.collect()
    before = alive()
    qkern.imatrix(folder, calibration=IDS)
    assert len(seen) == 6
    assert max(seen) - before == layer


def test_experts_that_are_skipped_are_written_as_they_are(mixture, tmp_path):
    folder, _ = mixture("mixtral")
    qkern.quantize(folder, method="rtn", scheme="w4g32", skip=["experts"], output=tmp_path / "quantized")
    with QuantizedCheckpoint(tmp_path / "quantized") as checkpoint:
        assert len(checkpoint.entries) == 2 * 4
        kept = {name: tensor for name, tensor in TensorFolder(folder).items() if ".experts." in name}
        assert len(kept) == 2 * 4 * 3
        for name, expected in kept.items():
            assert torch.equal(checkpoint.tensors[name], expected), name


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_experts_that_differ_are_named(mixture):
    folder, _ = mixture("qwen3_moe")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def cut(tensors):
        tensors[name] = tensors[name][:, :32].contiguous()

    change(folder, cut)
    with pytest.raises(FormatError, match=rf"{name} .* must be \[48, 64\] by the config: got \[48, 32\]"):
        qkern.imatrix(folder, calibration=IDS)


def test_a_missing_expert_is_named(mixture):
    folder, _ = mixture("qwen3_moe")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    change(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(FormatError, match=rf"does not fit its config\.json: missing are \['{name}'\]"):
        qkern.imatrix(folder, calibration=IDS)


def test_a_folder_of_stacks_is_known_by_its_files(mixture, monkeypatch):
    folder, _ = mixture("mixtral")
    opened = open_source(folder)
    monkeypatch.setattr(type(opened.weights), "get", lambda *_: pytest.fail("it was read"))
    assert opened.identity() == open_source(folder).identity()


def test_a_config_of_the_wrong_types_is_named(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": "many"}))
    with pytest.raises(
        FormatError, match=r"config\.json is no configuration that transformers reads: .*hidden_size"
    ):
        open_source(tmp_path)
