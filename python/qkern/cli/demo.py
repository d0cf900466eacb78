"""``qkern demo``: quantize the shipped model by every method and show what it costs and what it gains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qkern.plotting import Table


def command(
    output: Annotated[
        Path, typer.Option(help="New or empty folder for checkpoints, GGUF files and report.")
    ] = Path("qkern-demo"),
) -> None:
    """Quantize the model that ships with qkern, run it, save it, reload it, export it; about two minutes."""
    import logging
    import time

    from rich.console import Console

    from qkern.cli._tables import print_table
    from qkern.demo import report, run, speed
    from qkern.evaluation.machine import machine

    started = time.perf_counter()
    run.make_output(output)
    logging.getLogger("qkern.pipelines").setLevel(logging.WARNING)  # the demo's own bar says how far it is
    console = Console(markup=False)  # generated text may hold brackets

    def show(title: str, table: Table) -> None:
        print_table(console, title, table, left=("scheme", "method", "weights", "type"))

    console.print(machine(), highlight=False)
    quality = run.run_quality(output)
    show(
        "The shipped model, quantized: KL in nats and perplexity on held-out text",
        report.quality_table(quality),
    )
    mlp = speed.run_speed()
    show("One token through a 7B-shaped MLP", report.speed_table(mlp))
    gguf = run.run_gguf(output)
    show("GGUF", report.gguf_table(gguf))
    path = report.write_report(output, quality, mlp, gguf, machine=machine())
    console.print(
        f"Every checkpoint was reloaded and gives the same logits. Written to {output}/; report: {path} "
        f"({time.perf_counter() - started:.0f} s)",
        highlight=False,
    )
