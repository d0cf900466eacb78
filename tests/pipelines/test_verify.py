"""`qkern.verify` passes what is sound; of planted corruptions each is caught by its check."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.checkpoints import read_json
from qkern.demo import CALIBRATION, HELDOUT, MODEL
from qkern.errors import InputError, UnsupportedError
from qkern.nn import quant_linears
from qkern.ops import pack_bits, unpack_bits
from qkern.pipelines.verification import configuration, layouts, safetensors_files
from qkern.pipelines.verification.safetensors_files import read_folder
from qkern.pipelines.verify import CHECKS

LAYER = "model.layers.0.mlp.up_proj"
SQUARE = "model.layers.1.self_attn.q_proj"
INDEX = "model.safetensors.index.json"
# Name of a result: how it is quantized.
RESULTS = {
    "gptq": {"scheme": "w4g32", "format": "gptq"},
    "gptq-z": {"scheme": "w4g32z", "format": "gptq_v2"},
    "gptq-w3": {"scheme": "w3", "format": "gptq_v2"},
    "gptq-short": {"scheme": "w8g64", "format": "gptq"},
    "desc-act": {"scheme": "w4g32", "format": "gptq_v2", "method": "gptq", "act_order": "desc_act"},
    "awq": {"scheme": "w4g32z", "format": "awq"},
    "awq-symmetric": {"scheme": "w4g32", "format": "awq"},
    "compressed": {"scheme": "w4g32z", "format": "compressed-tensors"},
    "compressed-w3": {"scheme": "w3g32z", "format": "compressed-tensors"},
    "compressed-w2": {"scheme": "w2g16", "format": "compressed-tensors"},
    "w8a8": {"scheme": "w8a8", "format": "compressed-tensors"},
    "w8a8-static": {"scheme": "w8a8", "format": "compressed-tensors", "activations": "static"},
    "sharded": {"scheme": "w4g32", "format": "gptq", "max_shard_size": "40KB"},
    "head": {"scheme": "w4g32", "format": "compressed-tensors", "include": ["lm_head"]},
}


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "llama"
    tiny("llama", dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(original, tmp_path_factory):
    """Maker of folders by the names of `RESULTS`; each is made once."""
    made = {}
    ids = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))

    def make(name):
        if name not in made:
            options = {"method": "rtn", **RESULTS[name]}
            calibration = ids if {"gptq", "static"} & set(map(str, options.values())) else None
            made[name] = tmp_path_factory.mktemp("results") / name
            qkern.quantize(original, output=made[name], calibration=calibration, device="cpu", **options)
        return made[name]

    return make


@pytest.fixture
def copied(results, tmp_path):
    return lambda name: shutil.copytree(results(name), tmp_path / name)


def failed(verification):
    return {check.name for check in verification.checks if check.status == "failed"}


def problems(verification, name):
    return " ".join(next(check.problems for check in verification.checks if check.name == name))


@pytest.mark.parametrize("name", RESULTS)
def test_sound_results(results, original, name):
    found = qkern.verify(results(name), against=original)
    assert found.is_sound, found.as_dict()
    assert found.format == RESULTS[name]["format"]
    checks = {check.name: check for check in found.checks}
    assert tuple(checks) == tuple(CHECKS)
    layers = 15 if name == "head" else 14
    assert checks["error"].count == checks["runtime"].count == len(found.errors) == layers
    assert all(0 < error < 0.6 for error in found.errors.values())
    assert checks["weights"].count > layers
    assert checks["kl"].status == "skipped"


# Corruptions: each changes a folder in place


def tensors(change):
    """Corruption of the tensors in ``model.safetensors``."""

    def corrupt(folder):
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(
            {name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors"
        )

    return corrupt


def config(**fields):
    """Corruption of fields of the configuration, in all files that have it."""

    def corrupt(folder):
        whole = read_json(folder / "config.json")
        whole["quantization_config"] |= fields
        (folder / "config.json").write_text(json.dumps(whole))
        if (folder / "quantize_config.json").exists():
            (folder / "quantize_config.json").write_text(json.dumps(whole["quantization_config"]))

    return corrupt


def model_config(**fields):
    """Corruption of what the configuration says of the model."""

    def corrupt(folder):
        whole = read_json(folder / "config.json") | fields
        (folder / "config.json").write_text(json.dumps(whole))

    return corrupt


def groups_config(**fields):
    """The same of the weights of compressed-tensors' only group."""

    def corrupt(folder):
        (group,) = read_json(folder / "config.json")["quantization_config"]["config_groups"].values()
        config(config_groups={"group_0": {**group, "weights": {**group["weights"], **fields}}})(folder)

    return corrupt


