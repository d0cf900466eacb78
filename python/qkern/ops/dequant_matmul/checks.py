"""The check of an input, shared by the op, the handle that goes around it, and the modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from qkern.errors import InputError
from qkern.schemes import FLOAT_DTYPES

if TYPE_CHECKING:
    import torch

__all__ = ["check_input"]


def check_input(x: Tensor, K: int, device: torch.device | None = None) -> None:
    """Refuse activations that a weight ``[N, K]`` on `device` cannot be multiplied by.

    Raises
    ------
    InputError
        That says whether the type, the dtype, the shape or the device is wrong.
    """
    if not isinstance(x, Tensor):
        raise InputError(
            f"x must be a tensor: got {type(x).__name__}, allowed is fp32, fp16 or bf16 [..., {K}]; make one "
            "with torch.as_tensor(x, dtype=torch.float32)"
        )
    if x.dtype not in FLOAT_DTYPES:
        raise InputError(
            f"x has the wrong dtype: got {x.dtype} {list(x.shape)}, allowed are torch.float32, torch.float16 "
            "and torch.bfloat16; convert it, for example with x.float()"
        )
    if x.dim() == 0 or x.shape[-1] != K:
        raise InputError(
            f"x has the wrong shape: got {list(x.shape)}, allowed is [..., {K}], the weight's input features "
            "last; transpose or reshape it, or check which layer it belongs to"
        )
    if device is not None and x.device != device:
        raise InputError(
            f"x is on the wrong device: got {x.device}, allowed is {device}, where the weight is; move x "
            f"with x.to({str(device)!r}), or the module with .to({str(x.device)!r})"
        )
