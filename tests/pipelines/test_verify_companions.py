"""What `qkern.verify` says of the files beside the tensors: tokenizer, recipe, further tensor files."""

from __future__ import annotations

import json
import shutil

import pytest

import qkern
from qkern.demo import MODEL
from qkern.errors import FormatError, InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    qkern.quantize(MODEL, method="rtn", scheme="w4g128", output=folder, device="cpu")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def check(verification, name):
    return next(check for check in verification.checks if check.name == name)


def test_nothing_to_say(made):
    found = qkern.verify(made, against=MODEL)
    assert found.is_sound
    assert not any(check.notes for check in found.checks)


def test_damaged_tokenizer(folder):
    content = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(content[: len(content) // 2])
    found = qkern.verify(folder, against=MODEL)
    assert check(found, "config").problems[0].startswith("tokenizer.json is no JSON")
    assert check(found, "error").count == 28  # all else is looked at


def test_tokenizer_of_another_model(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (token for token, number in vocabulary.items() if number in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert qkern.verify(folder).is_sound  # nothing is wrong in itself
    found = qkern.verify(folder, against=MODEL)
    (problem,) = check(found, "original").problems
    assert problem.startswith("tokenizer: 2 tokens have other numbers than the original's")


def test_tokenizer_that_splits_otherwise(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    found = qkern.verify(folder, against=MODEL)
    assert check(found, "original").problems == (
        "tokenizer: it makes other tokens of a text than the original's",
    )


def test_a_description_that_transformers_does_not_read(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (problem,) = check(qkern.verify(folder), "config").problems
    assert problem.startswith("the quantization is said in quantize_config.json alone")
    with pytest.raises(InputError, match="is quantized"):
        qkern.verify(MODEL, against=folder)


def test_grids_of_vectors_are_not_looked_at(folder):
    recipe = json.loads((folder / "qkern.json").read_text())
    (folder / "qkern.json").write_text(json.dumps({**recipe, "grids": {"model.norm": ["w4"]}}))
    assert qkern.verify(folder, against=MODEL).is_sound


@pytest.mark.parametrize("content", ["{}", '{"model": {"type": "nonsense"}}'])
def test_tokenizer_that_cannot_be_built(folder, content):
    (folder / "tokenizer.json").write_text(content)
    found = qkern.verify(folder, against=MODEL)
    assert check(found, "original").problems == ("tokenizer: it is not read, the original's is",)


def test_one_more_token(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    used = [*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]
    token = {**content["added_tokens"][0], "id": max(used) + 1, "content": "<padding>"}
    content["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    found = qkern.verify(folder, against=MODEL)
    assert found.is_sound
    assert "1 tokens are in one of the two alone (first: '<padding>')" in check(found, "original").notes[0]


def test_tokenizer_that_is_not_read_here(folder, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("sentencepiece is needed")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    found = qkern.verify(folder, against=MODEL)
    assert found.is_sound
    assert "sentencepiece is needed" in check(found, "config").notes[0]
    assert check(found, "error").count == 28


def test_tokens_without_a_row(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 70000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 70000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (note,) = check(qkern.verify(folder), "config").notes
    assert note.startswith("the tokenizer has tokens up to 70000, and the embedding ")


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    found = qkern.verify(folder, against=MODEL)
    (note,) = check(found, "original").notes
    assert note.startswith("the original has a tokenizer")
    assert found.is_sound


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_recipe(folder, content):
    (folder / "qkern.json").write_text(content)
    (problem,) = check(qkern.verify(folder), "config").problems
    assert problem.startswith("qkern.json ")


@pytest.mark.parametrize(
    "grids", [["a"], {"a": ["w9"]}, {"a": [16]}, {"a": ["16"]}, {"a": ["f16"]}, {"a": []}, {"a": 4}, 3, None]
)
def test_damaged_grids(folder, grids):
    (folder / "qkern.json").write_text(json.dumps({"grids": grids}))
    (problem,) = check(qkern.verify(folder), "config").problems
    assert problem.startswith("grids of qkern.json is damaged: ")
    with pytest.raises(FormatError, match=r"qkern\.json is damaged"):
        qkern.convert(folder, folder.parent / "out", "gptq_v2")


def test_files_that_are_not_read(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00009-of-00009.safetensors")
    found = qkern.verify(folder)
    (note,) = check(found, "files").notes
    assert note.startswith("model-00009-of-00009.safetensors beside the files of the model")
    assert found.is_sound