def replace(name, function):
    return tensors(lambda stored: stored.update({name: function(stored[name].clone())}))


def filled(name, place, value):
    def fill(tensor):
        tensor[place] = value
        return tensor

    return replace(name, fill)


def swapped_nibbles(words):
    return ((words >> 4) & 0x0F0F0F0F) | ((words & 0x0F0F0F0F) << 4)


def nibbles_in_order(words):
    """AWQ's words as if their nibbles were columns 0 to 7."""
    wide = words.long()
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    moved = sum(((wide >> 4 * place) & 15) << 4 * column for place, column in enumerate(order))
    return torch.where(moved >= 1 << 31, moved - (1 << 32), moved).int()


def transposed(words):
    codes = unpack_bits(words.t().contiguous(), 4, (64, 64), layout="dense")
    return pack_bits(codes.t().contiguous(), 4, layout="dense").t()


def zeros_plus_one(words):
    zeros = unpack_bits(words, 4, (words.shape[0], words.shape[1] * 8), layout="dense")
    return pack_bits((zeros + 1).clamp(max=15), 4, layout="dense")


def drop(name):
    return tensors(lambda stored: stored.pop(name))


def without_shard(folder):
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()


def truncated_shard(folder):
    file = sorted(folder.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def index_with_wrong_file(folder):
    index = read_json(folder / INDEX)
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        file for file in files if file != index["weight_map"]["model.norm.weight"]
    )
    (folder / INDEX).write_text(json.dumps(index))


def index_without_a_tensor(folder):
    index = read_json(folder / INDEX)
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))


