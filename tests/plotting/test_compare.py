"""The report of a comparison, from numbers made up here."""

import json

import pytest

from qkern.evaluation import Interval
from qkern.evaluation.decoding import Speed
from qkern.evaluation.scoring import Score
from qkern.pipelines.compare import ComparedModel, Comparison
from qkern.plotting import compare as report

PICTURES = ["decode.png", "memory.png", "prefill.png", "size-kl.png", "size-perplexity.png"]


def scored(**changed):
    return Score(perplexity=31.25, standard_error=0.5, scored_tokens=255, positions=512, **changed)


def speed(prompt, **changed):
    return Speed(prompt=prompt, prefill=100.0, decode=20.0, prefill_spread=0.05, runs=3, **changed)


@pytest.fixture
def comparison():
    original = ComparedModel(
        name="original",
        path="somewhere/original",
        runner="qkern",
        file_bytes=5_000_000,
        bpw_file=16.5,
        bpw_linear=16.0,
        load_seconds=1.5,
        base_bytes=300_000_000,
        peak_bytes=500_000_000,
        speeds=(
            speed(1),
            Speed(prompt=6144, absent="the model reads 512 tokens"),
            Speed(prompt=9999, absent="the model reads 512 tokens"),
        ),
        score=scored(),
        samples=(" and went", None),
        notes=("a note",),
    )
    gguf = ComparedModel(
        name="q4.gguf",
        path="q4.gguf",
        runner="llama.cpp",
        file_bytes=2_000_000,
        peak_bytes=400_000_000,
        base_bytes=300_000_000,
        load_seconds=0.5,
        speeds=(speed(1), speed(6144)),
        score=scored(kl=Interval(0.0125, 0.012, 0.013), agreement=0.9375),
        samples=(" and | came",),
        failure="scoring: its process was ended by SIGKILL",
    )
    gone = ComparedModel(name="gone", path="gone", failure="no such\nfolder")
    return Comparison(
        models=(original, gguf, gone),
        prompts=("He arose", "She"),
        settings={
            "prompt_lengths": [1, 6144],
            "tokens": 512,
            "text": "t.txt",
            "window": 64,
            "dtype": "auto",
            "new_tokens": 4,
        },
        machine="the machine",
        notes=("a word on KL",),
    )


def test_report_has_the_numbers_and_the_reasons(comparison, tmp_path):
    pytest.importorskip("matplotlib")
    text = report.write_report(comparison, tmp_path).read_text()
    rows = [
        "| original | qkern | 5.00 | 16.000 | 16.500 | 1.50 | 500 (300) | 31.250 | - | - |",
        "| q4.gguf | llama.cpp | 2.00 | - | - | 0.50 | 400 (300) | 31.250 | 0.01250 (0.01200 to 0.01300) "
        "| 93.75 |",
        "| gone | - | - | - | - | - | - | - | - | - |",
        "| 1 | original | 100.0 | 5% | 20.0 | 0% |",
        "| 6144 | q4.gguf | 100.0 | 5% | 20.0 | 0% |",
        "| He arose |  and went |  and \\| came |",
        "| She | - | - |",
        "- a word on KL",
        "- original: a note",
        "- original, prompts of 6144, 9999 tokens: the model reads 512 tokens",
        "- q4.gguf: scoring: its process was ended by SIGKILL",
        "- gone: no such folder",
        "the machine",
    ]
    lines = text.splitlines()
    assert [row for row in rows if row not in lines] == []
    assert "| 6144 | original" not in text
    assert json.loads((tmp_path / "compare.json").read_text()) == comparison.as_dict() | {
        "prompts": ["He arose", "She"],
        "notes": ["a word on KL"],
        "models": json.loads(json.dumps(comparison.as_dict()["models"])),
    }
    assert sorted(path.name for path in tmp_path.glob("*.png")) == PICTURES
    assert [f"]({name})" in text for name in PICTURES] == [True] * len(PICTURES)


def test_without_matplotlib_there_are_no_pictures_and_that_is_said(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "has_matplotlib", lambda: False)
    text = report.write_report(comparison, tmp_path).read_text()
    assert "No pictures: matplotlib is not installed" in text
    assert not list(tmp_path.glob("*.png"))


def test_pictures_only_of_what_was_measured(comparison, tmp_path):
    pytest.importorskip("matplotlib")
    nothing = Comparison(
        models=comparison.models[2:],
        prompts=(),
        settings=comparison.settings,
        machine="",
        notes=(),
    )
    assert report.write_pictures(nothing, tmp_path) == []
    report.write_report(nothing, tmp_path)
