"""Checkpoints between qkern and its peers, in both directions, each side in an environment of its own.

    python tests/interop/run.py --output FOLDER [--environments FOLDER] [--only TEXT]

Run it with a Python that has qkern. For each file of `requirements/` it makes a virtual environment. On the
shipped model, peers make checkpoints that qkern loads, and qkern makes checkpoints that peers load; whoever
makes one, the peer decodes its weights and computes logits, and qkern is compared with it. Prints a table,
and exits with 1 if a row of it failed. See README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cases import FROM_PEERS, FROM_QKERN, Case
from exchange import logits_of, read_answer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import qkern
from qkern.demo import MODEL
from qkern.nn import quant_linears
from qkern.ops import dequantize_groupwise

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from qkern.schemes import QuantizedWeight

HERE = Path(__file__).resolve().parent
PEERS = {"gptqmodel": "GPTQModel", "transformers": "transformers"}
SEQUENCES, LENGTH = {"calibration": 32, "heldout": 8}, 256
# A reader in the same dtype as plain torch may have twice its error; one in int8 1.05 times the other's.
FLOAT_LIMIT, INT8_LIMIT = 2.0, 1.05
# bitsandbytes multiplies by 1/127 in fp32 where qkern stores the quotient: two roundings more.
INT8_WEIGHT_LIMIT = 2.0**-22


@dataclass
class Row:
    """What was found about a checkpoint; `problems` is empty if nothing is wrong."""

    case: Case
    linears: int = 0
    weights: str = ""
    peer: str = ""
    ours: str = ""
    problems: list[str] = field(default_factory=list)


def rms(difference: Tensor) -> float:
    return math.sqrt(float(difference.double().square().mean()))


# Environments and processes ---------------------------------------------------------------------------------


def interpreter(environments: Path, peer: str) -> Path:
    """Python of the peer's environment, made if it is not there."""
    folder = environments.resolve() / peer
    python = folder / "bin" / "python"
    ready = folder / "ready"
    wanted = (HERE / "requirements" / f"{peer}.txt").read_text()
    if not ready.exists() or ready.read_text() != wanted:
        venv.create(folder, with_pip=True, clear=True)
        command = [python, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements" / f"{peer}.txt"]
        subprocess.run([str(part) for part in command], check=True)
        ready.write_text(wanted)
    return python


def run_peer(python: Path, peer: str, cases: Iterable[Case], output: Path) -> None:
    jobs = []
    for case in cases:
        job: dict[str, Any] = {"name": case.name, "folder": str(output / case.folder)}
        jobs.append(job if case.ours else {**job, "make": case.make})
    request = output / f"{peer}.json"
    request.write_text(
        json.dumps({"ids": str(output / "ids.safetensors"), "model": str(MODEL), "jobs": jobs}, indent=1)
    )
    # Nothing of qkern's environment reaches the peer.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (output / f"{peer}.log").open("w") as log:
        subprocess.run(
            [str(python), str(HERE / f"peer_{peer}.py"), str(request)],
            env=environment,
            cwd=output,  # where some leave logs
            stdout=log,
            stderr=log,
            check=True,
        )


# Models -----------------------------------------------------------------------------------------------------


def write_ids(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = {}
    for name, count in SEQUENCES.items():
        tokens = tokenizer((MODEL / f"{name}.txt").read_text(), return_tensors="pt").input_ids[0]
        ids[name] = tokens[: count * LENGTH].view(count, LENGTH).contiguous()
    save_file(ids, path)


def make(case: Case, folder: Path, calibration: Tensor) -> None:
    """Write one of qkern's checkpoints."""
    if case.make.get("int8"):
        qkern.save(qkern.load(MODEL, int8=True), folder)
        return
    options = {key: value for key, value in case.make.items() if value != ""}
    if options["method"] != "rtn":
        options["calibration"] = calibration
    qkern.quantize(MODEL, output=folder, device="cpu", **options)


def plain_model(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """Model of transformers' own modules with these weights and everything else of the folder."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    stored = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    stored |= {f"{name}.weight": weight for name, weight in weights.items()}
    wanted = {name for name in model.state_dict() if name != "lm_head.weight"}  # tied to the embedding
    model.load_state_dict({name: stored[name] for name in wanted}, strict=False)
    return model


# Comparing --------------------------------------------------------------------------------------------------


def compare(case: Case, folder: Path, ids: Tensor) -> Row:
    row = Row(case)
    error = Path(f"{folder}.error")
    if error.exists():
        last = error.read_text().strip().splitlines()[-1]
        row.problems.append(f"{PEERS[case.peer]}: {last}")
        return row
    try:
        check(row, folder, ids)
    except qkern.QkernError as failure:
        row.problems.append(f"qkern: {failure}")
    return row


def check(row: Row, folder: Path, ids: Tensor) -> None:
    theirs, weights = read_answer(Path(f"{folder}.answer"))
    # int8 activations are what such a checkpoint asks for; all others are compared as floats.
    compute = "int8" if row.case.int8 else "float"
    model = qkern.load(folder, dtype=torch.float32, compute=compute)
    layers = {name: layer.quantized() for name, layer in quant_linears(model).items()}
    check_weights(row, layers, weights)

    mine = logits_of(model, ids)
    decoded = {name: dequantize_groupwise(layer) for name, layer in layers.items()}

    def plain(dtype: torch.dtype) -> Tensor:
        return logits_of(plain_model(folder, decoded, dtype), ids)

    truth = plain(torch.float64)
    errors = rms(theirs - truth), rms(mine - truth)
    if row.case.int8:
        row.peer, row.ours = (f"{error:.5f}" for error in errors)
        if not 1 / INT8_LIMIT <= errors[0] / errors[1] <= INT8_LIMIT:  # a NaN fails too
            row.problems.append("errors of int8 are not alike")
    else:
        ratios = errors[0] / rms(plain(theirs.dtype) - truth), errors[1] / rms(plain(mine.dtype) - truth)
        row.peer, row.ours = (
            f"{ratios[0]:.2f} x {str(theirs.dtype).removeprefix('torch.')}",
            f"{ratios[1]:.2f} x float32",
        )
        if not all(ratio <= FLOAT_LIMIT for ratio in ratios):
            row.problems.append("logits are off")
    if not row.case.bitsandbytes:  # transformers keeps these for the package
        hosted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for layer in quant_linears(hosted).values():
            layer.compute = compute
        if not torch.equal(logits_of(hosted, ids), mine):
            row.problems.append("from_pretrained has other logits than load")


def check_weights(row: Row, layers: Mapping[str, QuantizedWeight], weights: Mapping[str, Tensor]) -> None:
    """Both have the same quantized linears, and decode them to the same bits in the peer's dtype."""
    row.linears = len(layers)
    if layers.keys() != weights.keys():
        row.problems.append(f"quantized for one only: {sorted(layers.keys() ^ weights.keys())}")
    limit = INT8_WEIGHT_LIMIT if row.case.int8 and row.case.bitsandbytes else 0.0
    row.weights = f"within {limit:.1e}" if limit else "equal"
    for name in layers.keys() & weights.keys():
        theirs = weights[name]
        difference = (dequantize_groupwise(layers[name], theirs.dtype) - theirs).abs()
        if not (difference <= limit * theirs.abs()).all():
            row.weights = "differ"
            row.problems.append(f"{name} differs by up to {float(difference.max()):.3g}")


def table(rows: Iterable[Row]) -> str:
    lines = [
        "| checkpoint | made by | read by | linears | weights | error of the peer | error of qkern | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peer = PEERS[row.case.peer]
        maker = "llm-compressor" if row.case.make.get("by") == "llm-compressor" else peer
        maker, reader = ("qkern", peer) if row.case.ours else (maker, "qkern")
        verdict = "; ".join(row.problems) or "ok"
        cells = row.case.name, maker, reader, row.linears, row.weights, row.peer, row.ours, verdict
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environments", type=Path, default=HERE.parents[1] / "build" / "interop")
    parser.add_argument("--output", type=Path, help="a new folder for checkpoints and logs", required=True)
    parser.add_argument("--only", default="", help="checkpoints with this text in their name")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    output = arguments.output.resolve()
    started = time.monotonic()
    torch.manual_seed(0)
    qkern.enable()
    logging.disable_progress_bar()

    ids = output / "ids.safetensors"
    write_ids(ids)
    texts = load_file(ids)
    cases = [case for case in (*FROM_PEERS, *FROM_QKERN) if arguments.only in case.name]
    for case in cases:
        if case.ours:
            make(case, output / case.folder, texts["calibration"])
    for peer in PEERS:
        own = [case for case in cases if case.peer == peer]
        if own:
            run_peer(interpreter(arguments.environments, peer), peer, own, output)
    rows = [compare(case, output / case.folder, texts["heldout"]) for case in cases]
    print(table(rows))
    failed = sum(bool(row.problems) for row in rows)
    print(f"\n{len(rows) - failed} passed, {failed} failed, {time.monotonic() - started:.0f} s")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
