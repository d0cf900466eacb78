"""What a peer's process and qkern's exchange: jobs in a JSON file, answers in safetensors.

A peer's environment has no qkern, so this file imports nothing of it. An answer holds what the peer makes
of a checkpoint: the logits of the held-out tokens, and the weight that it decodes of every quantized linear.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    Answer = tuple[Tensor, dict[str, Tensor]]

WEIGHT = "weight of "


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits in the dtype that the model computes in."""
    with torch.no_grad():
        return model(input_ids=ids).logits


def write_answer(path: Path, logits: Tensor, weights: Mapping[str, Tensor]) -> None:
    tensors = {f"{WEIGHT}{name}": weight.detach().contiguous() for name, weight in weights.items()}
    save_file({"logits": logits, **tensors}, path)


def read_answer(path: Path) -> Answer:
    tensors = load_file(path)
    logits = tensors.pop("logits")
    return logits, {name.removeprefix(WEIGHT): weight for name, weight in tensors.items()}


def serve(make: Callable[..., None], read: Callable[[Path, Tensor], Answer]) -> None:
    """Do the jobs of the file that the command line names, each whether or not another fails.

    A job has a `name`, a checkpoint's `folder`, and if the peer is to `make` it first, how. The answer is
    ``<folder>.answer``, or ``<folder>.error`` with the traceback.
    """
    torch.manual_seed(0)
    request = json.loads(Path(sys.argv[1]).read_text())
    texts = load_file(request["ids"])
    for job in request["jobs"]:
        folder = Path(job["folder"])
        print(f"== {job['name']}", file=sys.stderr, flush=True)
        try:
            if "make" in job:
                make(request["model"], folder, texts["calibration"], **job["make"])
            write_answer(Path(f"{folder}.answer"), *read(folder, texts["heldout"]))
        except Exception:  # a peer's failure is a result: the row shows it
            Path(f"{folder}.error").write_text(traceback.format_exc())
