"""Small layers packed by GPTQModel, with its own decoding: what `tests/checkpoints/test_peers.py` reads.

    build/interop/gptqmodel/bin/python tests/interop/golden.py tests/checkpoints/golden/gptqmodel.safetensors

A key is ``<format> <scheme>[ act-order]/<tensor>``; ``decoded`` is the peer's weight ``[N, K]`` in fp16.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

if TYPE_CHECKING:
    from torch import Tensor

N, K, GROUP = 32, 64, 32


def parts(bits: int, symmetric: bool, index: Tensor) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    """Make a linear whose weights are on a random grid, its scales and zero points ``[N, groups]``."""
    generator = torch.Generator().manual_seed(bits)
    groups = (N, K // GROUP)
    scales = (torch.rand(groups, generator=generator) + 0.5).half().float()
    # A zero point of 0 is what GPTQ v1 cannot store.
    zeros = torch.randint(1, 2**bits, groups, generator=generator).float()
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    codes = torch.randint(0, 2**bits, (N, K), generator=generator).float()
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight = torch.nn.Parameter((codes - zeros[:, index]) * scales[:, index], requires_grad=False)
    return linear, scales, zeros


def gptq(bits: int, *, symmetric: bool, first_version: bool, act_order: bool = False) -> dict[str, Tensor]:
    index = torch.arange(K) // GROUP
    if act_order:
        index = index[torch.randperm(K, generator=torch.Generator().manual_seed(0))]
    module = TorchLinear(
        bits=bits, group_size=GROUP, sym=symmetric, desc_act=act_order, in_features=K, out_features=N
    )
    module.pack_original(*parts(bits, symmetric, index), index.int())
    module.eval()
    decoded = module.dequantize_weight().T
    if first_version:
        convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    tensors = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    return {**tensors, "decoded": decoded}


def awq(*, symmetric: bool) -> dict[str, Tensor]:
    module = AwqTorchLinear(
        bits=4, group_size=GROUP, sym=symmetric, desc_act=False, in_features=K, out_features=N
    )
    linear, scales, zeros = parts(4, symmetric, torch.arange(K) // GROUP)
    module.pack(linear, scales.half(), zeros)
    tensors = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
    return {**tensors, "decoded": dequantize_gemm(**tensors, bits=4, group_size=GROUP).T}


def main() -> None:
    layers = {f"awq w4g32{'' if symmetric else 'z'}": awq(symmetric=symmetric) for symmetric in (True, False)}
    for bits in (2, 3, 4, 8):
        layers[f"gptq w{bits}g32"] = gptq(bits, symmetric=True, first_version=True)
        layers[f"gptq w{bits}g32z"] = gptq(bits, symmetric=False, first_version=True)
        layers[f"gptq_v2 w{bits}g32z act-order"] = gptq(
            bits, symmetric=False, first_version=False, act_order=True
        )
    save_file(
        {
            f"{name}/{part}": tensor.contiguous()
            for name, parts in layers.items()
            for part, tensor in parts.items()
        },
        sys.argv[1],
    )


if __name__ == "__main__":
    main()