# Result, what is done to it, and the check that must fail.
ALONE = {
    "missing shard": ("sharded", without_shard, "files"),
    "truncated shard": ("sharded", truncated_shard, "files"),
    "index naming a wrong file": ("sharded", index_with_wrong_file, "files"),
    "index without a tensor": ("sharded", index_without_a_tensor, "files"),
    "missing tensor of a layer": ("gptq", drop(f"{LAYER}.qzeros"), "tensors"),
    "missing plain tensor": ("awq", drop("model.norm.weight"), "tensors"),
    "left-over tensor": (
        "gptq",
        tensors(lambda stored: stored.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)})),
        "tensors",
    ),
    "left-over tensor of a layer": (
        "awq",
        tensors(lambda stored: stored.update({f"{LAYER}.g_idx": torch.zeros(64, dtype=torch.int32)})),
        "tensors",
    ),
    "wrong bits": ("gptq", config(bits=8), "tensors"),
    "wrong bits, compressed-tensors": ("compressed", groups_config(num_bits=8), "tensors"),
    "wrong group size": ("awq", config(group_size=16), "tensors"),
    "wrong group size, compressed-tensors": ("compressed", groups_config(group_size=64), "tensors"),
    "sym where codes are asymmetric": ("gptq-z", config(sym=True), "values"),
    "no sym where codes are symmetric": ("gptq", config(sym=False), "config"),
    "symmetric, compressed-tensors": ("compressed", groups_config(symmetric=True), "tensors"),
    "AWQ without zero points": ("awq", config(zero_point=False), "values"),
    "v1 read as v2, symmetric": ("gptq", config(checkpoint_format="gptq_v2", format="gptq_v2"), "values"),
    "zeros off by one, symmetric": ("gptq", replace(f"{LAYER}.qzeros", zeros_plus_one), "values"),
    "NaN scale": ("gptq", filled(f"{LAYER}.scales", (0, 5), torch.nan), "values"),
    "Inf scale": ("compressed", filled(f"{LAYER}.weight_scale", (3, 1), torch.inf), "values"),
    "zero scales": ("awq", filled(f"{LAYER}.scales", 1, 0.0), "values"),
    "g_idx out of range": ("desc-act", filled(f"{LAYER}.g_idx", 7, 2), "values"),
    "g_idx below 0": ("desc-act", filled(f"{LAYER}.g_idx", 7, -1), "values"),
    "permuted g_idx without desc_act": (
        "gptq",
        replace(f"{LAYER}.g_idx", lambda index: index.flip(0)),
        "values",
    ),
    "wrong dtype": ("awq", replace(f"{LAYER}.qweight", lambda words: words.long()), "tensors"),
    "wrong dtype of scales": ("gptq", replace(f"{LAYER}.scales", lambda scales: scales.double()), "tensors"),
    "wrong shape in weight_shape": ("compressed", filled(f"{LAYER}.weight_shape", 1, 65), "tensors"),
    "transposed packing": ("gptq", replace(f"{LAYER}.qweight", lambda words: words.view(96, 8)), "tensors"),
    "NaN in a norm": ("gptq", filled("model.norm.weight", 3, torch.nan), "values"),
    "input_scale of 0": ("w8a8-static", filled(f"{LAYER}.input_scale", 0, 0.0), "values"),
    "missing input_scale": ("w8a8-static", drop(f"{LAYER}.input_scale"), "tensors"),
    "input_scale of dynamic activations": (
        "w8a8",
        tensors(lambda stored: stored.update({f"{LAYER}.input_scale": torch.zeros(1)})),
        "tensors",
    ),
    "quantized layer that is ignored": ("compressed", config(ignore=[LAYER, "lm_head"]), "config"),
    "16-bit layer that is not ignored": ("compressed", config(ignore=[]), "config"),
    "sidecar that differs": (
        "gptq",
        lambda folder: (folder / "quantize_config.json").write_text('{"bits": 3}'),
        "config",
    ),
    "bias that the model has not": (
        "gptq",
        tensors(lambda stored: stored.update({f"{LAYER}.bias": torch.ones(96)})),
        "tensors",
    ),
    "no quantization_config": (
        "awq",
        lambda folder: (folder / "config.json").write_text(
            json.dumps({**read_json(folder / "config.json"), "quantization_config": None})
        ),
        "tensors",
    ),
}
# What only shows beside the original: the files are whole, and read by everyone alike.
AGAINST = {
    "flipped nibbles": ("gptq", replace(f"{LAYER}.qweight", swapped_nibbles), "error"),
    "flipped nibbles at 4 bits, compressed-tensors": (
        "compressed",
        replace(f"{LAYER}.weight_packed", swapped_nibbles),
        "error",
    ),
    "AWQ's nibbles in order": ("awq", replace(f"{LAYER}.qweight", nibbles_in_order), "error"),
    "zeros off by one": ("gptq-z", replace(f"{LAYER}.qzeros", zeros_plus_one), "error"),
    "v2 read as v1, asymmetric": ("gptq-z", config(checkpoint_format="gptq", format="gptq"), "error"),
    "scales of other rows": ("compressed", replace(f"{LAYER}.weight_scale", lambda s: s.roll(1, 0)), "error"),
    "scales of the other group": ("gptq", replace(f"{LAYER}.scales", lambda s: s.flip(0)), "error"),
    "codes of another row": (
        "compressed-w2",
        replace(f"{LAYER}.weight_packed", lambda c: c.roll(1, 0)),
        "error",
    ),
    "transposed square": ("gptq", replace(f"{SQUARE}.qweight", transposed), "error"),
    "permuted g_idx": ("desc-act", replace(f"{LAYER}.g_idx", lambda index: index.flip(0)), "error"),
    "another norm": ("gptq", replace("model.norm.weight", lambda norm: norm.roll(1)), "original"),
    "another norm before linears": (
        "gptq",
        replace("model.layers.0.input_layernorm.weight", lambda norm: norm.roll(1)),
        "error",
    ),
    "a norm's channel of 0": (
        "awq",
        filled("model.layers.0.input_layernorm.weight", 3, 0.0),
        "original",
    ),
    "another rotary base": (
        "gptq",
        model_config(rope_parameters={"rope_theta": 100.0, "rope_type": "default"}),
        "original",
    ),
    "a norm of zeros": (
        "gptq",
        replace("model.layers.1.post_attention_layernorm.weight", torch.zeros_like),
        "original",
    ),
    "another bias": ("awq", replace("model.layers.0.self_attn.v_proj.bias", lambda b: b.roll(1)), "original"),
    "another embedding": ("gptq", replace("model.embed_tokens.weight", lambda e: e.roll(1, 0)), "original"),
}


@pytest.mark.parametrize("what", ALONE)
def test_corruption_shows_by_itself(copied, original, what):
    name, corrupt, check = ALONE[what]
    folder = copied(name)
    corrupt(folder)
    for against in (None, original):
        found = qkern.verify(folder, against=against)
        assert check in failed(found), found.as_dict()
        assert not found.is_sound


@pytest.mark.parametrize("what", AGAINST)
def test_corruption_shows_beside_the_original(copied, original, what):
    name, corrupt, check = AGAINST[what]
    folder = copied(name)
    corrupt(folder)
    alone = qkern.verify(folder)
    wraps = what == "v2 read as v1, asymmetric"  # where a zero point of 15 becomes 0
    assert failed(alone) <= ({"values"} if wraps else set())
    assert check in failed(qkern.verify(folder, against=original))


