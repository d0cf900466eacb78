"""The report of `qkern.compare`: tables, pictures where matplotlib is installed, and the numbers as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, TypeVar

from qkern.plotting.charts import plot_bars, plot_points
from qkern.plotting.style import has_matplotlib
from qkern.plotting.tables import Table, markdown

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qkern.pipelines.compare import ComparedModel, Comparison

__all__ = [
    "METHOD",
    "model_table",
    "remarks",
    "sample_table",
    "speed_table",
    "write_pictures",
    "write_report",
]

T = TypeVar("T")

METHOD: Final = (
    "Each model ran in a process of its own, one after the other. Load time is until the first token was "
    "read, libraries imported before; whether the files were in the system's cache is as it happened. Peak "
    "memory is that of the whole process after samples and prompts (in brackets: before the model was "
    "loaded), scoring left out. Speed, memory and samples are those of the defaults: the checkpoint's dtype, "
    "and int8 activations in quantized layers on a CPU. Prompts are read 512 tokens at a time. Tokens a "
    "second are medians of up to three readings of a prompt and of all single tokens after them; the spread "
    "is the distance of the quartiles over the median."
)


def model_table(comparison: Comparison) -> Table:
    """Size, memory and quality of each model."""
    header = (
        "model",
        "runner",
        "MB",
        "bpw_linear",
        "bpw_file",
        "load s",
        "peak MB",
        "perplexity",
        "KL (95 % interval)",
        "top-1 %",
    )
    return header, [_model_row(row) for row in comparison.models]


def _model_row(row: ComparedModel) -> tuple[str, ...]:
    score = row.score
    kl, agreement = (None, None) if score is None else (score.kl, score.agreement)
    base = (row.base_bytes or 0) / 1e6
    on_gpu = f", GPU {row.device_peak_bytes / 1e6:.0f}" if row.device_peak_bytes else ""
    return (
        row.name,
        row.runner or "-",
        _cell(row.file_bytes, lambda size: f"{size / 1e6:.2f}"),
        _cell(row.bpw_linear, "{:.3f}".format),
        _cell(row.bpw_file, "{:.3f}".format),
        _cell(row.load_seconds, "{:.2f}".format),
        _cell(row.peak_bytes, lambda peak: f"{peak / 1e6:.0f} ({base:.0f}){on_gpu}"),
        _cell(score, lambda found: f"{found.perplexity:.3f}"),
        _cell(kl, lambda found: f"{found.mean:.5f} ({found.low:.5f} to {found.high:.5f})"),
        _cell(agreement, lambda share: f"{100 * share:.2f}"),
    )


def speed_table(comparison: Comparison) -> Table:
    """Tokens a second by length of the prompt."""
    header = ("prompt", "model", "prefill tokens/s", "spread", "decode tokens/s", "spread")
    return header, [
        (
            str(speed.prompt),
            row.name,
            _cell(speed.prefill, "{:.1f}".format),
            f"{speed.prefill_spread:.0%}",
            _cell(speed.decode, "{:.1f}".format),
            f"{speed.decode_spread:.0%}",
        )
        for length in comparison.settings["prompt_lengths"]
        for row in comparison.models
        for speed in row.speeds
        if speed.prompt == length and speed.absent is None
    ]


def sample_table(comparison: Comparison) -> Table:
    """Continuations of each prompt, side by side."""
    rows = [row for row in comparison.models if row.samples]
    return ("prompt", *(row.name for row in rows)), [
        # A model that died on the way has fewer.
        (prompt, *(_cell([*row.samples, *[None] * (number + 1)][number], str) for row in rows))
        for number, prompt in enumerate(comparison.prompts)
        if rows
    ]


def remarks(comparison: Comparison) -> list[str]:
    """Everything that must be known beside the tables."""
    found = list(comparison.notes)
    for row in comparison.models:
        if row.failure is not None:
            found.append(f"{row.name}: {row.failure}")
        found += [f"{row.name}: {note}" for note in row.notes]
        lengths: dict[str, list[str]] = {}
        for speed in row.speeds:
            if speed.absent is not None:
                lengths.setdefault(speed.absent, []).append(str(speed.prompt))
        found += [
            f"{row.name}, prompts of {', '.join(some)} tokens: {reason}" for reason, some in lengths.items()
        ]
    return found


def write_pictures(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw what there are numbers of: size against KL and perplexity, speed, memory."""
    rows = comparison.models
    pictures = []

    def points(name: str, y: str, value: Callable[[ComparedModel], float | None], *, is_log: bool) -> None:
        groups: dict[str, list[tuple[str, float, float]]] = {}
        for row in rows:
            if (height := value(row)) is not None and row.file_bytes is not None:
                groups.setdefault(row.runner or "", []).append((row.name, row.file_bytes / 1e6, height))
        if groups:
            pictures.append(plot_points(groups, folder / name, x="MB of the file", y=y, is_log=is_log))

    def bars(name: str, x: str, y: str, groups: dict[str, dict[str, float]]) -> None:
        drawn = {group: heights for group, heights in groups.items() if heights}
        if drawn:
            pictures.append(plot_bars(drawn, folder / name, x=x, y=y))

    def by_length(value: str) -> dict[str, dict[str, float]]:
        return {
            str(length): {
                row.name: getattr(speed, value)
                for row in rows
                for speed in row.speeds
                if speed.prompt == length and speed.absent is None
            }
            for length in comparison.settings["prompt_lengths"]
        }

    points(
        "size-kl.png",
        "KL(original || model), nats",
        lambda row: row.score.kl.mean if row.score and row.score.kl else None,
        is_log=True,
    )
    points(
        "size-perplexity.png",
        "perplexity",
        lambda row: row.score.perplexity if row.score else None,
        is_log=False,
    )
    bars("prefill.png", "tokens of the prompt", "tokens a second, prompt", by_length("prefill"))
    bars("decode.png", "tokens of the prompt", "tokens a second, one by one", by_length("decode"))
    memory = {
        row.name: {"peak": row.peak_bytes / 1e6, "before loading": row.base_bytes / 1e6}
        for row in rows
        if row.peak_bytes and row.base_bytes
    }
    bars("memory.png", "", "MB of the process", memory)
    return pictures


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write ``report.md``, ``compare.json`` and the pictures into an existing folder.

    Returns
    -------
    Path
        The report.
    """
    pictures = write_pictures(comparison, folder) if has_matplotlib() else []
    settings = comparison.settings
    computed = "each model's own dtype" if settings["dtype"] == "auto" else settings["dtype"]
    parts = [
        f"# {comparison.models[0].name} and what was made of it",
        comparison.machine,
        "## Size and quality",
        markdown(model_table(comparison)),
        f"The first {settings['tokens']} tokens of {settings['text']}, in windows of {settings['window']} as "
        f"in `qkern perplexity`, float activations (but for schemes that say a8), {computed}; llama.cpp "
        "computes as it always does.",
        "\n".join(f"- {_line(remark)}" for remark in remarks(comparison)),
        "## Speed",
        markdown(speed_table(comparison)),
        METHOD,
        *(f"![{picture.stem}]({picture.name})" for picture in pictures),
        *(
            []
            if has_matplotlib()
            else ["No pictures: matplotlib is not installed (`pip install matplotlib`)."]
        ),
        f"## Samples: {settings['new_tokens']} tokens, the likeliest each time",
        markdown(sample_table(comparison)),
    ]
    (folder / "compare.json").write_text(json.dumps(comparison.as_dict(), indent=2) + "\n", encoding="utf-8")
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def _cell(value: T | None, spell: Callable[[T], str]) -> str:
    return "-" if value is None else spell(value)


def _line(text: str) -> str:
    return " ".join(text.split())
