"""`qkern.compare`: real processes on the shipped model, and what becomes of those that die."""

import importlib
import json
import shutil
import signal

import numpy as np
import pytest
import torch

import qkern
from qkern import InputError
from qkern.demo import HELDOUT, MODEL
from qkern.evaluation import (
    bpw_file,
    bpw_linear,
    gguf_bpw_linear,
    kl_divergence,
    paired_bootstrap,
    perplexity,
    read_text,
    token_ids,
)
from qkern.evaluation.llama_cpp import LlamaCpp
from qkern.pipelines import compare, contestant

module = importlib.import_module("qkern.pipelines.compare")  # `compare` of the package is the verb

WINDOW, TOKENS = 64, 320
OPTIONS = {
    "text": HELDOUT,
    "tokens": TOKENS,
    "window": WINDOW,
    "prompt_lengths": (1, 40, 6144),
    "new_tokens": 6,
    "prompts": ["And the king said", "x " * 600],
    "device": "cpu",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("models")
    qkern.quantize(MODEL, method="rtn", scheme="w4g128", output=folder / "w4")
    qkern.export_gguf(MODEL, folder / "model.gguf", "q4_k_m")
    return folder


@pytest.fixture(scope="module")
def comparison(models):
    others = [models / "w4", models / "model.gguf", models / "missing.gguf"]
    return compare(MODEL, others, **OPTIONS)


@pytest.fixture(scope="module")
def ids():
    from transformers import AutoTokenizer

    return token_ids(AutoTokenizer.from_pretrained(MODEL), read_text(HELDOUT))[:TOKENS]


def test_sizes_are_those_of_the_files(comparison, models):
    original, w4, gguf, missing = comparison.models
    assert [row.name for row in comparison.models] == [MODEL.name, "w4", "model.gguf", "missing.gguf"]
    assert original.file_bytes == (MODEL / "model.safetensors").stat().st_size
    assert gguf.file_bytes == (models / "model.gguf").stat().st_size
    assert w4.bpw_file == bpw_file(models / "w4")
    assert w4.bpw_linear == bpw_linear(qkern.load(models / "w4")) == 4.125
    assert (original.bpw_linear, gguf.bpw_linear) == (16, gguf_bpw_linear(models / "model.gguf"))
    assert (missing.file_bytes, missing.load_seconds) == (None, None)


def test_scores_are_those_of_one_process(comparison, models, ids):
    original = qkern.load(MODEL, dtype=torch.float32)
    w4 = qkern.load(models / "w4", dtype=torch.float32)
    llama = LlamaCpp(models / "model.gguf", context=WINDOW)
    for row, model in zip(comparison.models, (original, w4, llama), strict=False):
        assert row.score.perplexity == pytest.approx(perplexity(model, ids, window=WINDOW), rel=1e-5)
        assert row.score.positions == TOKENS
    assert (comparison.models[0].score.kl, comparison.models[0].score.agreement) == (None, None)
    values = [kl_divergence(original, model, ids, window=WINDOW, allow_short=True) for model in (w4, llama)]
    for row, kl in zip(comparison.models[1:], values, strict=False):
        assert row.score.kl.mean == pytest.approx(kl.mean(), rel=1e-3)
        assert row.score.kl.low < row.score.kl.mean < row.score.kl.high
        assert 0.5 < row.score.agreement < 1
    # The better one first, and both at the same positions.
    difference = paired_bootstrap(values[1], values[0], window=WINDOW)
    assert difference.is_below
    assert comparison.notes[2].startswith("KL of model.gguf less that of w4: -0.0")
    assert float(comparison.notes[2].split()[7]) == pytest.approx(difference.mean, abs=2e-5)
    assert "includes zero" not in comparison.notes[2]


def test_speed_at_the_lengths_that_the_model_reads(comparison):
    for row in comparison.models[:3]:
        assert [speed.prompt for speed in row.speeds] == [1, 40, 6144]
        for speed in row.speeds[:2]:
            assert (speed.runs, speed.absent) == (3, None)
            assert speed.prefill > 0
            assert speed.decode > 0
        assert row.speeds[2].prefill is None
        assert row.speeds[2].absent == "the model reads 512 tokens, 6 new ones among them"
        assert 0 < row.load_seconds < 60
        assert 50 << 20 < row.base_bytes < row.peak_bytes < 2 << 30


def test_samples_side_by_side(comparison):
    model = qkern.load(MODEL)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    inputs = tokenizer("And the king said", return_tensors="pt")
    made = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert comparison.models[0].samples == (tokenizer.decode(made), None)
    for row in comparison.models[:3]:
        assert row.samples[0].startswith(" ")
        assert any("is not continued: the model reads 512 tokens" in note for note in row.notes)


def test_the_missing_one_says_so_and_everything_is_json(comparison):
    assert comparison.models[3].failure.startswith("no weight files at")
    assert not comparison.is_empty
    loaded = json.loads(json.dumps(comparison.as_dict()))
    assert loaded["models"][1]["score"]["kl"]["mean"] == comparison.models[1].score.kl.mean
    assert "all 2048 tokens" in comparison.notes[0]
    assert "noisy" in comparison.notes[1]


def test_differences_within_chance_are_said(comparison, tmp_path):
    rows = comparison.models[:3]
    (tmp_path / "reference.json").write_text('{"vocabulary": 2048, "kept": 512}')
    noise = np.random.default_rng(0).normal(size=(2, 4000))
    for number in (1, 2):
        np.save(contestant.kl_file(tmp_path, number), noise[number - 1])
    notes = module._notes(rows, tmp_path, 50)
    assert notes[0].endswith("512 likeliest of 2048 tokens, all others as one: a lower bound.")
    assert notes[2].endswith(": the interval includes zero.")


def task_of(path, folder, **changed):
    return contestant.Task(
        **{
            "path": str(path),
            "number": 1,
            "folder": str(folder),
            "threads": torch.get_num_threads(),
            "dtype": "float32",
            **OPTIONS,
            "text": str(HELDOUT),
            "prompt_lengths": [1],
            "prompts": ["And"],
            **changed,
        }
    )


def merged(task):
    facts = {}
    for found in contestant.measure(task):
        facts |= found
    return facts


def test_without_the_original_there_is_no_kl(models, tmp_path):
    facts = merged(task_of(models / "w4", tmp_path))
    assert facts["score"]["perplexity"] > 1
    assert (facts["score"]["kl"], facts["score"]["agreement"]) == (None, None)


def test_another_vocabulary_has_no_kl_and_other_tokens_are_said(models, tmp_path, ids):
    shared = {"ids": ids.tolist(), "bos": None, "vocabulary": 2048}
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps({**shared, "ids": shared["ids"][::-1]}))
    facts = merged(task_of(MODEL, tmp_path, number=0))
    assert facts["notes"] == [
        "its own tokenizer cuts the text differently: it reads the first model's tokens"
    ]
    expected = perplexity(qkern.load(MODEL, dtype=torch.float32), ids.flip(0), window=WINDOW)
    assert facts["score"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    tokens.write_text(json.dumps({**shared, "vocabulary": 99}))
    facts = merged(task_of(models / "w4", tmp_path))
    assert facts["notes"] == ["has 2048 logits, not 99: it reads its own tokens, and has no KL"]
    assert facts["score"]["kl"] is None
    tokens.write_text(json.dumps(shared))
    assert merged(task_of(models / "w4", tmp_path))["score"]["kl"] is not None


def test_a_text_shorter_than_a_window_is_not_scored(tmp_path):
    (tmp_path / "text.txt").write_text("And the king said")
    facts = merged(task_of(MODEL, tmp_path, text=str(tmp_path / "text.txt")))
    assert facts["notes"][-1].startswith("not scored: the text is shorter than one window")
    assert facts["speeds"][0]["runs"] == 3


def test_scoring_in_fp32_that_does_not_fit_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(contestant, "available_bytes", lambda: 1_000_000)
    facts = merged(task_of(MODEL, tmp_path))
    reason = "not scored: in float32 its weights take 11.55 MB, and 1.00 MB of memory are free: score in "
    assert facts["notes"][-1] == f"{reason}the checkpoint's own dtype (--dtype auto)"
    assert "score" not in facts
    # In its own dtype it is not loaded again.
    assert "score" in merged(task_of(MODEL, tmp_path, dtype=None))


def test_what_does_not_fit_in_memory_is_not_tried(models, monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda: 3_000_000)
    monkeypatch.setattr(module, "_measured", lambda row, task, progress: row)
    original, w4 = compare(MODEL, [models / "w4"], **OPTIONS).models
    assert original.failure == "does not fit in memory: its weights take 5.78 MB, and 3.00 MB are free"
    assert w4.failure is None


def died(monkeypatch, program):
    """Row of a model whose process is `program`, which finds a loaded model and ends."""
    said = json.dumps({"doing": "scoring", "runner": "qkern", "load_seconds": 0.5, "peak_bytes": 7})
    monkeypatch.setattr(module, "_PROGRAM", f"import os, sys; print({said!r}, flush=True); {program}")
    return compare(MODEL, [MODEL], skip_original=True, **OPTIONS)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            f"os.kill(os.getpid(), {int(signal.SIGKILL)})",
            "scoring: its process was ended by SIGKILL, as the system does when memory runs out",
        ),
        ("sys.exit('first\\nlast words')", "scoring: its process ended with code 1: last words"),
        ("os._exit(3)", "scoring: its process ended with code 3: it said nothing"),
    ],
)
def test_a_process_that_dies_keeps_what_it_found(monkeypatch, program, reason):
    original, row = died(monkeypatch, program).models
    assert row.failure == reason
    assert (row.load_seconds, row.peak_bytes, row.score) == (0.5, 7, None)
    assert original.failure == "not run: the original is skipped"
    assert original.file_bytes == (MODEL / "model.safetensors").stat().st_size


