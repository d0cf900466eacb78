"""Checkpoint formats: GPTQ, AWQ GEMM, compressed-tensors, bitsandbytes; reading and writing, no algorithm."""

from qkern.checkpoints.base import Entry, Format
from qkern.checkpoints.bitsandbytes import bitsandbytes_details
from qkern.checkpoints.folder import TensorFolder, model_folder, open_safetensors, read_json
from qkern.checkpoints.reader import QuantizedCheckpoint, decode_layer, read_quantized
from qkern.checkpoints.registry import FORMATS, detect, format_named, refusals
from qkern.checkpoints.shards import parse_size
from qkern.checkpoints.writer import RECIPE_NAME, CheckpointWriter, check_output, new_folder

__all__ = [
    "FORMATS",
    "RECIPE_NAME",
    "CheckpointWriter",
    "Entry",
    "Format",
    "QuantizedCheckpoint",
    "TensorFolder",
    "bitsandbytes_details",
    "check_output",
    "decode_layer",
    "detect",
    "format_named",
    "model_folder",
    "new_folder",
    "open_safetensors",
    "parse_size",
    "read_json",
    "read_quantized",
    "refusals",
]
