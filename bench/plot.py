"""Tables of docs/speed.md and pictures, from the records in bench/results.

    python bench/plot.py [--check] [--pictures]

A table stands in a Markdown file between two comments and is written anew, the file's other lines stay:

    <!-- bench: dequant_matmul 18944x3584 w4g128 -->
    <!-- /bench -->

The words name the benchmark, and any that follow what the records must have: a shape, a scheme, an order, a
number of threads as ``threads=2``. ``schemes`` has a line for each scheme, from its latest records.
``--check`` writes nothing and exits with 1 if a table is not up to date.
``--pictures`` draws a roofline and the speed against M for each shape and scheme into bench/results; it needs
matplotlib, which is in the extra `plot`.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import measure
import roofline
from bench_dequant_matmul import shares

MARKED = re.compile(r"(<!-- bench: (\w+)((?: [^ >]+)*) -->\n).*?(<!-- /bench -->)", re.DOTALL)
Record = dict[str, Any]


def select(records: list[Record], words: list[str]) -> list[Record]:
    """Pick the records that have all of `words`; of several measurements of the same the latest."""

    def fits(record: Record, word: str) -> bool:
        key, equals, value = word.partition("=")
        if equals:
            return str(record.get(key)) == value
        return word in (record.get("shape"), record.get("scheme"), record.get("order"))

    found = [record for record in records if all(fits(record, word) for word in words)]
    if not any(word.startswith("forced=") for word in words):
        found = [record for record in found if not record.get("forced")]
    latest = max((record["time"] for record in found), default=None)
    return [record for record in found if record["time"] == latest]


def markdown(rows: list[list[str]]) -> str:
    """Make a Markdown table; the first row is the head, columns after the first are right-aligned."""
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *body))


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def where(record: Record) -> str:
    """Name the GPU, or the CPU and how many of its cores, that a record is of."""
    machine = record["machine"]
    return machine.get("gpu") or f"{machine['cpu']}, {record['threads']} of {machine['cores']} cores"


def caption(records: list[Record]) -> str:
    """Tell on what, with what and against which ceilings a table was measured."""
    first, machine = records[0], records[0]["machine"]
    peers = [record for record in records if record["module"] != "roofline"]
    names = dict.fromkeys(record["version"] for record in peers if record["version"])
    limits = roofline.summary(records)
    measured = f"Ceilings in the same run, GB/s and GOP/s: {limits}. " if limits else ""
    if "gpu" in machine:
        how = "graphs over rotated weights"
    else:
        others = statistics.median(record["others"] for record in records if "others" in record)
        urgent = "with real-time priority, " if first["realtime"] else ""
        how = f"{urgent}while other processes had {others:.2f} cores"
    return (
        f"{where(first)}, commit {first['commit']}, {first['time'][:10]}; "
        f"medians of interleaved runs, {how}. {measured}{'; '.join(names)}.\n"
    )


def missing(records: list[Record]) -> str:
    """Say who did not take part, and why."""
    absent = {r["contestant"]: r["absent"] for r in records if "absent" in r}
    return "".join(f"\nNot measured: {name}: {why}.\n" for name, why in absent.items())


def faster(timed: dict[tuple[str, int], Record], M: int, name: str) -> str:
    """How many times as fast as the best peer one of qkern's is: the median over rounds."""
    peers = [r for (peer, m), r in timed.items() if m == M and not peer.startswith("qkern")]
    if not peers or (name, M) not in timed:
        return ""
    best = min(peers, key=lambda r: r["seconds"])
    pairs = zip(best["rounds"], timed[name, M]["rounds"], strict=False)
    return f"{statistics.median(theirs / ours for theirs, ours in pairs):.2f}"


