"""What `qkern.verify` says of the files beside the tensors: tokenizer, recipe, further tensor files."""

from __future__ import annotations

import json
import shutil

import pytest

import qkern
from qkern.demo import MODEL


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
    assert "has no tokenizer that transformers reads" in check(found, "files").problems[0]


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


def test_tokens_without_a_row(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 70000, "content": "<far>"})
    content["model"]["vocab"]["<far>"] = 70000
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (note,) = check(qkern.verify(folder), "files").notes
    assert note.startswith("the tokenizer has tokens up to 70000, and the embedding ")


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert not check(qkern.verify(folder), "files").notes
    found = qkern.verify(folder, against=MODEL)
    assert check(found, "original").notes == ("the original has a tokenizer, the folder has none",)
    assert found.is_sound


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_recipe(folder, content):
    (folder / "qkern.json").write_text(content)
    (problem,) = check(qkern.verify(folder), "config").problems
    assert problem.startswith("qkern.json ")


@pytest.mark.parametrize("decoded", [["a"], {"a": "w9"}, 3, None])
def test_damaged_recipe_of_a_converted_folder(folder, decoded):
    (folder / "qkern.json").write_text(
        json.dumps({"converted_from": "gguf", "layers": {}, "decoded": decoded})
    )
    (problem,) = check(qkern.verify(folder), "config").problems
    assert problem.startswith("layers of qkern.json are damaged: ")


def test_files_that_are_not_read(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00009-of-00009.safetensors")
    found = qkern.verify(folder)
    (note,) = check(found, "files").notes
    assert note.startswith("model-00009-of-00009.safetensors beside the files of the model")
    assert found.is_sound
