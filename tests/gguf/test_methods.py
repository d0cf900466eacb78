"""GPTQ and AWQ on the way into a file: the blocks are those that were chosen, and they serve the model."""

import json
import shutil

import pytest
import torch

from qkern.errors import InputError, UnsupportedError
from qkern.evaluation import kl_divergence, paired_bootstrap, window_logits
from qkern.gguf import ARCHITECTURES, GGUFFile
from qkern.nn import named_linears
from qkern.ops import gguf_decode, gguf_encode
from qkern.pipelines import export_gguf, gguf_methods
from qkern.pipelines import quantize as quantize_folder

OVERRIDES = {"gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 16}}


def linears_of(model):
    """Linears of the layers: name in the file to name in the model."""
    names = ARCHITECTURES[model.config.model_type].names(model.config.to_dict())
    linears = [f"{name}.weight" for name in named_linears(model, skip=("lm_head",))]
    return {names[name]: name for name in linears}


@pytest.fixture
def ids():
    return torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))


def weights_of(path):
    with GGUFFile(path) as file:
        return dict(file.state_dict())


def logits_of(model, ids, weights=None):
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"])
def test_the_file_holds_the_chosen_blocks(method, model_type, model_folder, ids, tmp_path, monkeypatch):
    folder, model = model_folder(model_type, **OVERRIDES.get(model_type, {"tie_word_embeddings": False}))
    chosen = []

    def spy(blocks, kind):
        chosen.append(gguf_decode(blocks, kind))
        return chosen[-1]

    # What is put in the place of a linear, for the layers behind it to see.
    monkeypatch.setattr(gguf_methods, "gguf_decode", spy)
    report = export_gguf(folder, tmp_path / "model.gguf", "q4_0", method=method, calibration=ids)
    weights = weights_of(tmp_path / "model.gguf")
    linears = linears_of(model)
    assert sorted(report.errors) == sorted(linears)
    assert report.errors.keys() <= report.exact.keys()
    assert report.method == method
    for name, value in zip(report.errors, chosen, strict=True):
        assert torch.equal(weights[linears[name]], value), name
    assert all(0 < error < 0.1 for error in report.errors.values())


def test_gptq_sees_what_the_layers_before_have_become(model_folder, ids, tmp_path):
    from qkern.quantizers import HessianAccumulator, quantize_gptq_gguf

    folder, model = model_folder("qwen2")
    export_gguf(folder, tmp_path / "model.gguf", "q4_0", method="gptq", calibration=ids)
    weights = weights_of(tmp_path / "model.gguf")
    name = "model.layers.1.mlp.down_proj"
    seen = HessianAccumulator(model.config.intermediate_size)
    original = model.get_submodule(name).weight.detach().clone()
    model.load_state_dict(weights, strict=False)
    # Everything before this linear is as the file has it; embeddings are rounded in the file alone.
    model.model.embed_tokens.load_state_dict({"weight": reload(folder)["model.embed_tokens.weight"]})
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0]))
    logits_of(model, ids)
    hook.remove()
    expected = quantize_gptq_gguf(original, seen.value, "q4_0")
    change = gguf_decode(expected.blocks, "q4_0") - weights[f"{name}.weight"]
    # The order of the sums over tokens differs, and with it a code here and there.
    assert (change != 0).float().mean() < 0.02


def reload(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "phi3"])
def test_what_awq_folds_leaves_the_model_what_it_was(model_type, model_folder, ids, tmp_path):
    folder, model = model_folder(model_type, **OVERRIDES.get(model_type, {}))
    before = logits_of(model, ids)
    export_gguf(folder, tmp_path / "model.gguf", "q8_0", method="awq", calibration=ids)
    weights = weights_of(tmp_path / "model.gguf")
    original = model.state_dict()
    norms = [name for name in weights if "layernorm" in name]
    assert any(not torch.equal(weights[name], original[name]) for name in norms)
    after = logits_of(model, ids, weights)
    assert (after - before).norm() < 0.02 * before.norm()


def test_an_untied_head_is_weighed_by_what_reaches_it(model_folder, ids, tmp_path):
    folder, model = model_folder("llama", tie_word_embeddings=False)
    export_gguf(folder, tmp_path / "model.gguf", "q4_0", method="gptq", calibration=ids, pure=True)
    weights = weights_of(tmp_path / "model.gguf")
    head = model.lm_head.weight.detach()
    plain = gguf_decode(gguf_encode(head, "q4_0"), "q4_0")
    seen = []
    model.load_state_dict({name: value for name, value in weights.items() if "layers" in name}, strict=False)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    logits_of(model, ids)
    lost = [
        ((kept - head).square() @ seen[0].square().sum(0)).sum()
        for kept in (weights["lm_head.weight"], plain)
    ]
    assert lost[0] < lost[1]


def test_rows_that_no_block_divides_stay_16_bit(model_folder, ids, tmp_path):
    folder, _ = model_folder("llama", intermediate_size=80)
    report = export_gguf(folder, tmp_path / "model.gguf", "q4_0", method="gptq", calibration=ids)
    assert report.counts["f16"] == 2
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(weights_of(tmp_path / "model.gguf")[name], reload(folder)[name].half().float())


