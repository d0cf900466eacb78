"""A dry run refuses what the run would, and both before any weight is run or a file is made."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkern
from qkern.calibration import LayerStream
from qkern.errors import InputError, UnsupportedError
from qkern.gguf import Imatrix, ImatrixEntry
from qkern.pipelines import export_gguf, quantize, source

IDS = torch.randint(0, 1000, (4, 64), generator=torch.Generator().manual_seed(0))


def quantized(folder):
    made = folder.with_name(f"{folder.name}-quantized")
    quantize(folder, method="rtn", scheme="w4g32", output=made)
    return made


def with_a_short_head(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :32].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


STRANGER = Imatrix(
    entries={"blk.0.ssm_in.weight": ImatrixEntry(sums=torch.ones(1, 64), counts=torch.ones(1).long())},
    chunk_count=1,
    chunk_size=8,
)
CALIBRATED = {"calibration": IDS}
GPTQ, AWQ = ({"method": method, **CALIBRATED} for method in ("gptq", "awq"))
# What is asked of which model, after what was done to its folder.
REFUSED = {
    "gptq without codes": ("llama", "f16", GPTQ, InputError, "gptq chooses codes, and no linear gets any"),
    "awq without codes": ("llama", "bf16", AWQ, InputError, "awq chooses codes, and no linear gets any"),
    "no grid": ("llama", "iq4_nl", GPTQ, UnsupportedError, "GPTQ encodes .*, and linears get iq4_nl"),
    "gptq of experts": ("mixtral", "q4_0", GPTQ, UnsupportedError, r"gptq does not follow .*\(mixtral\)"),
    "awq of experts": ("qwen3_moe", "q4_0", AWQ, UnsupportedError, r"awq does not follow .*\(qwen3_moe\)"),
    "no text": ("llama", "q4_0", {"calibration": "none.txt"}, InputError, "file not found: none.txt"),
    "short text": ("llama", "q4_0", {"calibration": ["Word."]}, InputError, "shorter than one sequence"),
    "no source": ("llama", "q4_0", {"calibration": 3}, InputError, "no source of texts: got int"),
    "no samples": ("llama", "q4_0", {**CALIBRATED, "samples": 0}, InputError, "samples must be at least 1"),
    "no length": ("llama", "q4_0", {**CALIBRATED, "length": 1}, InputError, "length must be at least 2"),
    "no device": ("llama", "q4_0", {**GPTQ, "device": "abacus"}, InputError, "'abacus' cannot be used"),
    "stranger": ("llama", "q4_0", {"imatrix": STRANGER}, InputError, "made for another model"),
    "nothing searched": ("llama", "q8_0", CALIBRATED, InputError, "no matrix of the layers .*are f32, q8_0"),
    "draw": ("llama", "q4_0", {"samples": 4, "seed": 1}, InputError, "samples, seed are the calibration's"),
    "one of a draw": ("llama", "q4_0", {"imatrix": STRANGER, "length": 9}, InputError, "length is the"),
    "quantized": ("llama", "q4_k_m", CALIBRATED, InputError, "already quantized .*: quantize the original"),
    "quantized, gptq": ("llama", "q4_0", GPTQ, InputError, "already quantized .*: quantize the original"),
    "head": ("llama", "q4_0", GPTQ, InputError, r"lm_head\.weight must be \(\d+, 64\): got \(\d+, 32\)"),
}
BEFORE = {
    "quantized": quantized,
    "quantized, gptq": quantized,
    "head": with_a_short_head,
}


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("what", REFUSED)
def test_all_is_refused_before_the_work(what, dry_run, model_folder, tmp_path, monkeypatch):
    model_type, kind, options, error, message = REFUSED[what]
    folder, _ = model_folder(model_type)
    folder = BEFORE.get(what, lambda folder: folder)(folder)
    monkeypatch.setattr(LayerStream, "embed", lambda *_: pytest.fail("it was run"))
    with pytest.raises(error, match=message):
        export_gguf(folder, tmp_path / "m.gguf", kind, dry_run=dry_run, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_part_in_the_way_is_refused_before_the_work(model_folder, tmp_path, monkeypatch):
    folder, _ = model_folder("llama")
    options = {"max_shard_size": "50KB", **GPTQ}
    planned = export_gguf(folder, tmp_path / "m.gguf", "q4_0", dry_run=True, **options)
    planned.files[1].write_bytes(b"mine")
    monkeypatch.setattr(LayerStream, "embed", lambda *_: pytest.fail("it was run"))
    for dry_run in (True, False):
        with pytest.raises(InputError, match=rf"{planned.files[1].name} exists"):
            export_gguf(folder, tmp_path / "m.gguf", "q4_0", dry_run=dry_run, **options)
    assert list(tmp_path.iterdir()) == [planned.files[1]]


def test_mixtures_of_experts_are_refused_before_a_model_is_made(model_folder, tmp_path, monkeypatch):
    folder, _ = model_folder("qwen2_moe")
    monkeypatch.setattr(source, "meta_model", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UnsupportedError, match="use method='rtn', with calibration if you like"):
        export_gguf(folder, tmp_path / "m.gguf", "q4_0", **GPTQ)


def test_a_dry_run_of_a_calibration_runs_nothing(model_folder, tmp_path, monkeypatch):
    folder, _ = model_folder("llama")
    monkeypatch.setattr(LayerStream, "embed", lambda *_: pytest.fail("it was run"))
    for options in (CALIBRATED, GPTQ, AWQ):
        report = export_gguf(folder, tmp_path / "m.gguf", "q4_0", dry_run=True, **options)
        assert report.is_dry_run
    assert list(tmp_path.iterdir()) == []


def test_an_importance_matrix_may_be_given_where_it_changes_nothing(model_folder, tmp_path, caplog):
    folder, _ = model_folder("llama")
    matrix = qkern.imatrix(folder, calibration=IDS)
    caplog.set_level(logging.WARNING)
    for kind in ("f16", "q8_0"):
        caplog.clear()
        export_gguf(folder, tmp_path / f"{kind}.gguf", kind, imatrix=matrix)
        (record,) = caplog.records
        assert record.getMessage().startswith("the importance matrix changes nothing")
    caplog.clear()
    export_gguf(folder, tmp_path / "q4_0.gguf", "q4_0", pure=True, imatrix=matrix)
    assert caplog.records == []
    # Codes of a checkpoint in the type's grid are kept.
    quantize(folder, method="rtn", scheme="w4g32", output=tmp_path / "quantized")
    caplog.clear()
    export_gguf(tmp_path / "quantized", tmp_path / "kept.gguf", "q4_0", pure=True, imatrix=matrix)
    assert [record.getMessage()[:37] for record in caplog.records] == [
        "the importance matrix changes nothing"
    ]


def test_a_warning_comes_once(model_folder, tmp_path, caplog):
    # The window is told in the metadata, the rows of 80 by the types.
    folder, _ = model_folder("mistral", sliding_window=8, intermediate_size=96, hidden_size=80)
    config = json.loads((folder / "config.json").read_text())
    assert config["sliding_window"] == 8
    caplog.set_level(logging.WARNING)
    for options in ({}, CALIBRATED, GPTQ):
        caplog.clear()
        export_gguf(folder, tmp_path / f"{len(options)}.gguf", "q4_k_m", **options)
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == len(set(messages))
        assert sum("sliding_window" in message for message in messages) == 1
        assert sum("blocks of 256 do not divide" in message for message in messages) >= 1
