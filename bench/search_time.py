"""How long a search takes: whole on a small model, by one layer for a 7B-shaped one.

    python bench/search_time.py [MODEL CALIBRATION]

Without a model: one decoder layer of Qwen2.5-7B's shapes (`bench/export_gguf.py`), random weights, and random
tokens. Its parts are timed (activations of the calibration, candidates of each allele, one assignment through
the layer) and multiplied by how often a sensitivity analysis and a search of the whole model run them: an
estimate, which leaves out the head. With a model: both verbs, timed once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import qkern
from export_gguf import LAYERS, make
from qkern.calibration import LayerStream
from qkern.models import describe
from qkern.pipelines.candidates import make_candidates
from qkern.pipelines.layerwise import capture, stages_of
from qkern.pipelines.partial import Partial
from qkern.pipelines.source import open_source
from qkern.quantizers import HessianAccumulator
from qkern.search import RUNTIMES, Evaluator, cuts, make_space, single_changes

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTH = 512
# Tokens of a sequence in a search with the defaults.
CONTEXT = 2048


class Clock:
    """Seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str) -> Iterator[None]:
        """Loop once around what is timed."""
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def estimate(arguments: argparse.Namespace) -> None:
    clock = Clock()
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "model", 1)
        source = open_source(folder / "model")
        structure = describe(source.model)
        space, _ = make_space(source.model, structure, RUNTIMES["torch"])
        stream = LayerStream(source.model, structure.layers, source.weights, head=structure.head)
        ids = torch.randint(3, 2000, (arguments.sample // LENGTH, LENGTH), generator=generator)
        scored = ids[: max(1, arguments.scored // LENGTH)]
        stream.embed(ids)
        with stream.layer(0):
            names = [gene.names[0].removeprefix(stream.prefix(0)) for gene in space.genes]
            groups = [g for stage in stages_of(stream, structure.architecture, 0, names) for g in stage]
            for _ in clock.time("activations"):
                capture(stream, 0, groups, HessianAccumulator)
        with Partial(folder / "store", {}) as partial:
            for _ in clock.time("candidates"):
                store = make_candidates(stream, structure, space, ids, "gptq", partial)
            alone = space.only(space.ends()[0])
            behind = alone.assignment((0,) * len(alone))
            for _ in clock.time("finalist"):
                make_candidates(stream, structure, alone, ids, "gptq", partial, base=behind)
            evaluator = Evaluator(stream, space, store, scored)
            genomes = list(single_changes(space).values())[:2]
            for _ in clock.time("assignment"):
                evaluator.kl(genomes)
        candidates = clock.seconds["candidates"] - clock.seconds["activations"]
        one = candidates / len(space.genes[0].alleles)
        scale = arguments.calibrated / ids.numel()
        activations = clock.seconds["activations"] * scale
        through = clock.seconds["assignment"] / len(genomes) * arguments.tokens / scored.numel()
        changes = len(single_changes(space)) * LAYERS
        store_seconds = LAYERS * (candidates + activations)
        # A change runs the layers from its own on, half of them on average, on half of the text.
        sensitivity = changes * through / 2 * (LAYERS + 1) / 2
        chunks = arguments.tokens // CONTEXT
        parts = [0, *cuts(chunks), chunks]
        share = sum((end - start) / 2**stage for stage, (start, end) in enumerate(pairwise(parts))) / chunks
        whole = arguments.generations * arguments.population * share
        # Behind a base a layer runs once a stage, and once more for the next layer.
        runs = (clock.seconds["finalist"] - one) * scale + through * arguments.calibrated / arguments.tokens
        finalists = arguments.finalists * LAYERS * (one + runs)
        # Random search beside it; candidates once more.
        search = 2 * whole * LAYERS * through + LAYERS * (candidates + runs) + finalists
        print(
            f"| a layer: activations of {arguments.calibrated:,} tokens | {activations:.0f} s |\n"
            f"| a layer: {len(space.genes[0].alleles)} alleles of {len(space)} linears by GPTQ | "
            f"{candidates:.0f} s |\n"
            f"| a layer: one assignment, {arguments.tokens:,} tokens | {through:.1f} s |\n"
            f"| {LAYERS} layers, candidates | {store_seconds / 3600:.1f} h |\n"
            f"| {LAYERS} layers, sensitivity ({changes} changes) | {sensitivity / 3600:.1f} h |\n"
            f"| {LAYERS} layers, {arguments.finalists} finalists | {finalists / 3600:.1f} h |\n"
            f"| {LAYERS} layers, search {arguments.population} x {arguments.generations}, random search and "
            f"finalists included | {search / 3600:.1f} h |"
        )


def measure(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        common = {"calibration": arguments.calibration, "tokens": arguments.tokens, "store": Path(name) / "s"}
        started = time.monotonic()
        qkern.sensitivity(arguments.model, **common)
        middle = time.monotonic()
        qkern.search_assignment(
            arguments.model,
            target_bpw_linear=arguments.target,
            population=arguments.population,
            generations=arguments.generations,
            finalists=arguments.finalists,
            **common,
        )
        print(f"| sensitivity, candidates included | {middle - started:.0f} s |")
        print(
            f"| search {arguments.population} x {arguments.generations} after it, random search and "
            f"{arguments.finalists} finalists included | "
            f"{time.monotonic() - middle:.0f} s |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder; default: one layer of a 7B model's shapes")
    parser.add_argument("calibration", nargs="?", help="its calibration text")
    parser.add_argument("--target", type=float, default=2.25, help="bits of the linears over their weights")
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--generations", type=int, default=12)
    parser.add_argument("--finalists", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=12288, help="tokens that assignments are scored on")
    parser.add_argument("--calibrated", type=int, default=128 * CONTEXT, help="calibration tokens")
    parser.add_argument("--sample", type=int, default=4096, help="of those, run here and scaled")
    parser.add_argument("--scored", type=int, default=1024, help="of the scored ones, run here and scaled")
    arguments = parser.parse_args()
    print("| | |\n|---|---|")
    if arguments.model is None:
        estimate(arguments)
    elif arguments.calibration is None:
        parser.error("name a calibration text too")
    else:
        measure(arguments)
    print(f"\nqkern {qkern.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
