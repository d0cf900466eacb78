"""transformers' side of `run.py`: llm-compressor or bitsandbytes makes, transformers reads.

compressed-tensors decodes weights to floats when a model runs, and is read in fp32. bitsandbytes multiplies
nf4 and fp4 in bf16 on a CPU, so a model of these is read in bf16; one of int8 in fp32.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from exchange import logits_of, serve
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

if TYPE_CHECKING:
    from pathlib import Path

    from exchange import Answer
    from torch import Tensor, nn


def make(source: str, folder: Path, calibration: Tensor, *, by: str, **options: Any) -> None:
    {"llm-compressor": by_llm_compressor, "bitsandbytes": by_bitsandbytes}[by](
        source, folder, calibration, **options
    )


def by_llm_compressor(source: str, folder: Path, calibration: Tensor, *, recipe: dict[str, Any]) -> None:
    from llmcompressor import oneshot

    rows = {"input_ids": calibration.tolist(), "attention_mask": torch.ones_like(calibration).tolist()}
    oneshot(
        model=source,
        dataset=Dataset.from_dict(rows),
        recipe=json.dumps({"only_stage": {"all_modifiers": recipe}}),  # a recipe is YAML, and so is JSON
        num_calibration_samples=len(calibration),
        max_seq_length=calibration.shape[1],
        output_dir=str(folder),
    )


def by_bitsandbytes(source: str, folder: Path, calibration: Tensor, **options: Any) -> None:
    del calibration
    config = BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder)


def read(folder: Path, ids: Tensor) -> Answer:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    dtype = torch.bfloat16 if config.get("load_in_4bit") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    # compressed-tensors decodes when a model runs; bitsandbytes then changes what it decodes from.
    if config["quant_method"] == "bitsandbytes":
        weights = of_bitsandbytes(model)
        return logits_of(model, ids), weights
    return logits_of(model, ids), of_compressed_tensors(model)


def of_compressed_tensors(model: nn.Module) -> dict[str, Tensor]:
    modules = model.named_modules()
    return {name: module.weight for name, module in modules if hasattr(module, "quantization_scheme")}


def of_bitsandbytes(model: nn.Module) -> dict[str, Tensor]:
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weights[name] = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, Linear8bitLt):
            weights[name] = functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return weights


if __name__ == "__main__":
    serve(make, read)