def test_the_shipped_model_keeps_more_of_itself(shipped, exported, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shipped)
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32).eval()
    text = (shipped / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])[: 15 * 512]
    reference = window_logits(model, ids, window=512)
    options = {"calibration": shipped / "calibration.txt", "samples": 16}
    divergence = {}
    for method in ("rtn", "gptq", "awq"):
        export_gguf(shipped, tmp_path / f"{method}.gguf", "q4_0", method=method, **options)
        model.load_state_dict(weights_of(tmp_path / f"{method}.gguf"), strict=False)
        divergence[method] = kl_divergence(reference, model, ids, window=512, allow_short=True)
    assert paired_bootstrap(divergence["gptq"], divergence["rtn"]).is_below
    assert divergence["gptq"].mean() < 0.75 * divergence["rtn"].mean()
    assert divergence["awq"].mean() < 1.05 * divergence["rtn"].mean()


def test_an_export_is_reproducible(model_folder, ids, tmp_path):
    folder, _ = model_folder("llama")
    for name in ("one", "two"):
        export_gguf(folder, tmp_path / f"{name}.gguf", "q5_1", method="gptq", calibration=ids)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_a_dry_run_knows_the_size_of_what_is_cut_into_files(model_folder, ids, tmp_path):
    folder, _ = model_folder("llama")
    options = {"method": "gptq", "calibration": ids, "max_shard_size": "50KB"}
    planned = export_gguf(folder, tmp_path / "model.gguf", "q4_0", dry_run=True, **options)
    assert list(tmp_path.iterdir()) == []
    assert planned.errors == {}
    report = export_gguf(folder, tmp_path / "model.gguf", "q4_0", **options)
    assert len(report.files) > 1
    assert report.file_bytes == planned.file_bytes
    whole = export_gguf(folder, tmp_path / "whole.gguf", "q4_0", method="gptq", calibration=ids)
    assert report.errors == whole.errors
    weights = weights_of(tmp_path / "whole.gguf")
    with GGUFFile(report.files[0]) as parts:
        assert all(torch.equal(value, weights[name]) for name, value in parts.state_dict())


def test_what_cannot_be_is_refused_and_leaves_no_file(model_folder, shipped, ids, tmp_path):
    folder, _ = model_folder("llama")
    output = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="unknown method 'hqq': allowed are gptq, awq, rtn"):
        export_gguf(folder, output, "q4_0", method="hqq")
    with pytest.raises(InputError, match=r"method gptq measures activations .*: give calibration texts \("):
        export_gguf(folder, output, "q4_0", method="gptq")
    (tmp_path / "matrix.gguf").write_bytes(b"")
    with pytest.raises(InputError, match="an importance matrix does not hold them; give calibration"):
        export_gguf(folder, output, "q4_0", method="awq", imatrix=tmp_path / "matrix.gguf")
    with pytest.raises(InputError, match="method gptq chooses codes, and no linear gets any"):
        export_gguf(folder, output, "f16", method="gptq", calibration=ids)
    quantize_folder(folder, method="rtn", scheme="w4g32", output=tmp_path / "quantized")
    with pytest.raises(InputError, match=r"already quantized .*: quantize the original"):
        export_gguf(tmp_path / "quantized", output, "q4_0", method="gptq", calibration=ids)
    shutil.rmtree(tmp_path / "quantized")
    (tmp_path / "matrix.gguf").unlink()
    assert list(tmp_path.iterdir()) == []


def test_the_report_compares_with_the_weights_of_the_model(model_folder, ids, tmp_path):
    folder, model = model_folder("llama", intermediate_size=80)
    model.half().save_pretrained(folder)
    gptq = export_gguf(folder, tmp_path / "gptq.gguf", "q4_0", method="gptq", calibration=ids)
    # Rows that no block divides are 16-bit in the file, as they are in the model.
    exact = {name for name, exact in gptq.exact.items() if exact}
    vectors = {name for name in gptq.exact if "norm" in name or name.endswith("bias")}
    assert exact == vectors | {f"blk.{layer}.ffn_down.weight" for layer in range(2)}
    awq = export_gguf(folder, tmp_path / "awq.gguf", "q4_0", method="awq", calibration=ids)
    original, weights = model.state_dict(), weights_of(tmp_path / "awq.gguf")
    names = ARCHITECTURES["llama"].names(model.config.to_dict())
    for name, value in weights.items():
        assert awq.exact[names[name]] == torch.equal(value, original[name].float()), name
    assert not awq.exact["blk.0.attn_norm.weight"]  # a scale was folded into it
    assert awq.exact["output_norm.weight"]


def test_types_without_a_uniform_grid_are_refused(model_folder, ids, tmp_path, monkeypatch):
    folder, _ = model_folder("llama")
    layouts = {name: layout for name, layout in gguf_methods.LAYOUTS.items() if name != "q4_0"}
    monkeypatch.setattr(gguf_methods, "LAYOUTS", layouts)
    with pytest.raises(
        UnsupportedError, match=r"GPTQ encodes q4_1, .*, and linears get q4_0: choose another"
    ):
        export_gguf(folder, tmp_path / "model.gguf", "q4_0", method="gptq", calibration=ids)


def test_command_line(model_folder, shipped, tmp_path, capsys):
    from qkern.cli import main

    folder, model = model_folder("llama")
    arguments = ["--type", "q4_0", "--method", "gptq", "--samples", "4", "--length", "32", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "export-gguf",
                str(folder),
                "--output",
                str(tmp_path / "model.gguf"),
                "--calibration",
                str(shipped / "calibration.txt"),
                *arguments,
            ]
        )
    assert not stop.value.code
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "gptq"
    assert sorted(report["errors"]) == sorted(linears_of(model))
