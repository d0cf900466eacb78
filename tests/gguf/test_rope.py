"""Rotary positions that llama.cpp does not have, or that are damaged, are refused by key and value."""

import json
import subprocess
import sys

import pytest

from qkern.errors import FormatError, UnsupportedError
from qkern.pipelines import export_gguf

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
    "long_factor": [2.0] * 8,
    "short_factor": [1.0] * 8,
}
LOADS = """
import sys
from qkern.evaluation.llama_cpp import LlamaCpp
LlamaCpp(sys.argv[1], context=64, threads=1)
"""


@pytest.fixture
def export(model_folder, tmp_path):
    """Maker of files of a model in whose ``config.json`` keys were changed; None for one removes it."""
    folders = {}

    def make(model_type, to, *without, **changes):
        if model_type not in folders:
            folder = model_folder(model_type)[0]
            folders[model_type] = folder, json.loads((folder / "config.json").read_text())
        folder, config = folders[model_type]
        config = {key: value for key, value in config.items() if key not in without} | changes
        (folder / "config.json").write_text(json.dumps(config))
        path = tmp_path / f"{to}.gguf"
        export_gguf(folder, path, "f32")
        return path

    return make


STRANGE = {
    "truncate": ("llama", {**YARN, "truncate": False}, "'yarn' with truncate False is not exported"),
    # transformers takes null for no.
    "null": ("llama", {**YARN, "truncate": None}, "'yarn' with truncate None is not exported"),
    "beta": ("qwen2", {**YARN, "beta_fast": 64.0, "mscale": 0.7}, "with beta_fast 64.0, mscale 0.7 is"),
    "attention": ("llama", {**YARN, "attention_factor": 1.0}, "with attention_factor 1.0 is"),
    "linear": ("llama", {**LINEAR, "low_freq_factor": 2.0}, "allowed are .*_factor, factor; take the others"),
    "llama3": ("llama", {**LLAMA3, "attention_factor": 2.0}, "'llama3' with attention_factor 2.0"),
    "default": ("qwen2", {**DEFAULT, "mrope_section": [2, 3, 3]}, r"with mrope_section \[2, 3, 3\]"),
    "longrope": ("phi3", {**LONGROPE, "short_mscale": 1.2}, "'longrope' with short_mscale 1.2"),
    "backwards": ("llama", {**YARN, "factor": 0.5}, "'yarn' with factor 0.5 .*at least 1"),
    "part of llama": ("llama", {**DEFAULT, "partial_rotary_factor": 0.5}, r"factor 0.5 .*llama comp.* is 1"),
    "part of qwen2": ("qwen2", {**DEFAULT, "partial_rotary_factor": 0.5}, r"factor 0.5 .*qwen2 comp.* is 1"),
    "part of gemma2": ("gemma2", {**DEFAULT, "partial_rotary_factor": 0.5}, r"factor 0.5 .*gemma2 computes"),
    "odd part": ("phi3", {**DEFAULT, "partial_rotary_factor": 0.7}, "0.7 rotates 11 of the 16"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_llama_cpp_does_not_rotate_is_refused(what, export, tmp_path):
    model_type, rope, message = STRANGE[what]
    with pytest.raises(UnsupportedError, match=message):
        export(model_type, "model", rope_parameters=rope)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_an_older_configuration_with_a_part_is_refused(model_type, export):
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor 0\.5"):
        export(model_type, "model", "rope_parameters", rope_theta=1e4, partial_rotary_factor=0.5)


def test_llama_cpp_loads_a_part_of_phi3(export):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'qkern[llama]'")
    path = export("phi3", "model", rope_parameters={**DEFAULT, "partial_rotary_factor": 0.5})
    # llama.cpp ends the process where it does not rotate a part.
    subprocess.run([sys.executable, "-c", LOADS, path], check=True, capture_output=True)


DAMAGED = {
    "theta null": ("llama", {**DEFAULT, "rope_theta": None}, "rope_theta .*got None"),
    "theta text": ("llama", {**DEFAULT, "rope_theta": "a"}, "rope_theta .*got 'a'"),
    "theta bool": ("qwen2", {**DEFAULT, "rope_theta": True}, "rope_theta .*got True"),
    "theta nan": ("qwen2", {**DEFAULT, "rope_theta": float("nan")}, "rope_theta .*got nan"),
    "theta inf": ("qwen2", {**DEFAULT, "rope_theta": float("inf")}, "rope_theta .*got inf"),
    "theta 0": ("qwen2", {**DEFAULT, "rope_theta": 0}, "rope_theta .*got 0"),
    "theta huge": ("qwen2", {**DEFAULT, "rope_theta": 10**400}, "rope_theta .*got 1000"),
    "part": ("phi3", {**DEFAULT, "partial_rotary_factor": 1.5}, "partial_rotary_factor .*from 1e-06 to 1: "),
    "part null": ("llama", {**LINEAR, "partial_rotary_factor": None}, "partial_rotary_factor .*got None"),
    "factor": ("llama", {**LINEAR, "factor": None}, "factor .*got None"),
    "factor bool": ("llama", {**LINEAR, "factor": True}, "factor .*got True"),
    "factor negative": ("llama", {**YARN, "factor": -4.0}, "factor .*got -4.0"),
    "low": ("llama", {**LLAMA3, "low_freq_factor": 0.0}, "low_freq_factor .*got 0.0"),
    "low is high": (
        "llama",
        {**LLAMA3, "low_freq_factor": 4.0},
        "high_freq_factor must be above .*, 4: got 4",
    ),
    "context": ("llama", {**YARN, "original_max_position_embeddings": 16.5}, "an integer .*got 16.5"),
    "factors": ("phi3", {**LONGROPE, "long_factor": [2.0] * 7 + [-1.0]}, "long_factor .*got -1.0"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_parameters_are_named(what, export, tmp_path):
    model_type, rope, message = DAMAGED[what]
    with pytest.raises(FormatError, match=message):
        export(model_type, "model", rope_parameters=rope)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("theta", "given"), [(None, "None"), ("a", "'a'")])
def test_a_damaged_older_configuration_is_named(theta, given, export):
    with pytest.raises(FormatError, match=f"rope_theta .*got {given}"):
        export("llama", "model", "rope_parameters", rope_theta=theta)


def test_null_is_the_default_where_transformers_takes_it(export):
    plain = export("llama", "plain", rope_parameters=DEFAULT)
    null = export("llama", "null", rope_parameters={**DEFAULT, "partial_rotary_factor": None})
    assert null.read_bytes() == plain.read_bytes()
    older = export("llama", "older", "rope_parameters", rope_theta=1e4, partial_rotary_factor=None)
    assert older.read_bytes() == plain.read_bytes()
    nulls = dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale"))
    plain = export("llama", "yarn", rope_parameters=YARN, max_position_embeddings=64)
    null = export(
        "llama",
        "nulls",
        rope_parameters={**YARN, **nulls, "factor": None, "truncate": True},
        max_position_embeddings=64,
    )
    assert null.read_bytes() == plain.read_bytes()
