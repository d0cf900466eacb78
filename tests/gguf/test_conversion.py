"""Quantized checkpoints as GGUF: where the grids match, the file has their weights, bit for bit."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkern.checkpoints import QuantizedCheckpoint
from qkern.cli import main
from qkern.gguf import GGUFFile
from qkern.ops import dequantize_groupwise
from qkern.pipelines import export_gguf, load, quantize

# llama-cpp-python leaves /dev/null open when it silences llama.cpp.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def checkpoint(model_folder, tmp_path_factory):
    """Maker of quantized folders of tiny models, whose q and k rows a GGUF reorders."""

    def make(scheme, format, model_type="llama", **options):
        folder, _ = model_folder(model_type, hidden_size=128, intermediate_size=256)
        made = tmp_path_factory.mktemp("quantized") / f"{scheme}-{format}"
        quantize(folder, method="rtn", scheme=scheme, output=made, format=format, **options)
        return made

    return make


def weights(folder):
    """Every quantized layer of a folder, decoded."""
    with QuantizedCheckpoint(folder) as opened:
        return {f"{name}.weight": dequantize_groupwise(opened.weight(name)) for name in opened.entries}


def weights_of_file(path):
    with GGUFFile(path) as file:
        return dict(file.state_dict())


EXACT = [
    ("w4g128", "gptq", "q4_0"),
    ("w4g32", "gptq", "q4_0"),
    ("w4", "compressed-tensors", "q4_0"),
    ("w3g64", "compressed-tensors", "q4_0"),
    ("w2g32", "gptq", "q4_0"),
    ("w8g64", "gptq", "q8_0"),
    ("w8", "compressed-tensors", "q8_0"),
    ("w4g64", "gptq", "q8_0"),
    ("w4g128z", "awq", "q5_0"),
    ("w4g64z", "gptq_v2", "q8_0"),
    ("w8a8", "compressed-tensors", "q8_0"),
]


@pytest.mark.parametrize(("scheme", "format", "kind"), EXACT)
def test_layers_keep_their_weights(scheme, format, kind, checkpoint, tmp_path):
    folder = checkpoint(scheme, format)
    report = export_gguf(folder, tmp_path / "model.gguf", kind)
    found, expected = weights_of_file(tmp_path / "model.gguf"), weights(folder)
    assert len(expected) == 14
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    # The report says so: of all layers, of the norms, and not of the embedding, which had 16 bits.
    inexact = {name for name, exact in report.exact.items() if not exact}
    assert inexact == {"token_embd.weight", "output.weight"}
    assert report.exact_counts[kind] == 14
    assert sum(report.exact_counts.values()) == len(report.exact) - 2


@pytest.mark.parametrize(("scheme", "format", "kind"), [EXACT[0], EXACT[5], EXACT[8]])
def test_llama_cpp_computes_with_the_same_weights(scheme, format, kind, checkpoint, run_gguf, tmp_path):
    """Among them the code -128, which no Q8_0 of llama.cpp's own quantizer has."""
    folder = checkpoint(scheme, format)
    export_gguf(folder, tmp_path / "model.gguf", kind)
    model = load(folder, dtype=torch.float32, compute="float")
    found = weights_of_file(tmp_path / "model.gguf")
    for name in ("model.embed_tokens", "lm_head"):  # 16-bit in the checkpoint, so the file rounds them
        model.get_submodule(name).weight.copy_(found[f"{name}.weight"])
    ids = torch.randint(0, 2000, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
    # llama.cpp quantizes activations to int8.
    assert (run_gguf(tmp_path / "model.gguf")(ids) - expected).norm() / expected.norm() < 0.03


def test_asymmetric_codes_in_q4_1_lose_the_offset_s_last_bits(checkpoint, tmp_path):
    folder = checkpoint("w4g128z", "awq")
    report = export_gguf(folder, tmp_path / "model.gguf", "q4_1")
    found = weights_of_file(tmp_path / "model.gguf")
    with QuantizedCheckpoint(folder) as opened:
        for name in opened.entries:
            qw = opened.weight(name)
            off = (found[f"{name}.weight"] - dequantize_groupwise(qw)).abs().max()
            assert off <= 2.0**-11 * (qw.zeros.float() * qw.scales.float()).abs().max()
    assert report.exact_counts["q4_1"] < 14


def test_a_quantized_head_keeps_its_codes_too(checkpoint, tmp_path):
    folder = checkpoint("w4g128", "gptq", include=("lm_head",))
    export_gguf(folder, tmp_path / "model.gguf", "q4_0")
    found, expected = weights_of_file(tmp_path / "model.gguf"), weights(folder)
    assert "lm_head.weight" in expected
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert file.tensors["output.weight"].type.name == "q4_0"


@pytest.mark.parametrize(
    ("scheme", "format", "kind"), [("w4g128", "gptq", "q4_0"), ("w4g128z", "awq", "q5_0")]
)
def test_another_type_is_encoded_anew_and_the_exact_one_is_named(
    scheme, format, kind, checkpoint, caplog, tmp_path
):
    with caplog.at_level(logging.INFO, logger="qkern"):
        report = export_gguf(checkpoint(scheme, format), tmp_path / "model.gguf", "q4_k_m")
    # Q4_K needs rows of 256, which only down_proj has; what the others fall back to holds four bits.
    assert f"2 of 14 quantized tensors were rounded a second time; --type {kind} keeps" in caplog.text
    assert sum(report.exact_counts.values()) == report.counts["f32"] + 12
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="qkern"):
        export_gguf(checkpoint(scheme, format), tmp_path / "exact.gguf", kind)
    assert "a second time" not in caplog.text


def test_a_codebook_is_rounded_a_second_time(checkpoint, caplog, tmp_path):
    export_gguf(checkpoint("nf4g64", "bitsandbytes"), tmp_path / "model.gguf", "q4_0")
    said = "14 of 14 quantized tensors were rounded a second time; no type of GGUF keeps their codes"
    assert said in caplog.text


def test_act_order_is_encoded_anew(checkpoint, caplog, tmp_path):
    folder = checkpoint("w4g64", "gptq")
    tensors = load_file(folder / "model.safetensors")
    for name, index in tensors.items():
        if name.endswith("g_idx"):
            tensors[name] = (torch.arange(len(index)) % (len(index) // 64)).int()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.INFO, logger="qkern"):
        report = export_gguf(folder, tmp_path / "model.gguf", "q4_0")
    assert report.exact_counts["q4_0"] == 0
    assert "keeps their codes" not in caplog.text


def test_command_line_says_what_is_exact(checkpoint, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["export-gguf", str(folder), *arguments])
        assert not stop.value.code
        return capsys.readouterr().out

    folder = checkpoint("w4g128", "gptq")
    report = json.loads(run("--output", str(tmp_path / "a.gguf"), "--type", "q4_0", "--json"))
    assert report["exact"]["blk.0.attn_q.weight"] is True
    assert report["exact"]["output.weight"] is False
    table = run("--output", str(tmp_path / "b.gguf"), "--type", "q4_0")
    (line,) = [line.split() for line in table.splitlines() if " q4_0 " in line and "MB" not in line]
    assert line[3] == "15"
    assert line[-2] == "14"
