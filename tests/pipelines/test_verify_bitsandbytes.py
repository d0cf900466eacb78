"""`qkern.verify` of bitsandbytes folders: sound ones pass, of planted corruptions each is caught."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qkern
from qkern.checkpoints import read_json
from qkern.errors import UnsupportedError
from qkern.ops.codebooks import codebook
from qkern.pipelines.verification.layouts import CODEBOOKS, levels_of

LAYER = "model.layers.0.mlp.up_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__"


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "llama"
    tiny("llama", dtype=torch.bfloat16, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(original, tmp_path_factory):
    """Maker of folders by their scheme, by qkern or (``package-``) by transformers; each is made once."""
    base = tmp_path_factory.mktemp("results")

    def make(name):
        folder, (start, _, kind) = base / name, name.partition("-")
        if folder.exists():
            return folder
        if name == "int8":
            qkern.save(qkern.load(original, int8=True), folder)
        elif start != "package":
            qkern.quantize(original, method="rtn", scheme=name, format="bitsandbytes", output=folder)
        else:
            pytest.importorskip("bitsandbytes")
            options = {"bnb_4bit_quant_type": kind[:3], "bnb_4bit_use_double_quant": kind.endswith("d")}
            four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.uint8, **options)
            given = BitsAndBytesConfig(load_in_8bit=True) if kind == "int8" else four
            model = AutoModelForCausalLM.from_pretrained(
                original, quantization_config=given, dtype=torch.bfloat16, device_map="cpu"
            )
            model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def copied(results, tmp_path):
    return lambda name: shutil.copytree(results(name), tmp_path / name)


def failed(verification):
    return {check.name for check in verification.checks if check.status == "failed"}


RESULTS = ["nf4g64", "nf4g64d", "fp4g32", "fp4g64d", "int8", "w8a8"]


@pytest.mark.parametrize("name", [*RESULTS, "package-nf4", "package-fp4d", "package-int8"])
def test_sound_results(results, original, name):
    found = qkern.verify(results(name), against=original)
    assert found.is_sound, found.as_dict()
    assert found.format == "bitsandbytes"
    checks = {check.name: check for check in found.checks}
    assert checks["error"].count == checks["runtime"].count == len(found.errors) == 14
    assert checks["weights"].count > 14
    assert all(0 < error < 0.3 for error in found.errors.values())


def test_tables_are_the_same_numbers():
    for name in CODEBOOKS:
        assert levels_of(name).tolist() == codebook(name).values.tolist()


# Corruptions: each changes a folder in place


def tensors(change):
    def corrupt(folder):
        stored = load_file(folder / "model.safetensors")
        change(stored)
        stored = {name: tensor.contiguous() for name, tensor in stored.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return corrupt


def replaced(part, function):
    name = f"{LAYER}.{part}"
    return tensors(lambda stored: stored.update({name: function(stored[name].clone())}))


def dropped(part):
    return tensors(lambda stored: stored.pop(f"{LAYER}.{part}"))


def filled(part, place, value):
    def fill(tensor):
        tensor[place] = value
        return tensor

    return replaced(part, fill)


def state(**fields):
    """Corruption of fields of a layer's JSON."""

    def change(stored):
        (name,) = (name for name in stored if name.startswith(STATE))
        found = {**json.loads(bytes(stored[name].tolist())), **fields}
        stored[name] = torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)

    return tensors(change)


def config(**fields):
    def corrupt(folder):
        whole = read_json(folder / "config.json")
        whole["quantization_config"] |= fields
        (folder / "config.json").write_text(json.dumps(whole))

    return corrupt


def by_rows(move, N=128):
    return lambda tensor: move(tensor.view(N, -1)).reshape(tensor.shape)


