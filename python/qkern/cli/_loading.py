"""Loading a model and its tokenizer for a command."""

from __future__ import annotations

from typing import Any


def load_model(path: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, hub id or GGUF file, quantized or not."""
    from qkern.calibration import load_tokenizer
    from qkern.checkpoints import model_folder
    from qkern.gguf import read_tokenizer
    from qkern.pipelines.load import is_gguf, load

    # The model first: its errors say what is wrong with a folder.
    if is_gguf(path):
        return load(path, device=device), read_tokenizer(path)
    folder = model_folder(path)
    return load(folder, device=device), load_tokenizer(folder)
