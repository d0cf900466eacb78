"""`QuantLinear`s that read the same x, as one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules import module as _module

from qkern.errors import UnsupportedError
from qkern.nn.linear import QuantLinear, is_plain_call, needs_grad, transformed
from qkern.ops.dequant_matmul import LinearGroup, LinearHandle, resolve_compute
from qkern.ops.dequant_matmul.cpu import LAYOUT

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SharedInput"]


class SharedInput:
    """Linears that read the same x as one call: x is quantized once, one round of the threads does all.

    Keeps what it found out about the linears of the last call, never a result.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        # One tuple, so that threads never see handles with the group of others.
        self._known: tuple[tuple[LinearHandle, ...], LinearGroup | None] = (), None

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedInput, ()

    def __call__(self, linears: Sequence[Any], x: Tensor) -> tuple[Tensor, ...] | None:
        """Return the outputs for x, or None where each needs a call of its own.

        That is so for linears that are no `QuantLinear` (PEFT wraps them, say), have hooks, or whose weights
        want x prepared differently, and wherever gradients are wanted or a mode of torch is active.
        """
        outs = self._run(linears, x)
        if outs is None and self._known[0]:
            self._known = (), None  # weights that were replaced or unpacked must not live on here
        return outs

    def _run(self, linears: Sequence[Any], x: Tensor) -> tuple[Tensor, ...] | None:
        for linear in linears:
            if not _is_bare(linear) or linear._compute != linears[0]._compute:
                return None
        if _has_global_hooks():
            return None
        if torch.compiler.is_compiling():
            return _traced(linears, x)
        handles = tuple([linear._handle for linear in linears])
        biases = [linear._bias_for(x) for linear in linears]
        # A handle is missing before the linear's own first call, which packs it.
        if None in handles or not is_plain_call(x, None, handles[0].device):
            return None
        if any(needs_grad(x, bias) for bias in biases if bias is not None):
            return None
        known, group = self._known
        if handles != known:
            try:
                group = LinearGroup(handles)
            except UnsupportedError:
                group = None
            self._known = handles, group
        if group is None:
            return None
        compute = linears[0]._compute
        return group(x, biases, LinearHandle.auto if compute == "auto" else compute)


def _is_bare(linear: Any) -> bool:
    """Whether calling the linear would run `QuantLinear.forward` and nothing else."""
    return type(linear) is QuantLinear and not (
        linear._forward_hooks
        or linear._forward_pre_hooks
        or linear._backward_hooks
        or linear._backward_pre_hooks
        or "forward" in linear.__dict__
    )


def _has_global_hooks() -> bool:
    return bool(
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    )


def _traced(linears: Sequence[QuantLinear], x: Tensor) -> tuple[Tensor, ...] | None:
    """Record one call of the torch op."""
    if transformed():
        return None
    for linear in linears:
        linear._packed_by_now()
    biases = [linear._bias_for(x) for linear in linears]
    if any(needs_grad(x, bias) for bias in biases) or any(linear.layout != LAYOUT for linear in linears):
        return None
    if any(linear.input_scale is not None for linear in linears):
        return None
    first = linears[0]
    compute = resolve_compute(first._compute, x, first.scheme, needs_grad=False)
    outs = torch.ops.qkern.dequant_matmul_group(
        x,
        [linear.blob for linear in linears],
        biases,
        LAYOUT,
        [linear.out_features for linear in linears],
        first.in_features,
        [linear._spelling for linear in linears],
        compute,
    )
    return tuple(outs)
