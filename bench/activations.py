"""What int8 activations cost in precision, for groups of 32, 64 and 128 columns and one scale a token.

    python bench/activations.py MODEL HELDOUT [--schemes w4g128 w8] [--windows 30]
    python bench/activations.py --w8a8 MODEL HELDOUT [MODEL HELDOUT ...] [--samples 32]

The first table is the error of one 4096 x 4096 product, ||y - y_float|| / ||y_float||, on Gaussian and on
outlier-heavy activations (1 % of the channels 30 times as large); ``kernel`` is what `dequant_matmul` does,
in groups of 128. The second is KL(original || quantized) on held-out tokens with float activations,
and what int8 adds to it, on the model and on its injected form. Both are Markdown, as in docs/.

With ``--w8a8``, KL of whole models in w8a8, activations in int8 as they run, for each model: plain W8A8 on it
and on its injected form, and SmoothQuant on the injected form; per token and with static scales by every
observer. Calibration text is `calibration.txt` beside HELDOUT. Fails if SmoothQuant on the injected form has
more than 1.5 times the KL of plain W8A8 on the model itself, activations quantized alike.
"""

from __future__ import annotations

import argparse
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qkern import quantize
from qkern.calibration import load_texts, make_batches
from qkern.evaluation import kl_divergence, paired_bootstrap, window_logits
from qkern.models import inject
from qkern.nn import quant_linears
from qkern.ops import dequant_matmul, dequantize_groupwise, pack_weight, quantize_groupwise
from qkern.ops.quantize_activations.reference import round_to_codes
from qkern.quantizers import OBSERVERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

GROUPS = (32, 64, 128, None)  # None: the whole token
# Largest KL of SmoothQuant on the injected form, over that of plain W8A8 on the model.
BOUND = 1.5


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


def load(path: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def held_out(tokenizer: Any, text: Path, windows: int) -> Tensor:
    return torch.tensor(tokenizer(text.read_text(), verbose=False)["input_ids"])[: windows * 512]


def w8a8_table(path: Path, held: Path, arguments: argparse.Namespace) -> tuple[str, bool]:
    """KL of whole models, and whether all of them keep the bound."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = held_out(tokenizer, held, arguments.windows)
    texts = load_texts(held.with_name("calibration.txt"), tokenizer=tokenizer)
    seen = make_batches(tokenizer, texts, samples=arguments.samples, length=512)
    original, injected = load(path), inject(load(path))
    reference = window_logits(original, ids)

    def kl(source: Any, **options: Any) -> tuple[float, str]:
        # Rounding with a scale a token reads no text.
        text = {} if options == {"method": "rtn"} else {"calibration": seen, "length": 512}
        model = quantize(source, scheme="w8a8", **options, **text)
        values = kl_divergence(reference, model, ids, compute="int8")
        found = paired_bootstrap(values, np.zeros_like(values))
        return found.mean, f"{found.mean:.5f} ({found.low:.5f} to {found.high:.5f})"

    lines = [["activations", "as trained", "outliers", "outliers, SmoothQuant", "over as trained"]]
    kept = True
    for label in ("per token", *OBSERVERS):
        how: dict[str, Any] = {} if label == "per token" else {"activations": "static", "observer": label}
        plain, cell = kl(original, method="rtn", **how)
        smooth, smooth_cell = kl(injected, method="smoothquant", **how)
        cells = [cell, kl(injected, method="rtn", **how)[1], smooth_cell, f"{smooth / plain:.2f}"]
        lines.append([label if label == "per token" else f"static, {label}", *cells])
        kept &= smooth <= BOUND * plain
    end = (
        f"{path}: w8a8, {len(ids)} held-out tokens, {tuple(seen.shape)} calibration tokens; at most {BOUND} "
    )
    return markdown(lines) + f"\n{end}times plain W8A8: {'yes' if kept else 'NO'}.\n", kept


def model_table(path: Path, text: Path, arguments: argparse.Namespace) -> str:
    from transformers import AutoTokenizer

    ids = held_out(AutoTokenizer.from_pretrained(path), text, arguments.windows)
    lines = [["scheme", "form", "float", *(f"{name_of(group)} adds" for group in GROUPS)]]
    for form in ("as trained", "injected"):
        original = load(path)
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
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL HELDOUT", help="folders and texts")
    parser.add_argument("--schemes", nargs="+", default=["w4g128", "w3g128", "w8"])
    parser.add_argument("--windows", type=int, default=30, help="held-out windows of 512 tokens")
    parser.add_argument("--w8a8", action="store_true", help="W8A8 and SmoothQuant of whole models instead")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of 512 tokens")
    chosen = parser.parse_args(arguments)
    if len(chosen.models) % 2 or (chosen.w8a8 and not chosen.models):
        parser.error("a model comes with its held-out text: MODEL HELDOUT [MODEL HELDOUT ...]")
    pairs = list(zip(chosen.models[::2], chosen.models[1::2], strict=True))
    torch.set_grad_enabled(False)
    if chosen.w8a8:
        tables = [w8a8_table(*pair, chosen) for pair in pairs]
        print("\n".join(table for table, _ in tables))
        if not all(kept for _, kept in tables):
            raise SystemExit("SmoothQuant does not keep its bound")
        return
    print(layer_table(chosen.schemes))
    for pair in pairs:
        print(model_table(*pair, chosen))


if __name__ == "__main__":
    main()
