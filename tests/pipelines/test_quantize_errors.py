"""Bad input: one clear error each, and nothing written."""

import errno
import json
import resource
import shutil
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qkern.errors import FormatError, InputError, QkernError, UnsupportedError, advice_on_writing
from qkern.pipelines import load, quantize, save

quantize_module = sys.modules["qkern.pipelines.quantize"]

IDS = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama", dtype=torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def folder(original, tmp_path):
    """A copy to damage, alone in its parent folder."""
    return shutil.copytree(original, tmp_path / "model")


def fails(folder, error, message, **options):
    """The call raises, and leaves nothing beside the model's folder."""
    options = {"method": "rtn", "scheme": "w4g32", "output": folder.parent / "out", **options}
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(error, match=message) as info:
        quantize(folder, **options)
    assert sorted(path.name for path in folder.parent.iterdir()) == before
    return info.value


def test_missing_folder(tmp_path):
    fails(tmp_path / "missing", InputError, "missing does not exist")


def test_missing_config(folder):
    (folder / "config.json").unlink()
    fails(folder, FormatError, r"config\.json is missing")


def test_config_without_architectures(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, InputError, r"config\.json names no architectures")


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": ["X"], "model_type": "nobody"}'])
def test_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    fails(folder, FormatError, r"config\.json")


def test_model_that_is_no_causal_lm(folder):
    config = {"architectures": ["ViTModel"], "model_type": "vit"}
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, InputError, "vit is not a causal LM")


def test_already_quantized(original, folder):
    quantize(original, method="rtn", scheme="w4g32", output=folder.parent / "q")
    fails(folder.parent / "q", InputError, r"already quantized \(gptq\)")
    returned = quantize(original, method="rtn", scheme="w4g32")
    with pytest.raises(InputError, match="already has quantized linears"):
        quantize(returned, method="rtn", scheme="w4g32")


def test_what_is_no_model():
    with pytest.raises(InputError, match="a transformers causal LM: got Linear"):
        quantize(torch.nn.Linear(2, 2), method="rtn")


@pytest.mark.parametrize("keep", [4, 100, 3000, -10])
def test_truncated_safetensors(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    fails(folder, FormatError, r"model\.safetensors is truncated or no safetensors file")


def test_no_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(folder, FormatError, "has no safetensors file")


def test_missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fails(folder, FormatError, r"does not fit .*: missing: model\.layers\.1\.mlp\.up_proj\.weight")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_weights_that_are_not_finite(folder, method, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # The first layer is finished by then; it is of no use to a repaired model.
    message = r"tensor model\.layers\.1\.mlp\.up_proj\.weight of .*model has NaN or Inf"
    fails(folder, InputError, message, method=method, calibration=IDS)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_integers(folder, name):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].int()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for method in ("rtn", "gptq"):
        fails(folder, InputError, rf"{name} of .* is torch\.int32", method=method, calibration=IDS)


def test_embedding_that_is_not_finite(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for method in ("rtn", "awq"):
        fails(folder, InputError, r"embed_tokens\.weight .* NaN", method=method, calibration=IDS)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.bias", "lm_head.weight"]
)
def test_what_is_copied_is_checked_before_any_work(folder, name, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    def work(*_):
        raise AssertionError("work had begun")

    monkeypatch.setattr(sys.modules[quantize.__module__], "calibration_ids", work)
    monkeypatch.setattr(sys.modules[quantize.__module__]._Run, "layers", work)
    for method in ("rtn", "gptq"):
        fails(folder, InputError, f"tensor {name} of .* NaN", method=method, calibration=IDS)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (None, InputError, "calibration is missing"),
        ([], InputError, "calibration text is empty"),
        ([[]], InputError, "calibration text is empty"),
        ([[5] * 9], InputError, "it has 9 tokens, 64 are needed"),
        ([[500] * 99], InputError, "vocabulary has 96 entries"),
        ("missing.txt", FormatError, "has no tokenizer: one of tokenizer.json"),
        (torch.zeros(3), InputError, "integer tensor"),
    ],
)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_calibration(folder, method, calibration, error, message):
    fails(folder, error, message, method=method, calibration=calibration)


