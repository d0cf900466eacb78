"""Configurations that say one thing in other words are alike; those that compute otherwise are not."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import gguf
import qkern
from qkern.calibration import meta_model
from qkern.demo import MODEL
from qkern.pipelines.verification.report import Findings
from qkern.pipelines.verification.same_model import compare_models


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


@pytest.fixture
def folder(request, tiny, tokenizer, tmp_path):
    """A model with rows that have no token, and fields that say little."""
    kind, fields = request.param
    sizes = {"vocab_size": len(tokenizer) + 64, "hidden_size": 128, "intermediate_size": 256}
    ends = {"eos_token_id": [tokenizer.eos_token_id, 3], "bos_token_id": None, "pad_token_id": None}
    common = {"max_position_embeddings": 2048, "initializer_range": 0.041}
    model = tiny(kind, dtype=torch.bfloat16, **sizes, **ends, **common, **fields)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


MODELS = [
    ("llama", {"rope_parameters": LLAMA3, "pretraining_tp": 2}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": False, "max_window_layers": 1}),
    ("qwen3", {"max_window_layers": 1}),
]


@pytest.mark.parametrize("folder", MODELS, indirect=True, ids=[kind for kind, _ in MODELS])
def test_configurations_in_other_words(folder, tmp_path):
    path = tmp_path / "model.gguf"
    qkern.export_gguf(folder, path, "q8_0")
    qkern.convert(path, tmp_path / "out", "compressed-tensors")
    for result in (path, tmp_path / "out"):
        found = qkern.verify(result, against=folder)
        assert found.is_sound, found.as_dict()


@pytest.mark.parametrize("folder", MODELS[:1], indirect=True, ids=["llama"])
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rms_norm_eps": 1e-3}, "config.json says rms_norm_eps"),
        ({"hidden_act": "gelu"}, "config.json says hidden_act 'gelu'"),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 100.0}}, "config.json says model.rotary_emb.inv_freq"),
        ({"rope_parameters": {**LLAMA3, "factor": 2.0}}, "config.json says model.rotary_emb.inv_freq"),
        ({"eos_token_id": 5, "attention_dropout": 0.1}, None),
    ],
)
def test_configurations_that_were_changed(folder, tmp_path, fields, problem):
    qkern.quantize(folder, method="rtn", scheme="w4g64", output=tmp_path / "out", device="cpu")

    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    found = qkern.verify(tmp_path / "out", against=folder)
    lines = [line for check in found.checks for line in check.problems]
    assert found.is_sound if problem is None else any(line.startswith(problem) for line in lines), lines


def test_another_architecture_with_the_same_tensors():
    findings = Findings()
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    models = [meta_model(AutoConfig.for_model(kind, **sizes)) for kind in ("llama", "granite")]
    compare_models(*models, findings)
    problems = next(check for check in findings.checks() if check.name == "original").problems
    assert any(line.startswith("config.json says model_type 'llama'") for line in problems)


WINDOWS = [
    ("mistral", {"sliding_window": 512}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0}),
]


@pytest.mark.parametrize("folder", WINDOWS, indirect=True, ids=[kind for kind, _ in WINDOWS])
def test_a_window_is_a_note_of_a_gguf_and_lost_in_a_folder(folder, tmp_path):
    path = tmp_path / "model.gguf"
    qkern.export_gguf(folder, path, "q8_0")
    found = qkern.verify(path, against=folder)
    assert found.is_sound, found.as_dict()
    assert any("sliding_window" in note for check in found.checks for note in check.notes)
    qkern.convert(path, tmp_path / "out", "gptq")
    lines = [
        line for check in qkern.verify(tmp_path / "out", against=folder).checks for line in check.problems
    ]
    assert any(line.startswith("config.json says sliding_window None") for line in lines), lines


@pytest.mark.parametrize("folder", [("mistral", {"sliding_window": None})], indirect=True, ids=["mistral"])
def test_a_window_that_was_not_there(folder, tmp_path):
    qkern.quantize(folder, method="rtn", scheme="w4g64", output=tmp_path / "out", device="cpu")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sliding_window": 16}))
    (problem,) = [
        line for check in qkern.verify(tmp_path / "out", against=folder).checks for line in check.problems
    ]
    assert problem.startswith("config.json says sliding_window 16")


def test_a_gguf_with_other_rotations_and_tokens(tmp_path):
    path = tmp_path / "model.gguf"
    qkern.export_gguf(MODEL, path, "q8_0")
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields["qwen2.rope.freq_base"]
    field.parts[field.data[0]][0] *= 2
    tokens = reader.fields["tokenizer.ggml.tokens"]
    by_length = {}
    for number in tokens.data[300:]:
        by_length.setdefault(len(tokens.parts[number]), []).append(number)
    first, second = next(same for same in by_length.values() if len(same) > 1)[:2]
    kept = tokens.parts[first].copy()
    tokens.parts[first][:] = tokens.parts[second]
    tokens.parts[second][:] = kept
    reader.data.flush()
    del reader
    lines = [line for check in qkern.verify(path, against=MODEL).checks for line in check.problems]
    assert any(line.startswith("the file says model.rotary_emb.inv_freq") for line in lines), lines
    assert any(line.startswith("tokenizer: 2 tokens") for line in lines), lines
