"""The torch op ``qkern::quantize_activations``."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from qkern.errors import InputError
from qkern.ops.registry import Request, select

__all__: list[str] = []

_LIBRARY: Final[Any] = torch.library.Library("qkern", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "quantize_activations(Tensor x, int? group_size, Tensor? scale=None, int zero=0) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _groups(K: int, group_size: int | None) -> int:
    return 1 if group_size is None else -(-K // group_size)


def _run(
    x: Tensor, group_size: int | None, scale: Tensor | None = None, zero: int = 0
) -> tuple[Tensor, Tensor]:
    return run(x, group_size, scale, zero, "auto")


def run(
    x: Tensor, group_size: int | None, scale: Tensor | None, zero: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Flatten the leading dimensions, choose a backend, call it."""
    static = scale is None or (scale.dtype == torch.float32 and scale.numel() == 1 and group_size is None)
    if (group_size is not None and group_size < 1) or not static:
        raise InputError(
            "the arguments of torch.ops.qkern.quantize_activations do not fit together; call "
            "qkern.ops.quantize_activations, which says what is wrong"
        )
    implementation = select("quantize_activations", backend, Request(device=x.device, dtype=x.dtype))
    *lead, K = x.shape
    M = x.numel() // K if K else torch.Size(lead).numel()
    length = max(K, 1) if group_size is None else min(group_size, max(K, 1))
    codes, scales = implementation.call(x.detach().reshape(M, K), length, scale, zero)
    if K == 0 and group_size is None:
        scales = torch.zeros(M, 1, dtype=torch.float32, device=x.device)
        scales = scales if scale is None else scales + scale
    return codes.view(x.shape), scales.view(*lead, _groups(K, group_size))


def _fake(
    x: Tensor, group_size: int | None, scale: Tensor | None = None, zero: int = 0
) -> tuple[Tensor, Tensor]:
    scales = x.new_empty((*x.shape[:-1], _groups(x.shape[-1], group_size)), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), scales


_LIBRARY.impl("quantize_activations", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkern::quantize_activations", _fake, lib=_LIBRARY)
