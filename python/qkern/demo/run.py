"""What `qkern demo` does: quantize the shipped model by every method, save, reload, compare, export."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from qkern import _progress
from qkern.demo import CALIBRATION, HELDOUT, MODEL
from qkern.errors import InputError, QkernError
from qkern.evaluation import bpw_file, bpw_linear, kl_divergence, perplexity, read_text, window_logits
from qkern.nn import compute_mode
from qkern.pipelines import export_gguf, load, quantize, save

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

__all__ = ["GgufRow", "QualityRow", "make_output", "run_gguf", "run_quality"]

logger = logging.getLogger(__name__)

MARK: Final = ".qkern-demo"
WINDOW: Final = 512
EVALUATION_WINDOWS: Final = 32  # 16,384 positions
CALIBRATION_SAMPLES: Final = 128
PROMPT: Final = "And the king said unto Daniel,"

# Method, scheme, format: each deployed format appears, and each bit width with and without calibration.
RUNS: Final = (
    ("rtn", "w8", "compressed-tensors"),
    ("rtn", "w4g128", "compressed-tensors"),
    ("gptq", "w4g128", "gptq"),
    ("awq", "w4g128z", "awq"),
    ("rtn", "w3g128", "compressed-tensors"),
    ("gptq", "w3g128", "gptq"),
    ("rtn", "w2g64", "compressed-tensors"),
    ("gptq", "w2g64", "gptq_v2"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityRow:
    """One quantized checkpoint beside the original; KL in nats, sizes in bits per weight and bytes."""

    scheme: str
    method: str
    format: str
    bpw_linear: float
    bpw_file: float
    file_bytes: int
    kl: float
    perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufRow:
    """One GGUF file; `continuation` is None where llama-cpp-python is not installed."""

    type: str
    file_bytes: int
    bpw_file: float
    continuation: str | None


def make_output(path: Path) -> None:
    """Create the demo's folder; what an earlier demo left in it is removed.

    Raises
    ------
    InputError
        If it exists, is not empty and is not from a demo.
    """
    mark = path / MARK
    if mark.is_file():
        for entry in path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != mark:
                entry.unlink()
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(
            f"output folder must be new, empty or an earlier demo's: got {path}; choose another with "
            "--output or remove it"
        )
    path.mkdir(parents=True, exist_ok=True)
    mark.write_text("This folder was made by qkern demo, which may replace everything in it.\n")


def run_quality(
    output: Path, *, windows: int = EVALUATION_WINDOWS, samples: int = CALIBRATION_SAMPLES
) -> list[QualityRow]:
    """Quantize, evaluate, save and reload the shipped model once for each of `RUNS`.

    Parameters
    ----------
    output : Path
        Existing folder; the checkpoints are written to folders in it.
    windows : int
        Held-out windows of 512 tokens to score.
    samples : int
        Calibration sequences of 512 tokens.

    Returns
    -------
    list of QualityRow
        The original first.

    Raises
    ------
    QkernError
        If a reloaded checkpoint does not give the logits that were saved.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer(read_text(HELDOUT))["input_ids"])[: windows * WINDOW]
    original = load(MODEL, dtype=torch.float32)
    reference = window_logits(original, ids, window=WINDOW)
    size = _weight_bytes(MODEL)
    rows = [
        QualityRow(
            scheme="bf16",
            method="-",
            format="-",
            bpw_linear=16.0,
            bpw_file=bpw_file(MODEL),
            file_bytes=size,
            kl=0.0,
            perplexity=perplexity(original, ids, window=WINDOW),
        )
    ]
    with _progress.task("Demo", total=len(RUNS), unit="model") as progress:
        for method, scheme, format_name in RUNS:
            folder = output / f"{scheme}-{method}"
            rows.append(_run_one(method, scheme, format_name, folder, ids, reference, tokenizer, samples))
            progress.advance(note=f"{scheme} {method}")
    return rows


def _run_one(
    method: str,
    scheme: str,
    format_name: str,
    folder: Path,
    ids: Tensor,
    reference: Tensor,
    tokenizer: Any,
    samples: int,
) -> QualityRow:
    calibration = None if method == "rtn" else CALIBRATION
    model = quantize(
        MODEL, method=method, scheme=scheme, calibration=calibration, samples=samples, length=WINDOW
    )
    save(model, folder, format=format_name, tokenizer=tokenizer)
    reloaded = load(folder, dtype=model.dtype)
    probe = ids[None, :WINDOW]
    with torch.no_grad(), compute_mode(model, "float"), compute_mode(reloaded, "float"):
        difference = (model(probe).logits - reloaded(probe).logits).abs().max().item()
    if difference != 0:
        raise QkernError(
            f"{folder} does not reload to the same model: logits differ by up to {difference:.3g}"
        )
    reloaded = load(folder, dtype=torch.float32)  # scored without rounding activations to bf16
    kl = kl_divergence(reference, reloaded, ids, window=WINDOW, allow_short=True)
    return QualityRow(
        scheme=scheme,
        method=method,
        format=format_name,
        bpw_linear=bpw_linear(reloaded),
        bpw_file=bpw_file(folder),
        file_bytes=_weight_bytes(folder),
        kl=float(kl.mean()),
        perplexity=perplexity(reloaded, ids, window=WINDOW),
    )


def run_gguf(output: Path, types: tuple[str, ...] = ("q8_0", "q4_k_m")) -> list[GgufRow]:
    """Export the shipped model to GGUF files in `output` and run each where llama-cpp-python is installed."""
    rows = []
    for gguf_type in types:
        path = output / f"model-{gguf_type}.gguf"
        export_gguf(MODEL, path, type=gguf_type)
        rows.append(
            GgufRow(
                type=gguf_type,
                file_bytes=path.stat().st_size,
                bpw_file=bpw_file(path),
                continuation=_continue_with_llama_cpp(path),
            )
        )
    return rows


def _continue_with_llama_cpp(path: Path) -> str | None:
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    from llama_cpp import Llama

    llama = Llama(model_path=str(path), n_ctx=128, n_threads=torch.get_num_threads(), verbose=False)
    text: str = llama(PROMPT, max_tokens=16, temperature=0.0)["choices"][0]["text"]
    return PROMPT + text


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
