"""GGUF files of qkern beside those of llama.cpp's own quantizer: same mixture, text and size, one run.

    python bench/quality_gguf.py MODEL HELDOUT [--calibration FILE] [--types q2_k q3_k_m q4_k_m]

For the model and for its injected form (`bench/quality.py`) each file is made, decoded, and measured as
KL(original || quantized) and perplexity on HELDOUT, which calibration must not have seen. llama.cpp's files
come from ``llama_model_quantize`` of llama-cpp-python on an F32 export, plain and with an importance matrix
of the same calibration tokens (`qkern imatrix`). `against` is the difference of the KL to llama.cpp's with
importance, with the paired bootstrap's 95 % interval: below zero throughout means better.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import qkern
from qkern.calibration import load_texts, make_batches
from qkern.evaluation import kl_divergence, paired_bootstrap, perplexity, read_text, token_ids, window_logits
from qkern.gguf import GGUFFile
from qkern.models import inject
from qkern.pipelines.export_gguf import export_gguf
from qkern.pipelines.imatrix import imatrix
from quality import Replay, load, note, number, peer

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TYPES = ("q2_k", "q3_k_m", "q4_k_m")
PEER = "llama.cpp, imatrix"
# Makers of files: label to arguments of `export_gguf`; None is llama.cpp's quantizer.
MAKERS: dict[str, dict[str, Any] | None] = {
    "llama.cpp": None,
    PEER: None,
    "qkern": {},
    "qkern, importance": {"method": "rtn"},
    "qkern, AWQ": {"method": "awq"},
    "qkern, GPTQ": {"method": "gptq"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One file."""

    form: str
    type: str
    maker: str
    megabytes: float
    seconds: float
    kl: tuple[float, float, float]
    against: tuple[float, float, float] | None
    perplexity: float


def injected_folder(model: str, folder: Path) -> Path:
    """Write the injected form of a model, fp32, with its tokenizer."""
    from transformers import AutoTokenizer

    inject(load(model)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def decoded(source: str | Path, file: Path) -> Any:
    """Return the model that a GGUF file stands for."""
    model = load(str(source))
    with GGUFFile(file) as gguf:
        missing, unexpected = model.load_state_dict(dict(gguf.state_dict()), strict=False)
    if unexpected or any(not name.startswith("lm_head") for name in missing):
        raise SystemExit(f"{file.name} does not fit the model: {missing} {unexpected}")
    model.tie_weights()
    return model


def peer_file(folder: Path, name: str, weights: dict[str, Tensor], target: Path) -> float:
    """Let llama.cpp quantize the F32 export; returns the seconds that took."""
    entries = folder / "importance.safetensors"
    save_file(weights or {"none": torch.zeros(1)}, entries)
    options = ("--model", folder / "f32.gguf", "--type", name, "--file", target)
    found = peer(sys.executable, "llama-quantize", entries, *options)
    if isinstance(found, str):
        raise SystemExit(f"llama.cpp's quantizer {found}")
    return float(found[1]["seconds"])


def compare(source: str | Path, form: str, arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    original = load(str(source))
    length = min(arguments.length, original.config.max_position_embeddings)
    held_out = token_ids(tokenizer, read_text(arguments.text))[: arguments.windows * 512]
    texts = load_texts(arguments.calibration, tokenizer=tokenizer)
    ids = make_batches(tokenizer, texts, samples=arguments.samples, length=length)
    note(f"{form}: calibration {tuple(ids.shape)}, held out {len(held_out)} tokens")
    reference = window_logits(original, held_out)
    export_gguf(source, folder / "f32.gguf", "f32")
    matrix = imatrix(source, calibration=ids)
    importance = {name: entry.mean.flatten() for name, entry in matrix.entries.items()}
    rows = []
    for kind in arguments.types:
        values: dict[str, np.ndarray[Any, Any]] = {}
        for maker, options in MAKERS.items():
            if maker not in arguments.makers:
                continue
            target = folder / f"{kind}.gguf"
            if options is None:
                seconds = peer_file(folder, kind, importance if maker == PEER else {}, target)
            else:
                started = time.monotonic()
                calibration = {"calibration": ids} if options else {}
                export_gguf(source, target, kind, **options, **calibration)
                seconds = time.monotonic() - started
            replay = Replay(window_logits(decoded(source, target), held_out))
            values[maker] = kl_divergence(reference, replay, held_out)
            zero = 0 * values[maker]
            kl = paired_bootstrap(values[maker], zero)
            gap = paired_bootstrap(values[maker], values[PEER]) if PEER in values and options else None
            row = Row(
                form=form,
                type=kind,
                maker=maker,
                megabytes=target.stat().st_size / 1e6,
                seconds=seconds,
                kl=(kl.mean, kl.low, kl.high),
                against=None if gap is None else (gap.mean, gap.low, gap.high),
                perplexity=perplexity(replay.rewound(), held_out),
            )
            note(f"{kind} {maker}: KL {kl.mean:.5f}")
            rows.append(row)
            target.unlink()
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| model | type | made by | MB | KL, nats (95 % interval) | against | perplexity | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        against = "" if row.against is None else "{:+.5f} ({:+.5f} to {:+.5f})".format(*row.against)
        cells = (
            row.form,
            row.type,
            row.maker,
            number(row.megabytes, 3),
            "{:.5f} ({:.5f} to {:.5f})".format(*row.kl),
            against,
            number(row.perplexity, 3),
            number(row.seconds, 1),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder or hub id")
    parser.add_argument("text", type=Path, help="held-out text")
    parser.add_argument("--calibration", type=Path, help="default: calibration.txt beside the held-out text")
    parser.add_argument("--types", nargs="+", default=list(TYPES), help="mixtures")
    parser.add_argument("--makers", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--forms", nargs="+", choices=("plain", "injected"), default=["plain", "injected"])
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens of each, at most the model's context"
    )
    parser.add_argument("--windows", type=int, default=30, help="held-out windows of 512 tokens")
    arguments = parser.parse_args(argv)
    if arguments.calibration is None:
        arguments.calibration = arguments.text.with_name("calibration.txt")
    rows = []
    for form in arguments.forms:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source = (
                arguments.model if form == "plain" else injected_folder(arguments.model, folder / "model")
            )
            rows += compare(source, form, arguments, folder)
    print(table(rows))
    print(f"\nqkern {qkern.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
