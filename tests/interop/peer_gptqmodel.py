"""GPTQModel's side of `run.py`: it quantizes on the CPU, and reads with its plain torch backends, in fp16.

GPTQModel refuses to start on two cores: it gives the CPU one worker, and its own model loader asks for two.
``GPTQMODEL_CPU_WORKERS``, its own environment variable, is set here; nothing of it is patched.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the backend compiles its decoding; eager decodes the same

from typing import TYPE_CHECKING, Any

import torch
from exchange import logits_of, serve
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

if TYPE_CHECKING:
    from pathlib import Path

    from exchange import Answer
    from torch import Tensor


def make(source: str, folder: Path, calibration: Tensor, **config: Any) -> None:
    model = GPTQModel.load(source, QuantizeConfig(**config))
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration]
    backend = BACKEND.AWQ_TORCH if config.get("method") == "awq" else BACKEND.GPTQ_TORCH
    model.quantize(rows, batch_size=8, backend=backend)
    model.save(str(folder))


def read(folder: Path, ids: Tensor) -> Answer:
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[method]
    loaded = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16)
    model = loaded.model.eval()
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, TorchLinear):
            weights[name] = module.dequantize_weight().T
        elif isinstance(module, AwqTorchLinear):
            parts = {part: getattr(module, part) for part in ("qweight", "qzeros", "scales")}
            weights[name] = dequantize_gemm(**parts, bits=module.bits, group_size=module.group_size).T
    return logits_of(model, ids), weights


if __name__ == "__main__":
    serve(make, read)