def test_empty_and_missing_calibration_files(folder, tmp_path_factory):
    files = tmp_path_factory.mktemp("texts")
    (files / "empty.txt").write_text("\n")

    class Tokenizer:
        pass

    options = {"method": "gptq", "tokenizer": Tokenizer()}
    fails(folder, InputError, "calibration text is empty", calibration=files / "empty.txt", **options)
    fails(folder, InputError, "calibration file not found", calibration=files / "no.txt", **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scheme": "w4g0"}, InputError, "group_size must be at least 1"),
        ({"scheme": "w5g128"}, InputError, "unsupported bits: got 5"),
        ({"scheme": "int4"}, InputError, "not a scheme: got 'int4'"),
        ({"scheme": ""}, InputError, "not a scheme: got ''"),
        ({"scheme": 4}, InputError, "not a scheme: got int 4"),
        ({"scheme": "w4g32a8", "format": "gptq_v2"}, UnsupportedError, "drop a8 from w4g32a8"),
        ({"method": "smoothquant", "scheme": "w8"}, InputError, "none are quantized: got w8; use .* w8a8"),
        ({"method": "smoothquant", "scheme": "w4g32a8"}, InputError, "calibration is missing"),
        ({"method": "smoothquant", "alpha": 1.5}, InputError, "alpha must be 'auto' or a number from 0 to 1"),
        ({"method": "awq", "alpha": 0.5}, InputError, "alpha is SmoothQuant's: got method 'awq'"),
        ({"activations": "off"}, InputError, "unknown activations: got 'off', allowed are dynamic, static"),
        ({"observer": "mse"}, InputError, "observer 'mse' chooses static scales: got activations 'dynamic'"),
        ({"activations": "static", "observer": "max"}, InputError, "unknown observer: got 'max'"),
        ({"activations": "static"}, InputError, "static scales are .*none are quantized: got w4g32"),
        ({"activations": "static", "scheme": "w8a8"}, InputError, "calibration is missing"),
        ({"activations": "static", "scheme": "w4g32a8"}, UnsupportedError, "of one scale a channel, w8a8"),
        (
            {"scheme": "w4g32d", "method": "gptq", "calibration": IDS},
            UnsupportedError,
            "plain scales: got w4g32d",
        ),
        ({"scheme": "w4g32d"}, UnsupportedError, "no work was done: .* not double-quantized ones"),
        ({"scheme": "nf4g32", "method": "gptq", "calibration": IDS}, UnsupportedError, "use method='rtn'"),
        (
            {"scheme": "nf4g32", "format": "awq"},
            UnsupportedError,
            "no work was done: .*not the nf4 codebook",
        ),
        (
            {"scheme": "nf4g48"},
            UnsupportedError,
            "no work was done: .*has blocks of 32, 64, 128",
        ),
        ({"scheme": "q4_k_m"}, InputError, "not a scheme: .*qkern export-gguf"),
        ({"method": "llm_int8"}, InputError, r"LLM\.int8\(\) is qkern\.load with int8=True"),
        ({"scheme": "w4g32", "search": "absmax"}, InputError, "that of w8a8, nf4 and fp4.*: got w4g32"),
        ({"method": "obq"}, InputError, "unknown method 'obq'"),
        ({"format": "gguf"}, InputError, "unknown checkpoint format: got 'gguf'"),
        ({"method": "gptq", "damp": -1.0, "calibration": IDS}, InputError, "damp must be between 0 and 1"),
        ({"method": "gptq", "act_order": "random"}, InputError, "unknown act_order 'random'"),
        ({"search": "loss"}, InputError, "unknown search 'loss' for rtn"),
        ({"scale_only": True}, InputError, "scale_only folds AWQ's scales"),
        ({"method": "awq", "scale_only": True, "format": "awq"}, InputError, "drop format"),
        ({"max_shard_size": "big"}, InputError, "big"),
        ({"device": "abacus"}, InputError, "device 'abacus' cannot be used.*allowed are auto, cpu"),
        ({"include": ["embed_tokens"]}, InputError, "'embed_tokens' in skip or include matches no linear"),
        ({"skip": ["dwon_proj"]}, InputError, "'dwon_proj' in skip or include matches no linear"),
        ({"skip": ["*"]}, InputError, "nothing to quantize"),
        ({"method": "gptq", "calibration": 5}, InputError, "calibration is no source of texts: got int"),
        ({"method": "gptq", "calibration": IDS, "samples": 0}, InputError, "samples must be at least 1"),
        ({"method": "gptq", "calibration": IDS, "length": 1}, InputError, "length must be at least 2"),
    ],
)
def test_arguments(folder, options, error, message):
    fails(folder, error, message, **options)


