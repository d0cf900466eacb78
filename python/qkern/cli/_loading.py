"""Loading a model and its tokenizer for a command."""

from __future__ import annotations

from typing import Any

from qkern import _progress


def load_model(path: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub id, quantized or not."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from qkern.pipelines import load

    if not _progress.enabled():
        logging.disable_progress_bar()
    # The model first: its errors say what is wrong with a folder.
    model = load(path)
    return model, AutoTokenizer.from_pretrained(path)