def test_original_that_lies_on_the_grid(results, original, tmp_path):
    """Its rounding error is 0, which no result needs to have."""
    model = qkern.load(original)
    decoded = {name: layer.dequantize() for name, layer in quant_linears(qkern.load(results("gptq"))).items()}
    with torch.no_grad():
        for name, weight in decoded.items():
            model.get_submodule(name).weight.copy_(weight)
    model.save_pretrained(tmp_path / "decoded")
    found = qkern.verify(results("gptq"), against=tmp_path / "decoded")
    assert found.is_sound, found.as_dict()
    assert max(found.errors.values()) < 2e-3  # bf16


def test_problems_name_the_tensor(copied, original):
    folder = copied("gptq")
    filled(f"{LAYER}.scales", (0, 5), torch.nan)(folder)
    drop("model.layers.1.mlp.down_proj.qzeros")(folder)
    found = qkern.verify(folder, against=original)
    assert f"{LAYER}: 1 scales are NaN or Inf" in problems(found, "values")
    assert "model.layers.1.mlp.down_proj.qzeros is missing" in problems(found, "tensors")
    assert "qkern.load refuses the model" in problems(found, "weights")
    assert (
        next(check for check in found.checks if check.name == "error").skipped
        == "tensors are damaged or missing"
    )
    assert json.loads(json.dumps(found.as_dict()))["is_sound"] is False


def test_biases_of_zeros_are_allowed(copied, original):
    folder = copied("gptq")
    tensors(lambda stored: stored.update({f"{LAYER}.bias": torch.zeros(96)}))(folder)
    assert qkern.verify(folder, against=original).is_sound


def test_what_load_computes_with_is_compared(results, monkeypatch):
    loaded = qkern.load(results("gptq"), dtype=torch.float32)
    with torch.no_grad():
        loaded.get_submodule(LAYER).scales[0, 0] *= 2
    # The package's name for the module is that of the function.
    monkeypatch.setattr(sys.modules["qkern.pipelines.verify"], "load", lambda *_, **__: loaded)
    found = qkern.verify(results("gptq"))
    assert failed(found) == {"weights"}
    assert problems(found, "weights").startswith(f"{LAYER}.weight is not what the file says: ")


@pytest.mark.parametrize("reader", [safetensors_files, layouts, configuration])
def test_readers_share_nothing_with_the_writers(reader):
    nodes = list(ast.walk(ast.parse(Path(reader.__file__).read_text())))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    readers = {found.__name__ for found in (safetensors_files, layouts, configuration)}
    assert {name for name in names if name.startswith("qkern")} <= {"qkern.errors", *readers}


def test_hostile_headers_are_named(copied):
    folder = copied("gptq")
    file = folder / "model.safetensors"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    wrong = (
        *({"dtype": dtype} for dtype in (["F32"], {}, None, 4)),
        *({"data_offsets": numbers} for numbers in ([0], [], [0, 4, 5], [False, 4], [0, 4.0], "04", 4)),
        *({"shape": shape} for shape in ([-1], [True], [1.0], "1", 1, None)),
    )
    headers = [json.dumps({"a": {**entry, **fields}}).encode() for fields in wrong]
    for header in (b"{", b"[]", b'{"a": 1}', b'{"a": [1]}', *headers):
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        tensors, wrong = read_folder(folder)
        assert not tensors, header
        assert wrong[0].startswith("model.safetensors has no readable header: "), wrong
    assert "files" in failed(qkern.verify(folder))
    file.write_bytes((1 << 60).to_bytes(8, "little"))
    assert "truncated" in problems(qkern.verify(folder), "files")


@pytest.mark.parametrize(
    "fields",
    [
        {"dynamic": ["a"]},
        {"bits": "4"},
        {"bits": 4.0},
        {"group_size": 0},
        {"group_size": True},
        {"sym": 1},
        {"dynamic": {"+:(": {}}},
        {"quant_method": 4},
    ],
)
def test_hostile_configurations_are_named(copied, fields):
    folder = copied("gptq")
    config(**fields)(folder)
    assert "config" in failed(qkern.verify(folder))