def product_table(records: list[Record]) -> str:
    """Milliseconds of every contestant for each M, then what qkern's best is worth."""
    limits = roofline.ceilings(records)
    records = [record for record in records if record["module"] != "roofline"]
    rows = sorted({record["case"]["M"] for record in records})
    timed = {(r["contestant"], r["case"]["M"]): r for r in records if "seconds" in r}
    names = list(dict.fromkeys(name for name, _ in timed))
    lines = [["milliseconds", *(f"M={M}" for M in rows)]]
    for name in names:
        cells = [timed.get((name, M)) for M in rows]
        lines.append([name, *("" if cell is None else number(1e3 * cell["seconds"]) for cell in cells)])
    for name in names:
        if not name.startswith("qkern"):
            continue
        ours = {M: timed[name, M] for M in rows if (name, M) in timed}
        parts = {M: shares(record, limits) for M, record in ours.items()}
        memory = "read" if "read" in limits else "copy"
        for label, index in ((f"of {memory} bandwidth", 0), ("of peak", 1)):
            if all(math.isnan(part[index]) for part in parts.values()):
                continue
            cells = [f"{100 * parts[M][index]:.0f} %" if M in parts else "" for M in rows]
            lines.append([f"{name}, {label}", *cells])
        cells = [faster(timed, M, name) for M in rows]
        lines.append([f"{name}, times as fast as the best peer", *cells])
    return markdown(lines)


def case_table(records: list[Record]) -> str:
    """Milliseconds and rate of every case, against copying or against the fp32 peak."""
    limits, lines = roofline.ceilings(records), [["case", "", "ms", "rate", "of ceiling"]]
    for record in records:
        if "seconds" not in record or record["module"] == "roofline":
            continue
        kind, work, unit = ("copy", "bytes", "GB/s") if record["bytes"] else ("fp32", "operations", "GOP/s")
        lines.append(
            [
                record["contestant"],
                record["version"].split()[0],
                number(1e3 * record["seconds"]),
                f"{number(record[work] / record['seconds'] / 1e9)} {unit}",
                f"{100 * roofline.part(record, work, limits.get(kind, [])):.0f} % of {kind}",
            ]
        )
    return markdown(lines)


def schemes_table(records: list[Record]) -> str:
    """Milliseconds of qkern with each scheme, and the larger share of the two ceilings."""
    schemes = list(dict.fromkeys(record["scheme"] for record in records))
    ours = [r for r in records if r["contestant"].startswith("qkern") and "seconds" in r]
    measured = [
        {(r["contestant"], r["case"]["M"]) for r in ours if r["scheme"] == scheme} for scheme in schemes
    ]
    columns = sorted(set.intersection(*measured))
    lines = [["scheme", *(f"{name.removeprefix('qkern ')}, M={M}" for name, M in columns)]]
    for scheme in schemes:
        limits = roofline.ceilings([record for record in records if record["scheme"] == scheme])
        found = {(r["contestant"], r["case"]["M"]): r for r in ours if r["scheme"] == scheme}
        cells = []
        for column in columns:
            read, peak = shares(found[column], limits)
            share = f"{100 * read:.0f} % of read" if read >= peak else f"{100 * peak:.0f} % of peak"
            cells.append(f"{number(1e3 * found[column]['seconds'])}, {share}")
        lines.append([scheme, *cells])
    return markdown(lines)


def generate_table(records: list[Record]) -> str:
    """Tokens a second of whole models."""
    lines = [["", "tokens a second", "milliseconds"]]
    for record in records:
        if "seconds" in record:
            tokens = record["case"]["prompt"] if record["case"]["what"] == "prefill" else 1
            rate = number(tokens / record["seconds"])
            lines.append([record["contestant"], rate, number(1e3 * record["seconds"])])
    return markdown(lines)


def gptq_table(records: list[Record]) -> str:
    """Seconds of the whole and of the column phase, and the loss."""
    lines = [["", "seconds", "column phase", "loss"]]
    for record in records:
        if "seconds" in record:
            facts = record["facts"]
            columns = number(statistics.median(facts["columns"]))
            cells = [number(record["seconds"]), columns, str(facts.get("loss", ""))]
            lines.append([record["contestant"], *cells])
    return markdown(lines)


TABLES = {
    "dequant_matmul": product_table,
    "int8_matmul": product_table,
    "schemes": schemes_table,
    "generate": generate_table,
    "gptq": gptq_table,
}
# Where the records of a table are, if not in a file of its name.
SOURCES = {"schemes": "dequant_matmul"}