# Result, what is done to it, and the check that must fail.
ALONE = {
    "truncated quant_state": (
        "nf4g64",
        replaced("weight.quant_state.bitsandbytes__nf4", lambda raw: raw[:40]),
        "config",
    ),
    "missing quant_state": ("nf4g64", dropped("weight.quant_state.bitsandbytes__nf4"), "config"),
    "another codebook in quant_state": ("nf4g64", state(quant_type="fp4"), "config"),
    "a block of 0": ("nf4g64", state(blocksize=0), "config"),
    "a block that is none of theirs": ("nf4g64", state(blocksize=63), "config"),
    "a shorter block": ("nf4g64", state(blocksize=32), "tensors"),
    "a block that does not divide rows": ("nf4g64", state(blocksize=128), "tensors"),
    "a shape that the block does not divide": ("nf4g64", state(shape=[64, 100]), "tensors"),
    "transposed shape": ("nf4g64", state(shape=[64, 128]), "tensors"),
    "nested_offset that is no number": ("nf4g64d", state(nested_offset="0"), "config"),
    "nested_offset NaN": ("nf4g64d", state(nested_offset=float("nan")), "config"),
    "another nested_blocksize": ("nf4g64d", state(nested_blocksize=64), "tensors"),
    "nested_blocksize of 10**13": ("nf4g64d", state(nested_blocksize=10**13), "config"),
    "nested_offset beyond fp32": ("nf4g64d", state(nested_offset=1e300), "config"),
    "NaN absmax": ("nf4g64", filled("weight.absmax", 3, torch.nan), "values"),
    "Inf nested_absmax": ("fp4g64d", filled("weight.nested_absmax", 0, torch.inf), "values"),
    "NaN SCB": ("int8", filled("SCB", 3, torch.nan), "values"),
    "SCB of 0": ("w8a8", filled("SCB", 3, 0.0), "values"),
    "missing absmax": ("fp4g32", dropped("weight.absmax"), "tensors"),
    "missing nested_absmax": ("nf4g64d", dropped("weight.nested_absmax"), "tensors"),
    "missing quant_map": ("nf4g64", dropped("weight.quant_map"), "tensors"),
    "missing SCB": ("int8", dropped("SCB"), "tensors"),
    "another table": ("nf4g64", filled("weight.quant_map", 3, -0.4), "values"),
    "short absmax": ("nf4g64", replaced("weight.absmax", lambda absmax: absmax[:-1]), "tensors"),
    "codes as words": ("nf4g64", replaced("weight", lambda codes: codes.int()), "tensors"),
    "transposed int8": ("int8", replaced("weight", lambda codes: codes.t()), "tensors"),
    "another order of rows": ("int8", replaced("weight_format", lambda kind: kind + 1), "values"),
    "8 bits for 4": ("nf4g64", config(load_in_8bit=True, load_in_4bit=False), "config"),
    "4 bits for 8": ("int8", config(load_in_8bit=False, load_in_4bit=True), "config"),
    "4 bits and 8": ("nf4g64", config(load_in_8bit=True), "config"),
    "neither bits": ("nf4g64", config(load_in_4bit=False), "config"),
    "neither bits, 8": ("int8", config(load_in_8bit=False), "config"),
    "bits that are no bool": ("nf4g64", config(load_in_4bit=1), "config"),
    "quantized layer that is skipped": ("nf4g64", config(llm_int8_skip_modules=["up_proj"]), "config"),
    "16-bit head that is not skipped": ("int8", config(llm_int8_skip_modules=[]), "config"),
    "left-over tensor": (
        "int8",
        tensors(lambda stored: stored.update({f"{LAYER}.weight.absmax": torch.ones(2)})),
        "tensors",
    ),
}
# What only shows beside the original.
AGAINST = {
    "swapped nibbles": ("nf4g64", replaced("weight", lambda codes: codes >> 4 | codes << 4)),
    "swapped nibbles, fp4": ("fp4g64d", replaced("weight", lambda codes: codes >> 4 | codes << 4)),
    "absmax of other rows": ("fp4g32", replaced("weight.absmax", by_rows(lambda absmax: absmax.roll(1, 0)))),
    "nested absmax of other rows": (
        "nf4g64d",
        replaced("weight.absmax", by_rows(lambda absmax: absmax.roll(1, 0))),
    ),
    "another nested_offset": ("nf4g64d", state(nested_offset=0.3)),
    "codes of another row": ("nf4g64", replaced("weight", by_rows(lambda codes: codes.roll(1, 0)))),
    "SCB of another row": ("int8", replaced("SCB", lambda tops: tops.roll(1))),
    "int8 rows of others": ("w8a8", replaced("weight", lambda codes: codes.roll(1, 0))),
}


@pytest.mark.parametrize("what", ALONE)
def test_corruption_shows_by_itself(copied, what):
    name, corrupt, check = ALONE[what]
    folder = copied(name)
    corrupt(folder)
    found = qkern.verify(folder)
    assert check in failed(found), found.as_dict()


@pytest.mark.parametrize("what", AGAINST)
def test_corruption_shows_beside_the_original(copied, original, what):
    name, corrupt = AGAINST[what]
    folder = copied(name)
    corrupt(folder)
    assert qkern.verify(folder).is_sound
    found = qkern.verify(folder, against=original)
    assert failed(found) == {"error"}, found.as_dict()


def test_blocks_across_rows_are_not_judged(copied):
    folder = copied("nf4g64")
    state(blocksize=128)(folder)
    replaced("weight.absmax", lambda absmax: absmax[::2])(folder)
    with pytest.raises(UnsupportedError, match="blocks of 128, which do not divide rows of 64"):
        qkern.verify(folder)


def test_a_block_of_scales_longer_than_all_takes_no_memory(copied, original):
    folder = copied("nf4g64d")
    assert load_file(folder / "model.safetensors")[f"{LAYER}.weight.nested_absmax"].numel() == 1
    state(nested_blocksize=2**31 - 1)(folder)
    assert qkern.verify(folder, against=original).is_sound


def test_skipped_modules_are_patterns(copied):
    folder = copied("nf4g64")
    for entries, is_sound in (
        (["lm_head"], True),
        (["lm_head", r"model\.layers\.[0-9]+\.mlp"], False),
        (["lm_head", "model.layers.0"], False),
        (["lm_head", "model.layers.0."], False),
        (["lm_head", ""], False),
        (["lm_head", "model.layers.0.mlp.up"], True),
        (None, True),
    ):
        config(llm_int8_skip_modules=entries)(folder)
        assert ("config" not in failed(qkern.verify(folder))) == is_sound, entries
