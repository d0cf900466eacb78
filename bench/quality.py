"""Every method of qkern beside GPTQModel and llama.cpp's quantizer: same text, one run, one Markdown table.

    python bench/quality.py MODEL HELDOUT [--calibration FILE] [--schemes w4g128 ...]
    python bench/quality.py --layers [--full]

With a model, KL(original || quantized) and perplexity are measured on HELDOUT, which calibration must not
have seen; the calibration text is `calibration.txt` beside HELDOUT unless named. Only linear layers are
quantized, embeddings and head stay as they are, in the peers too. `injected` rows start from the injected
form of the model (1 % of each norm's channels times 30, the columns that read them divided by 30).

With ``--layers``, linears shaped as in a 7B model, with heavy-tailed weights and correlated activations of
power-law spectrum; the error is that of the outputs on fresh activations, relative to the outputs.

Peers run where they are installed (`bench/quality_peers.py` says how); a peer that is missing or fails is a
row that says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qkern
from qkern.calibration import load_texts, make_batches
from qkern.evaluation import kl_divergence, paired_bootstrap, perplexity, read_text, token_ids, window_logits
from qkern.evaluation.bits import bpw_linear
from qkern.models import inject
from qkern.nn import named_linears
from qkern.ops import dequantize_groupwise
from qkern.pipelines import quantize
from qkern.quantizers import (
    GPTQConfig,
    HessianAccumulator,
    quantize_gptq,
    quantize_rtn,
    search_clip,
    search_scales,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

PEERS = Path(__file__).resolve().with_name("quality_peers.py")
QWEN = "Qwen/Qwen2.5-0.5B"
GGML_TYPES = ("q4_0", "q4_K", "q3_K", "q2_K")
LAYERS = {"attention 3584 -> 3584": (1024, 3584), "mlp up 3584 -> 18944": (1024, 3584)}
# Rows of qkern: label to arguments of `quantize`.
METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn", "search": "minmax"},
    "RTN, mse": {"method": "rtn", "search": "mse"},
    "GPTQ, minmax": {"method": "gptq", "search": "minmax"},
    "GPTQ, mse": {"method": "gptq", "search": "mse"},
    "GPTQ": {"method": "gptq"},
    "AWQ": {"method": "awq"},
}
FULL_LAYERS = {"mlp down 18944 -> 3584": (512, 18944)}
# Tokens for the Hessian and for the measurement.
SEEN, FRESH = 8192, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table; a row without numbers says why in `note`."""

    method: str
    scheme: str
    note: str = ""
    bits: float = float("nan")
    seconds: float = float("nan")
    kl: tuple[float, float, float] | None = None
    ratio: float = float("nan")
    perplexity: float = float("nan")
    errors: dict[str, float] = field(default_factory=dict)


def peer(python: str, *arguments: object) -> tuple[dict[str, Tensor], dict[str, str]] | str:
    """Run a peer in its own process: its decoded tensors and metadata, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.safetensors"
        command = [
            python,
            str(PEERS),
            str(arguments[0]),
            str(arguments[1]),
            str(output),
            *map(str, arguments[2:]),
        ]
        # In the temporary folder, because GPTQModel leaves logs where it runs.
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            return f"failed: {lines[-1] if lines else done.returncode}"
        with safe_open(output, "pt") as file:
            metadata = file.metadata()
        return load_file(output), metadata


def gptqmodel_python(named: str | None) -> str | None:
    if named is None and importlib.util.find_spec("gptqmodel") is not None:
        return sys.executable
    return named


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- a model ------------------------------------------------------------------------------------------


class Replay:
    """A model that answers from logits computed before, for functions that go through the same windows."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.at = 0

    def rewound(self) -> Replay:
        """Begin again with the first window."""
        return Replay(self.logits)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the next windows' logits; `ids` only says how many."""
        start, self.at = self.at, self.at + ids.numel()
        return self.logits[start : self.at].unflatten(0, tuple(ids.shape))


