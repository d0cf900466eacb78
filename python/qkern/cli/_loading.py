"""Loading a model and its tokenizer for a command."""

from __future__ import annotations

from typing import Any


def load_model(path: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub id, quantized or not."""
    from qkern.calibration import load_tokenizer
    from qkern.checkpoints import model_folder
    from qkern.pipelines import load

    folder = model_folder(path)
    # The model first: its errors say what is wrong with a folder.
    model = load(folder, device=device)
    return model, load_tokenizer(folder)
