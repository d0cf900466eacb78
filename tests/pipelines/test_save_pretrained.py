"""``save_pretrained`` of quantized models, and folders that are not, or not quite, a model."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern import replace_linears
from qkern.errors import FormatError, InputError, UnsupportedError
from qkern.pipelines import load, save


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    loaded = load(folder, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        return torch.equal(loaded(ids).logits, model(ids).logits)


def test_save_pretrained_of_quantized_models(tiny, tmp_path):
    model = tiny("llama", dtype=torch.float32)
    quantized = qkern.quantize(model, method="rtn", scheme="w4g32")
    assert saved_and_loaded(quantized, tmp_path / "quantized")
    assert saved_and_loaded(pickle.loads(pickle.dumps(quantized)), tmp_path / "pickled")
    assert saved_and_loaded(copy.deepcopy(quantized), tmp_path / "copied")
    qkern.prepare_qat(model, "w4g32")
    qkern.convert_qat(model)
    assert saved_and_loaded(model, tmp_path / "trained")
    model = tiny("llama")
    replace_linears(model, "w4g32")
    with pytest.raises(UnsupportedError, match=r"qkern\.save\(model, folder\)"):
        model.save_pretrained(tmp_path / "replaced")
    with pytest.raises(UnsupportedError, match=r"qkern\.save\(model, folder\)"):
        pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path / "replaced")
    assert not (tmp_path / "replaced").exists()
    for name, layer in qkern.nn.quant_linears(model).items():
        dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        model.set_submodule(name, dense)
    model.save_pretrained(tmp_path / "dense")
    assert type(load(tmp_path / "dense").model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_the_one_file_is_read_beside_an_older_index(tiny, tmp_path):
    tiny("llama", seed=1).save_pretrained(tmp_path, max_shard_size="50KB")
    model = tiny("llama", seed=2)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = load(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    (problem,) = qkern.verify(tmp_path).checks[0].problems
    assert problem.startswith("model.safetensors lies beside an index of other files")


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="is an adapter of PEFT"):
        load(tmp_path)


def test_integers_for_weights(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].char()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for call in (load, partial(qkern.export_gguf, output=tmp_path / "out.gguf", type="q8_0")):
        with pytest.raises((FormatError, InputError), match=r"layers\.1\.mlp\.up_proj\.weight"):
            call(tmp_path)


def test_what_is_no_model(tmp_path):
    with pytest.raises(InputError, match="got an empty name"):
        load("")
    with pytest.raises(InputError, match="got Linear; write the model"):
        qkern.export_gguf(torch.nn.Linear(4, 4), tmp_path / "out.gguf")
    with pytest.raises(UnsupportedError, match=r"qkern\.export_gguf"):
        qkern.convert(tmp_path, tmp_path / "out", "gguf")
    for call in (load, qkern.verify, partial(qkern.convert, output=tmp_path / "out", to="awq")):
        with pytest.raises(InputError, match=r"a folder, a hub id or a GGUF file: got NoneType"):
            call(None)
    with pytest.raises(InputError, match=r"one of transformers: got Linear"):
        save(torch.nn.Linear(4, 4), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