class Judge:
    """Measures quantized models against the original on the held-out text."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.ids = ids
        self.reference = window_logits(model, ids)
        self.baselines: dict[str, float] = {}

    def row(self, method: str, scheme: str, model: nn.Module, *, bits: float, seconds: float) -> Row:
        """Measure one quantized model; the row of plain RTN is what later ones are compared with."""
        """Measure a model; later rows of a scheme are compared with its plain RTN."""
        replay = Replay(window_logits(model, self.ids))
        values = kl_divergence(self.reference, replay, self.ids)
        interval = paired_bootstrap(values, np.zeros_like(values))
        if method == "RTN":
            self.baselines[scheme] = interval.mean
        base = self.baselines.get(scheme, float("nan"))
        row = Row(
            method=method,
            scheme=scheme,
            bits=bits,
            seconds=seconds,
            kl=(interval.mean, interval.low, interval.high),
            ratio=interval.mean / base,
            perplexity=perplexity(replay.rewound(), self.ids),
        )
        note(f"{method} {scheme}: KL {interval.mean:.5f}")
        return row


def load(path: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def compare_model(arguments: argparse.Namespace) -> list[Row]:
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    original = load(arguments.model)
    length = min(arguments.length, original.config.max_position_embeddings)
    held_out = token_ids(tokenizer, read_text(arguments.text))
    held_out = held_out[: arguments.windows * 512]
    texts = load_texts(arguments.calibration, tokenizer=tokenizer)
    ids = make_batches(tokenizer, texts, samples=arguments.samples, length=length)
    disable_progress_bar()
    note(f"calibration {tuple(ids.shape)}, held out {len(held_out)} tokens")
    judge = Judge(original, held_out)

    def ours(label: str, scheme: str, options: dict[str, Any], source: Any) -> Row:
        started = time.monotonic()
        result = quantize(source, scheme=scheme, calibration=ids, length=length, **options)
        seconds = time.monotonic() - started
        return judge.row(label, scheme, result, bits=bpw_linear(result), seconds=seconds)

    plain = perplexity(Replay(judge.reference), held_out)
    rows = [Row(method="none", scheme="bf16", bits=16.0, perplexity=plain)]
    for scheme in arguments.schemes:
        rows += [ours(label, scheme, METHODS[label], original) for label in arguments.methods]
        rows += gptqmodel_rows(arguments, judge, ids, scheme)
    injected = inject(load(arguments.model))
    for scheme in [spelling for spelling in arguments.schemes if spelling.endswith("z")]:
        for label in arguments.methods:
            rows.append(ours(f"{label}, injected", scheme, METHODS[label], injected))
    rows += ggml_rows(arguments, judge, original, ids)
    return rows


def gptqmodel_rows(arguments: argparse.Namespace, judge: Judge, ids: Tensor, scheme: str) -> Iterator[Row]:
    """GPTQModel's rows, with the same calibration tokens."""
    python = gptqmodel_python(arguments.gptqmodel_python)
    for method in ("gptq", "awq") if scheme == "w4g128z" else ("gptq",):
        label = f"GPTQModel, {method.upper()}"
        if python is None:
            yield Row(method=label, scheme=scheme, note="not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "ids.safetensors"
            save_file({"ids": ids}, source)
            local = Path(arguments.model)
            model_name = local.resolve() if local.exists() else arguments.model
            options = ("--model", model_name, "--scheme", scheme, "--method", method)
            found = peer(python, "gptqmodel", source, *options)
        if isinstance(found, str):
            yield Row(method=label, scheme=scheme, note=found)
            continue
        tensors, facts = found
        model = load(arguments.model)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        if unexpected or any(not name.startswith("lm_head") for name in missing):
            raise SystemExit(f"{label}: tensors do not fit the model: {missing} {unexpected}")
        yield judge.row(label, scheme, model, bits=float(facts["bits"]), seconds=float(facts["seconds"]))


def ggml_rows(arguments: argparse.Namespace, judge: Judge, model: Any, ids: Tensor) -> Iterator[Row]:
    """llama.cpp's block types on the linears, without and with the importance of the same tokens."""
    linears = named_linears(model, skip=("lm_head",))
    importance = {f"{name}.importance": value for name, value in mean_squares(model, linears, ids).items()}
    weights = {f"{name}.weight": module.weight.detach().contiguous() for name, module in linears.items()}
    for kind in arguments.ggml_types:
        for label, extra in (("llama.cpp", {}), ("llama.cpp, imatrix", importance)):
            if importlib.util.find_spec("llama_cpp") is None:
                yield Row(method=label, scheme=kind, note="not installed")
                continue
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "weights.safetensors"
                save_file(weights | extra, source)
                found = peer(sys.executable, "ggml", source, "--type", kind)
            if isinstance(found, str):
                yield Row(method=label, scheme=kind, note=found)
                continue
            tensors, facts = found
            changed = load(arguments.model)
            changed.load_state_dict(tensors, strict=False)
            yield judge.row(label, kind, changed, bits=float(facts["bits"]), seconds=float(facts["seconds"]))


def mean_squares(model: Any, linears: dict[str, Any], ids: Tensor) -> dict[str, Tensor]:
    """Mean square of each input feature of each linear, as llama.cpp's imatrix tool collects it."""
    sums = {name: torch.zeros(module.in_features) for name, module in linears.items()}

    def watch(name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            sums[name] += inputs[0].flatten(0, -2).square().sum(0)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    with torch.inference_mode():
        for batch in ids.split(4):
            model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: total / ids.numel() for name, total in sums.items()}


# --- single layers ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A linear and what goes through it."""

    weight: Tensor
    seen: Tensor
    fresh: Tensor

    @cached_property
    def statistics(self) -> tuple[HessianAccumulator, float]:
        """What GPTQ and AWQ need to know of the activations, and the seconds that took."""
        started = time.monotonic()
        statistics = HessianAccumulator(self.weight.shape[1])
        for batch in self.seen.split(2048):
            statistics.add(batch)
        return statistics, time.monotonic() - started

    def error(self, weight: Tensor) -> float:
        """Squared error of the outputs on fresh activations, relative to the outputs."""
        change = self.fresh @ (weight - self.weight).T
        return float(change.square().sum() / (self.fresh @ self.weight.T).square().sum())


def make_layer(rows: int, columns: int, seed: int) -> Layer:
    """Student-t weights; activations with covariance spectrum ``1/i`` and uneven channels."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    # t with 4 degrees of freedom: a normal over the root of a mean of four squares.
    squares = torch.zeros(rows, columns)
    for _ in range(4):
        squares += torch.randn(rows, columns, generator=generator).square() / 4
    # Sparse mixing along a random orthogonal-ish basis: Householder reflections keep the spectrum 1/i.
    spectrum = torch.arange(1, columns + 1) ** -0.5
    tokens = torch.randn(SEEN + FRESH, columns, generator=generator) * spectrum
    for _ in range(16):
        axis = torch.nn.functional.normalize(torch.randn(columns, generator=generator), dim=0)
        tokens -= 2 * torch.outer(tokens @ axis, axis)
    loudness = torch.exp(0.7 * torch.randn(columns, generator=generator))
    tokens *= loudness
    return Layer(weight=0.02 * normal / squares.sqrt(), seen=tokens[:SEEN], fresh=tokens[SEEN:])


def our_layer(layer: Layer, method: str, scheme: str) -> tuple[Tensor, float]:
    """Quantize one layer: the weight its codes stand for and the seconds it took."""
    needs_statistics = not method.startswith("RTN")
    statistics, spent = layer.statistics if needs_statistics else (None, 0.0)
    started = time.monotonic()
    scales = torch.ones(())
    if method.startswith("GPTQ"):
        assert statistics is not None
        search: Any = method.partition(", ")[2]
        config = GPTQConfig(search=search) if search else GPTQConfig()
        quantized = quantize_gptq(layer.weight, statistics.value, scheme, config).weight
    elif statistics is None:
        quantized = quantize_rtn(layer.weight, scheme, search="mse" if "mse" in method else "minmax")
    else:
        scales = search_scales([layer.weight], statistics, scheme)
        clipped = search_clip(layer.weight * scales, statistics.scaled(scales), scheme)
        quantized = quantize_rtn(clipped, scheme)
    seconds = spent + time.monotonic() - started
    return dequantize_groupwise(quantized) / scales, seconds


def compare_layers(arguments: argparse.Namespace) -> list[Row]:
    shapes = LAYERS | (FULL_LAYERS if arguments.full else {})
    layers = {name: make_layer(*shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    rows = []
    for scheme in arguments.schemes:
        probe = quantize_rtn(next(iter(layers.values())).weight, scheme)
        bits = probe.stored_bits / (probe.N * probe.K)
        for method in arguments.methods:
            results = {name: our_layer(layer, method, scheme) for name, layer in layers.items()}
            weights = {name: weight for name, (weight, _) in results.items()}
            seconds = sum(spent for _, spent in results.values())
            rows.append(layer_row(method, scheme, layers, weights, bits, seconds))
        rows.append(
            peer_layers(
                gptqmodel_python(arguments.gptqmodel_python),
                "GPTQModel, GPTQ",
                scheme,
                layers,
                "gptqmodel-layers",
                "inputs",
                ("--scheme", scheme),
            )
        )
    llama = sys.executable if importlib.util.find_spec("llama_cpp") else None
    for kind in arguments.ggml_types:
        rows.append(peer_layers(llama, "llama.cpp", kind, layers, "ggml", "", ("--type", kind)))
        rows.append(
            peer_layers(llama, "llama.cpp, imatrix", kind, layers, "ggml", "importance", ("--type", kind))
        )
    return rows


def layer_row(
    method: str,
    scheme: str,
    layers: dict[str, Layer],
    weights: dict[str, Tensor],
    bits: float,
    seconds: float,
) -> Row:
    errors = {name: layer.error(weights[name]) for name, layer in layers.items()}
    note(f"{method} {scheme}: " + ", ".join(f"{error:.6f}" for error in errors.values()))
    return Row(method=method, scheme=scheme, bits=bits, seconds=seconds, errors=errors)


def peer_layers(
    python: str | None,
    label: str,
    scheme: str,
    layers: dict[str, Layer],
    name: str,
    extra: str,
    options: tuple[str, ...],
) -> Row:
    if python is None:
        return Row(method=label, scheme=scheme, note="not installed")
    tensors = {f"{index}.weight": layer.weight for index, layer in enumerate(layers.values())}
    for index, layer in enumerate(layers.values()):
        if extra:
            tensors[f"{index}.{extra}"] = layer.seen if extra == "inputs" else layer.seen.square().mean(0)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "layers.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, source)
        found = peer(python, name, source, *options)
    if isinstance(found, str):
        return Row(method=label, scheme=scheme, note=found)
    weights = {key: found[0][f"{index}.weight"] for index, key in enumerate(layers)}
    return layer_row(label, scheme, layers, weights, float(found[1]["bits"]), float(found[1]["seconds"]))


# --- the table ----------------------------------------------------------------------------------------


def number(value: float, digits: int) -> str:
    return "" if value != value else f"{value:.{digits}f}"


def model_table(rows: list[Row]) -> str:
    lines = [
        "| scheme | method | bpw_linear | KL, nats (95 % interval) | of RTN's | perplexity | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        kl = row.note if row.kl is None else "{:.5f} ({:.5f} to {:.5f})".format(*row.kl)
        cells = (
            row.scheme,
            row.method,
            number(row.bits, 3),
            kl,
            number(row.ratio, 2),
            number(row.perplexity, 3),
            number(row.seconds, 1),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def layer_table(rows: list[Row]) -> str:
    names = next(list(row.errors) for row in rows if row.errors)
    lines = [
        f"| scheme | method | bits | {' | '.join(f'error, {name}' for name in names)} | seconds |",
        "|---|---|---|" + "---|" * len(names) + "---|",
    ]
    for row in rows:
        errors = [f"{row.errors[name]:.6f}" if row.errors else row.note for name in names]
        cells = (row.scheme, row.method, number(row.bits, 3), *errors, number(row.seconds, 1))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="model folder or hub id")
    parser.add_argument("text", nargs="?", type=Path, help="held-out text")
    parser.add_argument("--calibration", type=Path, help="default: calibration.txt beside the held-out text")
    parser.add_argument("--schemes", nargs="+", default=["w4g128", "w4g128z", "w3g128", "w2g64"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ggml-types", nargs="*", default=list(GGML_TYPES))
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens of each, at most the model's context"
    )
    parser.add_argument("--windows", type=int, default=48, help="held-out windows of 512 tokens")
    parser.add_argument("--gptqmodel-python", help="interpreter of an environment that has GPTQModel")
    parser.add_argument("--layers", action="store_true", help="7B-shaped layers instead of a model")
    parser.add_argument("--full", action="store_true", help="with --layers: K = 18944 too (minutes)")
    arguments = parser.parse_args(argv)
    if arguments.layers:
        print(layer_table(compare_layers(arguments)))
    else:
        if arguments.model is None or arguments.text is None:
            parser.error("name a model and a held-out text, or --layers")
        if arguments.calibration is None:
            arguments.calibration = arguments.text.with_name("calibration.txt")
        print(model_table(compare_model(arguments)))
    print(f"\nqkern {qkern.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    command = f"python bench/quality.py {QWEN} HELDOUT --calibration CALIBRATION"
    if arguments.model != QWEN:
        print(f"Qwen2.5-0.5B: not run here; `{command}`")


if __name__ == "__main__":
    main()
