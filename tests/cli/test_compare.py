"""`qkern compare` from the command line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qkern
from qkern import cli
from qkern.demo import MODEL

OPTIONS = (
    "--tokens",
    256,
    "--window",
    64,
    "--prompt-lengths",
    "1,6144",
    "--new-tokens",
    4,
    "--device",
    "cpu",
)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["compare", *map(str, arguments)])
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "w4"
    qkern.quantize(MODEL, method="rtn", scheme="w4g128", output=folder)
    return folder


def test_report_and_tables(capsys, quantized, tmp_path):
    output = tmp_path / "report"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("And the king\n\nIn the beginning\n")
    code, out, _ = run(
        capsys, MODEL, quantized, "missing.gguf", *OPTIONS, "--prompts", prompts, "--output", output
    )
    assert code == 0
    assert "missing.gguf: no weight files at missing.gguf" in out
    assert "In the beginning" in out
    assert f"report: {output / 'report.md'}" in out
    numbers = json.loads((output / "compare.json").read_text())
    w4 = numbers["models"][1]
    assert f"{w4['score']['perplexity']:.3f}" in out
    assert f"{w4['score']['kl']['mean']:.5f}" in out
    assert numbers["prompts"] == ["And the king", "In the beginning"]
    text = (output / "report.md").read_text()
    assert f"{w4['score']['kl']['mean']:.5f}" in text
    assert "prompts of 6144 tokens: the model reads 512 tokens" in text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    # What is there is never written over, and that is said before anything is measured.
    before = (output / "compare.json").stat().st_mtime_ns
    code, out, err = run(capsys, MODEL, quantized, *OPTIONS, "--output", output)
    assert (code, out) == (1, "")
    assert "exists and is not empty" in err
    assert (output / "compare.json").stat().st_mtime_ns == before


def test_json_without_the_original(capsys, quantized):
    code, out, _ = run(
        capsys, MODEL, quantized, *OPTIONS, "--skip-original", "--json", "--prompt", "And", "--prompt", "Or"
    )
    found = json.loads(out)
    assert code == 0
    assert found["models"][0]["failure"] == "not run: the original is skipped"
    assert found["models"][1]["score"]["perplexity"] > 1
    assert found["models"][1]["score"]["kl"] is None
    assert len(found["models"][1]["samples"]) == len(found["prompts"]) == 2


def test_a_terminated_run_leaves_no_process_and_no_file(quantized, tmp_path):
    command = [sys.executable, "-m", "qkern", "compare", MODEL, quantized, *OPTIONS]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, env=environment) as process:
        listing = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (children := listing.read_text().split()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.terminate()
        process.communicate()
    assert process.returncode == 143
    assert not [child for child in children if Path(f"/proc/{child}").exists()]
    assert not list(tmp_path.iterdir())


def test_an_original_alone_is_a_failure_without_empty_tables(capsys):
    code, out, err = run(capsys, "--skip-original", MODEL, "missing.gguf", *OPTIONS)
    assert code == 1
    assert "Size and quality" in out
    assert "Speed" not in out
    assert "Samples" not in out
    assert "no model could be measured beside the original" in err


def test_nothing_measured_is_a_failure(capsys):
    code, out, err = run(capsys, "no-such-folder", "missing.gguf", *OPTIONS)
    assert code == 1
    assert "no-such-folder" in out
    assert err.splitlines()[-1].startswith("qkern: error: no model could be measured beside the original")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--prompt-lengths", "1,x"), 2, "no list of numbers"),
        (("--prompt-lengths", "0"), 1, "prompt lengths must be at least 1"),
        (("--tokens", 10), 1, "at least one window"),
        (("--prompt", "a", "--prompts", "b"), 1, "give one of them"),
        (("--prompts", "missing.txt"), 1, "cannot read the text file missing.txt"),
        (("--dtype", "int8"), 2, "int8"),
    ],
)
def test_bad_arguments(capsys, arguments, code, message):
    found, out, err = run(capsys, MODEL, MODEL, *arguments)
    assert (found, out) == (code, "")
    assert message in err
