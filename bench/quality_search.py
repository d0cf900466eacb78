"""Searches for mixed precision against each other and uniform schemes at the same size: two Markdown tables.

    python bench/quality_search.py MODEL HELDOUT [--calibration FILE] [--text FILE] [--targets 2.25 2.75]

For the model and for its injected form (`bench/quality.py`) each target (bits of the linears over their
weights) is searched with every seed: candidates by GPTQ on the calibration text, scored on the search text.
What a search found is then quantized as a user would, ``qkern quantize --assignment``, and measured as
KL(original || quantized) on HELDOUT, which neither saw. The second table has differences of mean KL, with
the paired bootstrap's 95 % interval over windows of the text and over seeds: below zero throughout means
better, on other text and with other seeds too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import qkern
from qkern.calibration import calibration_hash, load_texts, make_batches
from qkern.evaluation import kl_divergence, paired_bootstrap, read_text, token_ids, window_logits
from qkern.evaluation.bits import bpw_linear
from qkern.pipelines import quantize, search_assignment
from qkern.pipelines.source import open_source
from quality import load, note, number
from quality_gguf import injected_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from qkern.evaluation import Interval
    from qkern.search import MixedPrecision

SEARCHES = ("genetic", "lagrangian", "greedy", "random", "uniform")
# What depends on the seed.
SEEDED = {"genetic", "random"}
# What each search has to beat at the same size.
AGAINST = (
    ("genetic", "lagrangian"),
    ("genetic", "greedy"),
    ("lagrangian", "random"),
    ("genetic", "uniform"),
    ("lagrangian", "uniform"),
)
WINDOW = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target: KL of what each search found, by seed, its bits a weight, and differences of the KL."""

    form: str
    target: float
    kls: dict[str, tuple[float, ...]]
    bits: dict[str, float]
    gaps: dict[tuple[str, str], Interval]


class Judge:
    """Quantizes by an assignment and measures; each assignment once, on disk."""

    def __init__(self, source: str | Path, ids: torch.Tensor, held_out: torch.Tensor, folder: Path) -> None:
        self.model = load(str(source))
        self.ids = ids
        self.held_out = held_out
        self.reference = window_logits(self.model, held_out)
        texts = [calibration_hash(ids), calibration_hash(held_out)]
        self.facts = [identity(source), *texts, qkern.__version__, torch.__version__]
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __call__(self, assignment: MixedPrecision) -> tuple[NDArray[np.float64], float]:
        """KL by position, and bits a weight."""
        key = json.dumps([*self.facts, dict(assignment.choices)])
        file = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        if not file.is_file():
            made = quantize(self.model, method="gptq", assignment=assignment, calibration=self.ids)
            kl = kl_divergence(self.reference, made, self.held_out, window=WINDOW)
            unfinished = file.with_suffix(".new")
            with unfinished.open("wb") as opened:
                np.savez(opened, kl=kl, bits=bpw_linear(made))
            unfinished.rename(file)
        with np.load(file) as known:
            return known["kl"], float(known["bits"])


def identity(source: str | Path) -> str:
    """Hash of a model's weights, by their files' sizes and times."""
    return open_source(source).identity()


def injected_of(model: str, work: Path) -> Path:
    """Return the folder of the model's injected form, written where it is not there."""
    folder = work / f"injected-{identity(model)[:8]}"
    if not folder.is_dir():
        unfinished = Path(tempfile.mkdtemp(dir=work))
        injected_folder(model, unfinished)
        unfinished.rename(folder)
    return folder