@pytest.mark.parametrize(
    ("name", "corrupt", "match"),
    [
        ("gptq", config(quant_method="hqq"), "quant_method 'hqq'"),
        ("gptq", config(checkpoint_format="marlin"), "quant_method 'gptq', format 'marlin'"),
        ("awq", config(version="gemv"), "quant_method 'awq', format 'gemv'"),
        ("compressed", config(format="float-quantized"), "format 'float-quantized'"),
        ("compressed", groups_config(type="float"), "'compressed-tensors', format 'float'"),
    ],
)
def test_formats_that_are_not_read_are_not_judged(copied, name, corrupt, match):
    folder = copied(name)
    corrupt(folder)
    with pytest.raises(UnsupportedError, match=f"verify does not read .*{match}"):
        qkern.verify(folder)


# What other writers do


def test_the_size_in_an_index_is_anyones(copied):
    folder = copied("sharded")
    index = read_json(folder / INDEX)
    (folder / INDEX).write_text(json.dumps({**index, "metadata": {"total_size": 1 + (1 << 20)}}))
    assert qkern.verify(folder).is_sound


def test_the_own_file_of_autoawq(copied):
    folder = copied("awq")
    fields = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    fields |= {"modules_to_not_convert": None, "quant_method": "AWQ", "tool": "another"}
    (folder / "quant_config.json").write_text(json.dumps(fields))
    assert qkern.verify(folder).is_sound
    (folder / "quant_config.json").write_text(json.dumps({**fields, "q_group_size": 64}))
    found = qkern.verify(folder)
    assert problems(found, "config") == "quant_config.json and config.json differ in group_size"


def test_awq_converts_no_head(copied):
    folder = copied("awq")
    config(modules_to_not_convert=[])(folder)
    assert qkern.verify(folder).is_sound
    config(modules_to_not_convert=["mlp.up_proj"])(folder)
    assert "layers.0.mlp.up_proj is quantized, but the configuration" in problems(
        qkern.verify(folder), "config"
    )


# Runtimes


def test_rules_of_vllm(results, original, tmp_path):
    found = qkern.verify(results("gptq-w3"), runtime="vllm")
    assert failed(found) == {"runtime"}
    assert "vLLM takes GPTQ with 4 and 8 bits" in problems(found, "runtime")
    assert "multiples of 64 rows and 128 columns" in problems(
        qkern.verify(results("awq"), runtime="vllm"), "runtime"
    )
    mixed = tmp_path / "mixed"
    assignment = {"k_proj": "w4g32", "v_proj": "w4g32", "q_proj": "w8g32"}
    qkern.quantize(original, method="rtn", assignment=assignment, format="compressed-tensors", output=mixed)
    assert qkern.verify(mixed).is_sound
    text = problems(qkern.verify(mixed, runtime="vllm"), "runtime")
    assert "makes one linear of these" in text
    assert "q_proj w8g32, k_proj w4g32, v_proj w4g32" in text


# Trained weights, calibrated methods


@pytest.mark.parametrize(
    ("method", "scheme", "format"),
    [("gptq", "w2g64", "compressed-tensors"), ("awq", "w4g128z", "awq"), ("smoothquant", "w8a8", None)],
)
def test_calibrated_methods_are_explained(tmp_path, method, scheme, format):
    folder = tmp_path / "model"
    qkern.quantize(
        MODEL,
        method=method,
        scheme=scheme,
        format=format,
        calibration=CALIBRATION,
        samples=4,
        length=128,
        output=folder,
        device="cpu",
    )
    found = qkern.verify(folder, against=MODEL, text=HELDOUT, tokens=512)
    assert found.is_sound, found.as_dict()
    kl = next(check for check in found.checks if check.name == "kl")
    assert kl.count == 512
    assert 0 < kl.value < 1


def test_model_that_does_not_run(results, monkeypatch):
    def broken(*_, **__):
        raise TypeError("no layer types")

    monkeypatch.setattr("qkern.evaluation.decoding.TransformersDecoder.prefill", broken)
    found = qkern.verify(results("gptq"))
    assert failed(found) == {"generation"}
    assert problems(found, "generation") == "the model does not run: TypeError: no layer types"


def test_arguments(results):
    with pytest.raises(InputError, match="no GGUF file"):
        qkern.verify("missing.gguf")
    with pytest.raises(InputError, match="does not exist"):
        qkern.verify("missing")
    with pytest.raises(InputError, match="unknown runtime 'mlx'"):
        qkern.verify(results("gptq"), runtime="mlx")
    with pytest.raises(InputError, match="16-bit folder"):
        qkern.verify(results("gptq"), against="original.gguf")
    with pytest.raises(InputError, match=r"awq is quantized; give what the model was quantized from"):
        qkern.verify(results("gptq"), against=results("awq"))
    with pytest.raises(InputError, match="max_kl"):
        qkern.verify(results("gptq"), max_kl=0)
