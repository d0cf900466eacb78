"""The torch ops ``qkern::dequant_matmul`` and ``qkern::dequant_matmul_backward``.

`Library` and not `custom_op`: its wrapper costs about 10 microseconds a call.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from qkern.errors import UnsupportedError
from qkern.ops.dequant_matmul import cpu, cuda, plain, reference, triton
from qkern.schemes import Scheme

__all__: list[str] = []

_LIBRARY: Final[Any] = torch.library.Library("qkern", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "dequant_matmul(Tensor x, Tensor blob, Tensor? bias, str layout, int N, int K, str scheme, str compute,"
    " Tensor? input_scale=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Several weights that read the same x.
_LIBRARY.define(
    "dequant_matmul_group(Tensor x, Tensor[] blobs, Tensor?[] biases, str layout, int[] N, int K,"
    " str[] schemes, str compute) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# The gradient of x is an op of its own, so that a traced graph holds a call and not its decoding loop.
_LIBRARY.define(
    "dequant_matmul_backward(Tensor grad, Tensor blob, str layout, int N, int K, str scheme) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(
    x: Tensor,
    blob: Tensor,
    bias: Tensor | None,
    layout: str,
    N: int,
    K: int,
    scheme: str,
    compute: str,
    input_scale: Tensor | None = None,
) -> Tensor:
    if input_scale is not None and compute == "int8":
        # By name: int8_matmul imports this package.
        codes, scales = torch.ops.qkern.quantize_activations(x, None, input_scale)
        out: Tensor = torch.ops.qkern.int8_matmul(
            codes, scales, blob, bias, None, layout, N, K, scheme, x.dtype
        )
        return out
    bias = None if bias is None else bias.contiguous()
    if layout == cpu.LAYOUT:
        return cpu.matmul(x, blob, bias, N, K, compute)
    if layout.startswith(cuda.PREFIX):
        return cuda.matmul(x, blob, bias, layout, N, K, scheme, compute)
    if layout.startswith(triton.PREFIX):
        return triton.matmul(x, blob, bias, layout, N, K, scheme, compute)
    x, bias = x.detach(), None if bias is None else bias.detach()
    qw = plain.unpack(blob, layout, N, K, Scheme.parse(scheme))
    rows = x.shape[:-1].numel()
    return reference.matmul(x.reshape(rows, K), qw, bias, compute == "int8").view(*x.shape[:-1], N)


def _group_forward(
    x: Tensor,
    blobs: list[Tensor],
    biases: list[Tensor | None],
    layout: str,
    N: list[int],
    K: int,
    schemes: list[str],
    compute: str,
) -> list[Tensor]:
    if layout == cpu.LAYOUT:
        kept = [None if bias is None else bias.contiguous() for bias in biases]
        return cpu.matmul_group(x, blobs, kept, N, K, compute)
    each = zip(blobs, biases, N, schemes, strict=True)
    return [_forward(x, blob, bias, layout, n, K, scheme, compute) for blob, bias, n, scheme in each]


def _group_fake(
    x: Tensor,
    blobs: list[Tensor],
    biases: list[Tensor | None],
    layout: str,
    N: list[int],
    K: int,
    schemes: list[str],
    compute: str,
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], n)) for n in N]


def _backward(grad: Tensor, blob: Tensor, layout: str, N: int, K: int, scheme: str) -> Tensor:
    rows = grad.detach().reshape(grad.shape[:-1].numel(), N)
    if layout == cpu.LAYOUT:
        total = cpu.input_gradient(rows, blob, N, K)
    elif layout.startswith(cuda.PREFIX):
        total = cuda.input_gradient(rows, blob, layout, N, K, scheme)
    elif layout.startswith(triton.PREFIX):
        total = triton.input_gradient(rows, blob, layout, N, K, scheme)
    else:
        total = reference.input_gradient(rows, plain.unpack(blob, layout, N, K, Scheme.parse(scheme)))
    return total.view(*grad.shape[:-1], K)


def _forward_fake(
    x: Tensor,
    blob: Tensor,
    bias: Tensor | None,
    layout: str,
    N: int,
    K: int,
    scheme: str,
    compute: str,
    input_scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], N))


def _backward_fake(grad: Tensor, blob: Tensor, layout: str, N: int, K: int, scheme: str) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], K))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, blob, bias, *static, _, _ = inputs
    ctx.save_for_backward(blob)
    ctx.static = static
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (blob,) = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.qkern.dequant_matmul_backward(grad, blob, *ctx.static)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, ctx.static[1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, None, None, None, None, None, None


def _setup_group(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, blobs, biases, ctx.layout, ctx.N, ctx.K, ctx.schemes, _ = inputs
    if any(bias is not None and bias.requires_grad for bias in biases):
        # torch's autograd formulas know no lists of optional tensors.
        raise UnsupportedError(
            "dequant_matmul_group has no gradient for a bias: call qkern::dequant_matmul for each weight"
        )
    ctx.save_for_backward(*blobs)


def _differentiate_group(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    each = zip(grads, ctx.saved_tensors, ctx.N, ctx.schemes, strict=True)
    parts = [
        torch.ops.qkern.dequant_matmul_backward(grad, blob, ctx.layout, n, ctx.K, scheme)
        for grad, blob, n, scheme in each
        if ctx.needs_input_grad[0]
    ]
    grad_x = torch.stack([part.float() for part in parts]).sum(0).to(parts[0].dtype) if parts else None
    return grad_x, [None] * len(grads), None, None, None, None, None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, blob, *static = inputs
    ctx.save_for_backward(blob)
    ctx.static = static


def _differentiate_second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (blob,) = ctx.saved_tensors
    # grad @ W is linear in grad, so its own gradient is the forward product.
    second = torch.ops.qkern.dequant_matmul(grad, blob, None, *ctx.static, "float")
    return second, None, None, None, None, None


_LIBRARY.impl("dequant_matmul", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("dequant_matmul_group", _group_forward, "CompositeExplicitAutograd")
torch.library.register_fake("qkern::dequant_matmul_group", _group_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "qkern::dequant_matmul_group", _differentiate_group, setup_context=_setup_group, lib=_LIBRARY
)
_LIBRARY.impl("dequant_matmul_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("qkern::dequant_matmul", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("qkern::dequant_matmul_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("qkern::dequant_matmul", _differentiate, setup_context=_setup, lib=_LIBRARY)
torch.library.register_autograd(
    "qkern::dequant_matmul_backward", _differentiate_second, setup_context=_setup_second, lib=_LIBRARY
)