def table(op: str, words: list[str], results: Path) -> str:
    """Make the table that a comment asks for."""
    records = measure.load(results / f"{SOURCES.get(op, op)}.jsonl")
    if op == "schemes":
        named = dict.fromkeys(record["scheme"] for record in records)
        found = [record for scheme in named for record in select(records, [*words, scheme])]
    else:
        found = select(records, words)
    if not found:
        return f"Not measured yet: `qkern bench {op}`.\n"
    return f"{TABLES.get(op, case_table)(found)}\n{caption(found)}{missing(found)}"


def rewrite(text: str, results: Path = measure.RESULTS) -> str:
    """Fill in every marked table of a text; doing it again changes nothing."""
    return MARKED.sub(lambda m: f"{m[1]}\n{table(m[2], m[3].split(), results)}\n{m[4]}", text)


def pictures(results: Path) -> list[Path]:
    """Draw speed against M, and the roofline, for each measured shape and scheme."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "qkern"  # the same records give the same bytes
    records = [r for r in measure.load(results / "dequant_matmul.jsonl") if "seconds" in r]
    drawn = []
    for shape, scheme in dict.fromkeys((r["shape"], r["scheme"]) for r in records):
        chosen = select(records, [shape, scheme])
        limits = {kind: statistics.median(rates) for kind, rates in roofline.ceilings(chosen).items()}
        chosen = [record for record in chosen if record["module"] != "roofline"]
        figure, (speed, roof) = pyplot.subplots(1, 2, figsize=(13, 5))
        for index, name in enumerate(dict.fromkeys(record["contestant"] for record in chosen)):
            points = sorted((r for r in chosen if r["contestant"] == name), key=lambda r: r["case"]["M"])
            style = {
                "color": pyplot.cm.tab20(index),
                "marker": "o",
                "linewidth": 2.5 if name.startswith("qkern") else 1,
                "label": name,
            }
            gops = [r["operations"] / r["seconds"] / 1e9 for r in points]
            speed.plot([r["case"]["M"] for r in points], gops, **style)
            roof.plot([r["operations"] / r["bytes"] for r in points], gops, **style)
        reach, memory = [2.0**i for i in range(0, 13)], limits.get("read", limits.get("copy", math.nan))
        for product in ("int8", "bf16", "fp32"):
            if product in limits:
                line = [min(limits[product], x * memory) for x in reach]
                roof.plot(reach, line, color="gray", linestyle="--", linewidth=0.8)
                roof.annotate(product, (reach[-1], limits[product]), ha="right", va="bottom", fontsize=8)
        if "copy" in limits and "read" not in limits:
            roof.plot(reach, [x * memory for x in reach], color="gray", linestyle="--", linewidth=0.8)
        for axes, label in ((speed, "M, rows of x"), (roof, "operations a byte of weight")):
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel="GOP/s")
            axes.set_xscale("log", base=2)
            axes.grid(visible=True, which="major", alpha=0.3)
        speed.legend(fontsize=7)
        figure.suptitle(f"{shape} {scheme}, {where(chosen[0])}")
        figure.tight_layout()
        path = results / f"dequant_matmul-{shape}-{scheme}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        drawn.append(path)
    return drawn


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", default=[measure.BENCH.parent / "docs" / "speed.md"])
    parser.add_argument("--results", type=Path, default=measure.RESULTS)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pictures", action="store_true")
    options = parser.parse_args(arguments)
    stale = []
    for path in options.files:
        before = path.read_text(encoding="utf-8")
        after = rewrite(before, options.results)
        if after != before:
            stale.append(path)
            if not options.check:
                path.write_text(after, encoding="utf-8")
    if options.pictures:
        for path in pictures(options.results):
            print(path)
    for path in stale:
        print(f"{path}: {'not up to date' if options.check else 'written'}")
    sys.exit(1 if stale and options.check else 0)


if __name__ == "__main__":
    main()
