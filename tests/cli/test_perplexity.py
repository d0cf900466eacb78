import json

import pytest
import torch

import qkern
from qkern import cli
from qkern.demo import HELDOUT, MODEL
from qkern.evaluation import perplexity, read_text, token_ids

WINDOW = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text(HELDOUT)[:1500], encoding="utf-8")
    return path


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["perplexity", *map(str, arguments)])
    output = capsys.readouterr()
    return exit_info.value.code, output.out, output.err


def test_folder(capsys, text):
    from transformers import AutoTokenizer

    code, out, _ = run(capsys, MODEL, "--text", text, "--window", WINDOW, "--json")
    result = json.loads(out)
    ids = token_ids(AutoTokenizer.from_pretrained(MODEL), read_text(text))
    expected = perplexity(qkern.load(MODEL), ids, window=WINDOW)
    assert code == 0
    assert result["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert result["tokens"] == len(ids)
    assert result["windows"] == len(ids) // WINDOW
    assert result["scored_tokens"] == result["windows"] * (WINDOW // 2 - 1)
    assert (result["runner"], result["compute"], result["window"]) == ("qkern", "as the schemes say", WINDOW)
    assert 0 < result["standard_error"] < result["perplexity"]

    code, out, _ = run(capsys, MODEL, "--text", text, "--window", WINDOW)
    assert code == 0
    assert out.startswith(f"perplexity {expected:.4f} +/- {result['standard_error']:.4f} ")
    assert out.count("\n") == 1


def test_quantized_folder_in_float_and_int8(capsys, text, tmp_path):
    qkern.quantize(MODEL, method="rtn", scheme="w4g128", output=tmp_path / "rtn")
    results = {}
    for compute in ("float", "int8"):
        arguments = (tmp_path / "rtn", "--text", text, "--window", WINDOW, "--json", "--compute", compute)
        code, out, _ = run(capsys, *arguments)
        assert code == 0
        results[compute] = json.loads(out)
    plain = json.loads(run(capsys, MODEL, "--text", text, "--window", WINDOW, "--json")[1])
    assert results["float"]["perplexity"] != plain["perplexity"]
    assert results["int8"]["perplexity"] != results["float"]["perplexity"]
    assert results["int8"]["perplexity"] == pytest.approx(results["float"]["perplexity"], rel=0.05)


def test_gguf_is_run_by_llama_cpp(capsys, text, tmp_path):
    pytest.importorskip("llama_cpp")
    qkern.export_gguf(MODEL, tmp_path / "model.gguf", "f32")
    code, out, _ = run(capsys, tmp_path / "model.gguf", "--text", text, "--window", WINDOW, "--json")
    result = json.loads(out)
    assert (code, result["runner"], result["compute"]) == (0, "llama.cpp", None)
    plain = json.loads(run(capsys, MODEL, "--text", text, "--window", WINDOW, "--json")[1])
    # llama.cpp keeps keys and values in fp16, transformers everything in bf16.
    assert result["perplexity"] == pytest.approx(plain["perplexity"], rel=0.02)
    assert result["tokens"] == plain["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MODEL, "--window", 10**6), "shorter than one window"),
        (("no-such-folder-here",), "no-such-folder-here"),
        (("missing.gguf",), "no GGUF file at missing.gguf"),
        (("missing.gguf", "--compute", "int8"), "does not apply to a GGUF"),
        (("missing.gguf", "--device", "cpu"), "does not apply to a GGUF"),
    ],
)
def test_failures_are_one_line(capsys, text, arguments, message):
    if "no GGUF" in message:
        pytest.importorskip("llama_cpp")
    code, out, err = run(capsys, *arguments, "--text", text)
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("qkern: error: ")
    assert message in last


def test_empty_text(capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    code, _, err = run(capsys, MODEL, "--text", tmp_path / "empty.txt")
    assert code == 1
    assert "is empty" in err


def test_model_on_disk_is_not_touched():
    # The tests above share the shipped folder.
    assert {p.suffix for p in MODEL.iterdir()} <= {".json", ".md", ".safetensors", ".txt"}
    assert torch.is_grad_enabled()


def test_llama_cpp_runs_files_alone(capsys, text):
    code, out, err = run(capsys, MODEL, "--text", text, "--runner", "llama.cpp")
    assert (code, out) == (1, "")
    assert "llama.cpp runs .gguf files: got" in err
