"""The demo's Markdown report, and its picture where matplotlib is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qkern.plotting import Table, has_matplotlib, markdown, plot_points

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qkern.demo.run import GgufRow, QualityRow
    from qkern.demo.speed import SpeedRow

__all__ = ["gguf_table", "quality_table", "speed_table", "write_picture", "write_report"]


def quality_table(rows: Sequence[QualityRow]) -> Table:
    """Scheme, method, sizes and quality of each checkpoint."""
    header = ("scheme", "method", "bpw_linear", "bpw_file", "MB", "KL", "perplexity")
    return header, [
        (
            row.scheme,
            row.method,
            f"{row.bpw_linear:.3f}",
            f"{row.bpw_file:.3f}",
            f"{row.file_bytes / 1e6:.2f}",
            f"{row.kl:.5f}",
            f"{row.perplexity:.3f}",
        )
        for row in rows
    ]


def speed_table(rows: Sequence[SpeedRow]) -> Table:
    """Time a token and resident megabytes of the MLP."""
    header = ("weights", "ms a token", "times bf16", "resident MB")
    return header, [
        (row.weights, f"{row.ms_a_token:.2f}", f"{row.speedup:.2f}", f"{row.resident_bytes / 1e6:.1f}")
        for row in rows
    ]


def gguf_table(rows: Sequence[GgufRow]) -> Table:
    """Size of each GGUF file and what llama.cpp makes of a prompt with it."""
    header = ("type", "MB", "bpw_file", "llama.cpp continues")
    return header, [
        (
            row.type,
            f"{row.file_bytes / 1e6:.2f}",
            f"{row.bpw_file:.3f}",
            "not run: llama-cpp-python is not installed" if row.continuation is None else row.continuation,
        )
        for row in rows
    ]


def write_report(
    output: Path,
    quality: Sequence[QualityRow],
    speed: Sequence[SpeedRow],
    gguf: Sequence[GgufRow],
    *,
    machine: str,
) -> Path:
    """Write ``report.md`` into `output` and return its path."""
    picture = write_picture(output, quality)
    parts = [
        "# qkern demo",
        machine,
        "## The shipped model, quantized",
        "KL(original || quantized) in nats and perplexity on held-out text, activations in float.",
        markdown(quality_table(quality)),
        "Saved, reloaded, and every logit is the same: "
        + ", ".join(f"{row.scheme} {row.method} as {row.format}" for row in quality if row.kl > 0)
        + ".",
        *([f"![size against KL]({picture.name})"] if picture else []),
        "## One token through a 7B-shaped MLP",
        "Random weights, rotated over more than 512 MB so that no cache holds them; int8 activations; "
        "medians of interleaved runs.",
        markdown(speed_table(speed)),
        "## GGUF",
        markdown(gguf_table(gguf)),
    ]
    path = output / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def write_picture(output: Path, rows: Sequence[QualityRow]) -> Path | None:
    """Draw size against KL to ``size-kl.png``; None where matplotlib is not installed."""
    if not has_matplotlib():
        return None
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for row in rows:
        if row.kl > 0:
            groups.setdefault(row.method, []).append((row.scheme, row.bpw_linear, row.kl))
    return plot_points(
        groups,
        output / "size-kl.png",
        x="bits per weight of the linear layers",
        y="KL(original || quantized), nats",
        is_log=True,
    )
