"""The frame of the command line: exit codes, streams, logging."""

import json
import logging
import re
import subprocess
import sys
import time

import pytest

import qkern
from qkern import cli


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


def test_help_lists_every_command(capsys):
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    listed = [line.split()[1] for line in out.splitlines() if re.match(r"│ [a-z]", line)]
    assert listed == list(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_a_docstring(capsys, name):
    code, out, err = run(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert "Usage: qkern" in out


def test_list_of_benchmarks_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(capsys, "bench")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert {"dequant_matmul", "roofline"} <= {line.split()[0] for line in out.splitlines()}


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"qkern {qkern.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("convert", "x", "--to", "gguf", "--output", "y"), "qkern export-gguf"),
        (("convert", "x", "--to", "bitsandbytes", "--output", "y"), "--scheme nf4g64"),
        (("quantize", "x", "--method", "llm_int8", "--output", "y"), "int8=True"),
        (("quantize", "x", "--format", "gguf", "--output", "y"), "qkern export-gguf"),
    ],
)
def test_what_another_command_does_is_said(capsys, monkeypatch, arguments, hint):
    monkeypatch.setenv("COLUMNS", "200")
    code, _, err = run(capsys, *arguments)
    assert (code, hint in err) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("info", "--nonsense"),
        ("perplexity",),
        ("perplexity", "x", "--text", "y", "--compute", "fp8"),
    ],
)
def test_usage_errors_exit_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "Usage: qkern" in err


def test_failures_exit_1_with_one_line(capsys, tmp_path):
    code, out, err = run(capsys, "perplexity", "model", "--text", str(tmp_path / "missing.txt"))
    assert (code, out) == (1, "")
    reason = "No such file or directory; name a UTF-8 text file"
    assert err == f"qkern: error: cannot read the text file {tmp_path / 'missing.txt'}: {reason}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "out.bin"), "out.bin: No space left on device"),
        (OSError(18, "Invalid cross-device link", "a", None, b"b"), "a: b: Invalid cross-device link"),
        (OSError("hub says\n  no"), "hub says no"),
        (OSError(), "OSError"),
        (qkern.InputError("first\nsecond"), "first second"),
    ],
)
def test_every_error_is_one_line(capsys, monkeypatch, error, line):
    def fail():
        raise error

    monkeypatch.setattr("qkern.cli.info.collect", fail)
    assert run(capsys, "info") == (1, "", f"qkern: error: {line}\n")


@pytest.mark.parametrize(
    ("flags", "level"), [((), logging.INFO), (("-v",), logging.DEBUG), (("-q",), logging.WARNING)]
)
def test_log_level_and_stream(capsys, monkeypatch, flags, level):
    def log():
        logging.getLogger("qkern.somewhere").info("worked for 3 s")
        return {}

    monkeypatch.setattr("qkern.cli.info.collect", log)
    monkeypatch.setenv("QKERN_NO_PROGRESS", "")  # restored afterwards: -q sets it
    code, out, err = run(capsys, *flags, "info", "--json")
    assert (code, out) == (0, "{}\n")
    assert ("worked for 3 s" in err) == (level <= logging.INFO)
    assert logging.getLogger("qkern").level == level


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was():
    logger = logging.getLogger("qkern")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:], logger.level = handlers, level
    logger.manager._clear_cache()


def test_python_dash_m(tmp_path):
    command = [sys.executable, "-m", "qkern", "info", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(result.stdout)["qkern"] == qkern.__version__


def test_a_terminated_export_leaves_nothing(tmp_path):
    from qkern.demo import CALIBRATION, MODEL

    options = ["--method", "gptq", "--calibration", CALIBRATION, "--output", tmp_path / "model.gguf"]
    command = [sys.executable, "-m", "qkern", "export-gguf", MODEL, *options]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE) as process:
        while not list(tmp_path.iterdir()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.terminate()
        process.communicate()
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())
