"""What int8 activations cost in precision, for groups of 32, 64 and 128 columns and one scale a token.

    python bench/activations.py MODEL HELDOUT [--schemes w4g128 w8] [--windows 30]

The first table is the error of one 4096 x 4096 product, ||y - y_float|| / ||y_float||, on Gaussian and on
outlier-heavy activations (1 % of the channels 30 times as large); ``kernel`` is what `dequant_matmul` does,
in groups of 128. The second is KL(original || quantized) on held-out tokens with float activations,
and what int8 adds to it, on the model and on its injected form. Both are Markdown, as in the README.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qkern import quantize
from qkern.evaluation import kl_divergence, window_logits
from qkern.models import inject
from qkern.nn import quant_linears
from qkern.ops import dequant_matmul, dequantize_groupwise, pack_weight, quantize_groupwise
from qkern.ops.quantize_activations.reference import round_to_codes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

GROUPS = (32, 64, 128, None)  # None: the whole token


def rounded(x: Tensor, group: int | None) -> Tensor:
    """Activations as int8 and back, one scale for each `group` columns of a token."""
    columns = x.shape[-1]
    parts = x.float().split(group or columns, dim=-1)
    return torch.cat([_part(part) for part in parts], dim=-1).to(x.dtype)


def _part(x: Tensor) -> Tensor:
    scales = x.abs().amax(-1, keepdim=True) / 127
    return round_to_codes(x, scales.expand_as(x)).float() * scales


@contextmanager
def rounded_inputs(model: Any, group: int | None) -> Iterator[None]:
    """Make every quantized linear of a model see activations of int8."""
    hooks = [
        linear.register_forward_pre_hook(lambda _, args: (rounded(args[0], group), *args[1:]))
        for linear in quant_linears(model).values()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def name_of(group: int | None) -> str:
    return "token" if group is None else str(group)


def layer_table(schemes: list[str]) -> str:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 4096, generator=generator)
    plain = torch.randn(256, 4096, generator=generator)
    heavy = plain.clone()
    heavy[:, torch.randperm(4096, generator=generator)[:41]] *= 30
    lines = [["scheme", "activations", *(name_of(group) for group in GROUPS), "kernel", "kernel over 128"]]
    for scheme in schemes:
        quantized = quantize_groupwise(weight, scheme)
        dense, packed = dequantize_groupwise(quantized).double(), pack_weight(quantized)
        for label, x in (("Gaussian", plain), ("outlier-heavy", heavy)):
            truth = x.double() @ dense.T

            def error(y: Tensor, truth: Tensor = truth) -> float:
                return float((y.double() - truth).norm() / truth.norm())

            errors = [error(rounded(x, group).double() @ dense.T) for group in GROUPS]
            kernel = error(dequant_matmul(x, packed, compute="int8"))
            cells = [f"{100 * value:.3f} %" for value in (*errors, kernel)]
            lines.append([scheme, label, *cells, f"{kernel / errors[GROUPS.index(128)]:.4f}"])
    return markdown(lines)


def model_table(arguments: argparse.Namespace) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = torch.tensor(tokenizer(arguments.text.read_text())["input_ids"])[: arguments.windows * 512]
    lines = [["scheme", "form", "float", *(f"{name_of(group)} adds" for group in GROUPS)]]
    for form in ("as trained", "injected"):
        original = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        if form == "injected":
            inject(original)
        reference = window_logits(original, ids)
        for scheme in arguments.schemes:
            model = quantize(original, scheme=scheme, method="rtn")
            base = float(kl_divergence(reference, model, ids).mean())
            cells = [f"{base:.5f}"]
            for group in GROUPS:
                with rounded_inputs(model, group):
                    added = float(kl_divergence(reference, model, ids).mean()) - base
                cells.append(f"{added:+.6f} ({100 * added / base:+.2f} %)")
            lines.append([scheme, form, *cells])
    return markdown(lines) + f"\n{len(ids)} held-out tokens, RTN.\n"


def markdown(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="model folder; without one: the product alone")
    parser.add_argument("text", nargs="?", type=Path, help="held-out text")
    parser.add_argument("--schemes", nargs="+", default=["w4g128", "w3g128", "w8"])
    parser.add_argument("--windows", type=int, default=30, help="held-out windows of 512 tokens")
    chosen = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    print(layer_table(chosen.schemes))
    if chosen.model:
        print(model_table(chosen))


if __name__ == "__main__":
    main()
