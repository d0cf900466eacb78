"""Perplexity of a GGUF by llama.cpp, beside the same model in torch."""

import builtins

import pytest
import torch

import qkern
from qkern import FormatError, InputError, UnsupportedError
from qkern.demo import HELDOUT, MODEL
from qkern.evaluation import bos_if_added, perplexity, read_text, token_ids
from qkern.evaluation.llama_cpp import LlamaCpp
from qkern.gguf.imatrix import write_imatrix

WINDOW = 64
TEXT = read_text(HELDOUT)[:2500]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    path = tmp_path_factory.mktemp("gguf") / "model-f32.gguf"
    qkern.export_gguf(MODEL, path, "f32")
    return path


def test_tokens_logits_and_perplexity_are_those_of_transformers(gguf):
    from transformers import AutoTokenizer

    llama = LlamaCpp(gguf, context=WINDOW, f32_cache=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = token_ids(tokenizer, TEXT)
    assert torch.equal(llama.tokenize(TEXT), ids)
    assert llama.bos == bos_if_added(tokenizer)
    model = qkern.load(MODEL, dtype=torch.float32)
    batch = ids[: 2 * WINDOW].view(2, WINDOW)
    with torch.no_grad():
        torch.testing.assert_close(llama(batch), model(batch).logits, rtol=1e-3, atol=2e-3)
    ours = perplexity(model, ids, window=WINDOW)
    assert perplexity(llama, ids, window=WINDOW) == pytest.approx(ours, rel=1e-4)


def test_windows_beyond_the_context_are_refused(gguf):
    for llama, reads in ((LlamaCpp(gguf, context=16), 16), (LlamaCpp(gguf, context=1024), 512)):
        with pytest.raises(InputError, match=f"got {reads + 1} tokens, it reads {reads}; give"):
            llama(torch.zeros(1, reads + 1, dtype=torch.int64))


def test_missing_and_broken_files(tmp_path):
    pytest.importorskip("llama_cpp")
    with pytest.raises(InputError, match="no GGUF file at"):
        LlamaCpp(tmp_path / "missing.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(FormatError, match="cannot load"):
        LlamaCpp(tmp_path / "broken.gguf")


def test_the_reason_is_said(gguf, tmp_path):
    (tmp_path / "short.gguf").write_bytes(gguf.read_bytes()[:1_000_000])
    with pytest.raises(FormatError, match=r"cannot load .*truncated: tensor '.*' ends at byte"):
        LlamaCpp(tmp_path / "short.gguf")
    matrix = qkern.imatrix(MODEL, calibration=torch.arange(64).view(2, 32))
    write_imatrix(tmp_path / "matrix.gguf", matrix)
    with pytest.raises(FormatError, match=r"its general.type is 'imatrix', not 'model'"):
        LlamaCpp(tmp_path / "matrix.gguf")
    with pytest.raises(InputError, match=r"is no model: its general.type is 'imatrix'"):
        qkern.load(tmp_path / "matrix.gguf")


def test_missing_package_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def without_llama(name, *args, **kwargs):
        if name == "llama_cpp":
            raise ImportError("No module named 'llama_cpp'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_llama)
    with pytest.raises(UnsupportedError, match=r"pip install llama-cpp-python"):
        LlamaCpp("model.gguf")