def test_output_that_exists(folder):
    output = folder.parent / "out"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    fails(folder, InputError, "exists and is not empty", output=output)
    fails(folder, InputError, "exists and is no folder", output=output / "precious.txt")
    fails(
        folder,
        InputError,
        r"precious.txt is a file; choose",
        output=output / "precious.txt" / "deeper" / "out",
    )
    assert [path.name for path in output.iterdir()] == ["precious.txt"]
    # An empty one is fine.
    (output / "precious.txt").unlink()
    quantize(folder, method="rtn", scheme="w4g32", output=output)
    assert (output / "model.safetensors").exists()


def test_output_in_the_model_folder(folder):
    contents = sorted(path.name for path in folder.iterdir())
    message = "must not be the same or one inside the other"
    for output in (folder, folder / "out", folder.parent):
        fails(folder, InputError, message, output=output)
    model = load(folder)
    with pytest.raises(InputError, match=message):
        quantize(model, method="rtn", output=folder / "out")
    with pytest.raises(InputError, match=message):
        save(model, folder / "out")
    assert sorted(path.name for path in folder.iterdir()) == contents


@contextmanager
def file_size_limit(size):
    """Writes beyond `size` fail with an error from the system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_full_while_a_layer_is_kept(folder):
    with file_size_limit(9_000):
        error = fails(folder, QkernError, "cannot write .*: .*File too large", calibration=IDS, method="gptq")
    assert str(error).endswith("no output was made; choose another output")


def test_disk_full_while_the_output_is_written(folder, tmp_path):
    output = tmp_path / "out"
    options = {"method": "gptq", "scheme": "w4g32", "calibration": IDS}
    # A layer fits, the whole model does not.
    with (
        file_size_limit(40_000),
        pytest.raises(QkernError, match=r"cannot write .*out: File too large") as caught,
    ):
        quantize(folder, **options, output=output)
    assert f"2 finished layers are kept in {output}.partial: the same command goes on" in str(caught.value)
    # The finished layers are kept, and nothing else is there.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.partial"]
    report = quantize(folder, **options, output=output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    assert len(report.layers) == 14
    load(output)


def test_what_is_said_about_an_output_that_cannot_be_written():
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("557056 requested and 189312 written"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        assert advice_on_writing(error) == "the disk is full: free space"
    assert advice_on_writing(OSError(errno.EACCES, "Permission denied")) == "choose another output"


@pytest.mark.parametrize("option", [{"damp": 0.1}, {"act_order": "desc_act"}, {"static_groups": True}])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_options_of_gptq_are_gptqs(folder, tmp_path, option, method):
    with pytest.raises(
        InputError, match=f"{next(iter(option))} .*for method 'gptq' alone: got method '{method}'"
    ):
        quantize(folder, method=method, calibration=IDS, output=tmp_path / "out", **option)


def test_an_interrupted_run_says_what_is_kept(folder, tmp_path, caplog, monkeypatch):
    stop = iter([False, True])
    original = quantize_module.quantize_layer

    def interrupted(*arguments, **options):
        if next(stop):
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(quantize_module, "quantize_layer", interrupted)
    with pytest.raises(KeyboardInterrupt), caplog.at_level("WARNING", logger="qkern"):
        quantize(folder, method="rtn", scheme="w4g32", output=tmp_path / "out")
    assert f"interrupted; 1 finished layers are kept in {tmp_path / 'out.partial'}" in caplog.text