def searched(source: str | Path, form: str, arguments: argparse.Namespace, work: Path) -> Iterator[Row]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    original = load(str(source))
    length = min(arguments.length, original.config.max_position_embeddings)
    held_out = token_ids(tokenizer, read_text(arguments.heldout))[: arguments.windows * WINDOW]
    ids, scored = (
        make_batches(tokenizer, load_texts(path, tokenizer=tokenizer), samples=samples, length=length)
        for path, samples in (
            (arguments.calibration, arguments.samples),
            (arguments.text, arguments.tokens // length),
        )
    )
    note(f"{form}: calibration {tuple(ids.shape)}, search {tuple(scored.shape)}, held out {len(held_out)}")
    judge = Judge(source, ids, held_out, work / "judged")
    for target in arguments.targets:
        found: dict[str, dict[int, MixedPrecision]] = {}
        for seed in range(arguments.seeds):
            started = time.monotonic()
            report = search_assignment(
                source,
                calibration=ids,
                text=scored,
                target_bpw_linear=target,
                alleles=arguments.alleles,
                population=arguments.population,
                generations=arguments.generations,
                finalists=arguments.finalists,
                tokens=arguments.tokens,
                seed=seed,
                store=work / f"store-{form}",
            )
            assert report.best is not None
            for one in (report.best, *report.others):
                found.setdefault(one.found_by, {})[seed] = one.assignment
            note(f"{form} {target} seed {seed}: {time.monotonic() - started:.0f} s")
        # The largest uniform scheme that fits; what a seed does not change is measured once.
        uniform = [name for name in found if name.startswith("uniform ")]
        runs: dict[str, list[NDArray[np.float64]]] = {}
        bits: dict[str, float] = {}
        for name in (*(one for one in SEARCHES if one in found), *uniform):
            seeds = found[name].values() if name in SEEDED else [found[name][0]]
            measured = [judge(assignment) for assignment in seeds]
            size = max(size for _, size in measured)
            label, _, _ = name.partition(" ")
            if size >= bits.get(label, 0):
                runs[label], bits[label] = [kl for kl, _ in measured], size
        row = Row(
            form=form,
            target=target,
            kls={name: tuple(float(kl.mean()) for kl in measured) for name, measured in runs.items()},
            bits=bits,
            gaps={
                pair: paired_bootstrap(runs[pair[0]], runs[pair[1]], window=WINDOW)
                for pair in AGAINST
                if runs.keys() >= {*pair} and ("uniform" not in pair or not smaller(bits["uniform"], target))
            },
        )
        note(line(row, kl_cells))
        note(line(row, gap_cells))
        yield row


def kl_cells(row: Row) -> list[str]:
    return [kl_cell(row, name) for name in SEARCHES]


def smaller(bits: float, target: float) -> bool:
    return bits < target - 5e-4


def kl_cell(row: Row, name: str) -> str:
    if name not in row.kls:
        return ""
    kls = np.array(row.kls[name])
    spread = f" ({kls.min():.5f} to {kls.max():.5f})" if len(kls) > 1 else ""
    size = f", {number(row.bits[name], 3)} bits" if smaller(row.bits[name], row.target) else ""
    return f"{kls.mean():.5f}{spread}{size}"


def gap_cells(row: Row) -> list[str]:
    gaps = [row.gaps.get(pair) for pair in AGAINST]
    return [f"{gap.mean:+.5f} ({gap.low:+.5f} to {gap.high:+.5f})" if gap else "" for gap in gaps]


def line(row: Row, cells: Callable[[Row], list[str]]) -> str:
    return f"| {' | '.join([row.form, f'{row.target:g}', *cells(row)])} |"


def table(rows: list[Row], heading: Sequence[str], cells: Callable[[Row], list[str]]) -> str:
    columns = ["model", "target", *heading]
    rule = "|".join("---" for _ in columns)
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}|", *(line(row, cells) for row in rows)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model folder or hub id")
    parser.add_argument("heldout", type=Path, help="held-out text")
    parser.add_argument("--calibration", type=Path, help="default: calibration.txt beside the held-out text")
    parser.add_argument("--text", type=Path, help="default: search.txt beside the held-out text")
    parser.add_argument("--targets", type=float, nargs="+", default=[2.25, 2.75, 3.125, 4.25])
    parser.add_argument("--alleles", nargs="+", help="default: those of the runtime torch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--generations", type=int, default=12)
    parser.add_argument("--finalists", type=int, default=4)
    parser.add_argument("--forms", nargs="+", choices=("plain", "injected"), default=["plain", "injected"])
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=12288, help="tokens of the search text")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens of each sequence, at most the model's context"
    )
    parser.add_argument("--windows", type=int, default=120, help="held-out windows of 512 tokens")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps what is known, to go on from with the same code"
    )
    arguments = parser.parse_args(argv)
    for name in ("calibration", "search"):
        option = "text" if name == "search" else name
        if getattr(arguments, option) is None:
            setattr(arguments, option, arguments.heldout.with_name(f"{name}.txt"))
    # torch's fp32 products are oneDNN's then, on AMD twice as fast as MKL's; AMX and GPUs would round them.
    flags = Path("/proc/cpuinfo")
    if flags.is_file() and "amx_bf16" not in flags.read_text() and not torch.cuda.is_available():
        torch.set_float32_matmul_precision("medium")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for form in arguments.forms:
            source: Any = arguments.model
            if form == "injected":
                source = injected_of(arguments.model, work)
            rows += searched(source, form, arguments, work)
    print(table(rows, [f"KL, nats: {SEARCHES[0]}", *SEARCHES[1:]], kl_cells))
    print()
    print(table(rows, [f"{one} - {rival}" for one, rival in AGAINST], gap_cells))
    print(f"\nqkern {qkern.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