def test_errors_of_the_process_and_of_a_machine_without_llama_cpp(models, monkeypatch, tmp_path):
    block = "import sys; sys.modules['llama_cpp'] = None; "
    monkeypatch.setattr(module, "_PROGRAM", block + module._PROGRAM)
    (tmp_path / "broken").mkdir()
    for file in MODEL.iterdir():
        shutil.copy(file, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    result = compare(MODEL, [models / "model.gguf", tmp_path / "broken"], skip_original=True, **OPTIONS)
    _, gguf, broken = result.models
    assert gguf.failure.startswith("loading: running a GGUF needs llama-cpp-python")
    assert "truncated" in broken.failure
    assert result.is_empty
    assert result.notes == ("No KL and no agreement: the original was not scored.",)


def test_what_libraries_print_is_no_result(monkeypatch, capfd):
    patched = (
        "import sys, os; sys.path.insert(0, sys.argv[1]); from qkern.pipelines import contestant; "
        "real = contestant.measure; "
        "contestant.measure = lambda task: (os.write(1, b'noise'), print('noise'), real(task))[2]; "
        "contestant.serve()"
    )
    monkeypatch.setattr(module, "_PROGRAM", patched)
    options = {**OPTIONS, "prompt_lengths": (1,), "prompts": ["And"]}
    row = compare(MODEL, [MODEL], skip_original=True, **options).models[1]
    assert row.failure is None
    assert "noise" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_lengths": (0, 5)}, r"at least 1: got \[0, 5\]"),
        ({"prompt_lengths": ()}, "at least 1"),
        ({"new_tokens": 0}, "new_tokens must be at least 1: got 0"),
        ({"tokens": 63}, "got 63 tokens and windows of 64"),
        ({"dtype": "int8"}, "unknown dtype 'int8': allowed are auto"),
        ({"prompts": ["a", " "]}, "a prompt is empty"),
        ({"text": "missing.txt"}, "cannot read the text file"),
    ],
)
def test_bad_arguments(changed, message):
    with pytest.raises(InputError, match=message):
        compare(MODEL, [MODEL], **{**OPTIONS, **changed})


def test_nothing_to_compare_with():
    with pytest.raises(InputError, match="name at least one more model"):
        compare(MODEL, [], **OPTIONS)


def test_names_and_prompts():
    assert module._names(["a/x", "b/x", "c/y"]) == ["a/x", "b/x", "y"]
    text = "\n\n".join(" ".join(f"{paragraph}{word}" for word in range(20)) for paragraph in "abcdef")
    beginnings = module._beginnings(text)
    assert [line[0] for line in beginnings] == ["a", "c", "e"]
    assert all(len(line.split()) == 12 for line in beginnings)
    assert module._beginnings("one line") == ["one line"]
