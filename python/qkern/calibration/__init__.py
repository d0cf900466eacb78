"""Calibration: texts to batches of tokens, and layer-by-layer runs that capture what linears see."""

from qkern.calibration.batches import bounded_length, calibration_hash, make_batches, split_batches
from qkern.calibration.replay import Replay
from qkern.calibration.skeleton import (
    Weights,
    bind_names,
    fill,
    filled,
    load_config,
    meta_copy,
    meta_model,
)
from qkern.calibration.streaming import LayerStream, stages_by_role
from qkern.calibration.texts import load_texts
from qkern.calibration.tokenizer import has_tokenizer, load_tokenizer

__all__ = [
    "LayerStream",
    "Replay",
    "Weights",
    "bind_names",
    "bounded_length",
    "calibration_hash",
    "fill",
    "filled",
    "has_tokenizer",
    "load_config",
    "load_texts",
    "load_tokenizer",
    "make_batches",
    "meta_copy",
    "meta_model",
    "split_batches",
    "stages_by_role",
]
