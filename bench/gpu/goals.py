"""The goals of the GPU kernels: what was measured of each, what is asked, whether it holds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Record = dict[str, Any]

WIDE = ("28672x4096", "8192x28672")
LARGE = (*WIDE, "8192x8192")
DECODE = (1, 2, 4, 8)
OURS = "qkern cuda"


@dataclass(frozen=True)
class Goal:
    """`values` are found in the records, of `expected` places; the worst of them is held against `asked`."""

    text: str
    asked: float
    unit: str
    values: Callable[[list[Record]], list[tuple[float, str]]]
    expected: int = 1
    at_most: bool = False

    def judge(self, records: list[Record]) -> Record:
        """Measured, asked, holds: yes, no, or what is missing."""
        values = self.values(records)
        made = {"goal": self.text, "asked": self.asked, "at_most": self.at_most, "unit": self.unit}
        made |= {"measured": None, "where": "", "holds": "not measured", "places": len(values)}
        if not values:
            return made
        worst, where = (max if self.at_most else min)(values)
        holds = worst <= self.asked if self.at_most else worst >= self.asked
        said = "no" if not holds else "yes" if len(values) >= self.expected else "in part"
        return made | {"measured": worst, "where": where, "holds": said, "expected": self.expected}


def timed(records: list[Record], op: str, name: str | None = None) -> list[Record]:
    return [
        r for r in records if r["op"] == op and "seconds" in r and (name is None or r["contestant"] == name)
    ]


def place(record: Record) -> str:
    rows = f" M={record['case']['M']}" if "M" in record["case"] else ""
    return f"{record.get('shape', '')}{rows}"


def products(
    records: list[Record], name: str, scheme: str, shapes: tuple[str, ...], rows: tuple[int, ...]
) -> dict[tuple[str, int], Record]:
    found = timed(records, "dequant_matmul", name)
    return {
        (r["shape"], r["case"]["M"]): r
        for r in found
        if r["scheme"] == scheme and r["shape"] in shapes and r["case"]["M"] in rows
    }


def of_copy(scheme: str, shapes: tuple[str, ...], rows: tuple[int, ...] = DECODE, name: str = OURS) -> Any:
    def values(records: list[Record]) -> list[tuple[float, str]]:
        found = products(records, name, scheme, shapes, rows)
        return [(100 * r["of_copy"], place(r)) for r in found.values()]

    return values


def times_as_fast(other: str, rows: tuple[int, ...], factor: float = 1.0) -> Any:
    """How many times as fast as another contestant, round by round."""

    def values(records: list[Record]) -> list[tuple[float, str]]:
        ours = products(records, OURS, "w4g128", LARGE, rows)
        theirs = products(records, other, "w4g128", LARGE, rows)
        return [(factor * ratio(theirs[key], ours[key]), place(ours[key])) for key in ours if key in theirs]

    return values


def ratio(one: Record, other: Record) -> float:
    return statistics.median(a / b for a, b in zip(one["rounds"], other["rounds"], strict=False))


def eight_rows(records: list[Record]) -> list[tuple[float, str]]:
    found = products(records, OURS, "w4g128", LARGE, (1, 8))
    pairs = [(found.get((shape, 8)), found.get((shape, 1)), shape) for shape in LARGE]
    return [(eight["seconds"] / one["seconds"], shape) for eight, one, shape in pairs if eight and one]


def errors(records: list[Record]) -> list[tuple[float, str]]:
    """Error of every product over that of torch's linear on the decoded weight in the dtype of x."""
    return [
        (r["error"] / r["facts"]["linear_error"], f"{r['contestant']} {r['scheme']} {place(r)}")
        for r in timed(records, "dequant_matmul")
        if r["contestant"].startswith("qkern") and r["facts"].get("linear_error")
    ]


def column_phase(records: list[Record]) -> list[tuple[float, str]]:
    return [(1e3 * r["seconds"], place(r)) for r in timed(records, "gptq_update", "qkern")]


def streams(*ops: str) -> Any:
    def values(records: list[Record]) -> list[tuple[float, str]]:
        found = [r for op in ops for r in timed(records, op, OURS)]
        return [(100 * r["of_copy"], f"{r['op']} {r['case']['variant']}") for r in found]

    return values


def call_overhead(records: list[Record]) -> list[tuple[float, str]]:
    layers, launches = (timed(records, "overhead", name) for name in ("qkern QuantLinear", "launch"))
    return [
        (1e6 * (layer["seconds"] - launch["seconds"]), f"{1e6 * launch['seconds']:.1f} us a launch")
        for layer, launch in zip(layers, launches, strict=False)
    ]


GOALS = (
    Goal("w4g128, M=1..8, 28672x4096 and 8192x28672", 80, "% of copy", of_copy("w4g128", WIDE), 8),
    Goal("w4g128, M=1..8, 8192x8192", 70, "% of copy", of_copy("w4g128", LARGE[2:]), 4),
    Goal("w4g128, M=1..8, against Humming", 1.3, "times as fast", times_as_fast("Humming", DECODE), 12),
    Goal("w4g128, M=8 against M=1", 1.15, "times the time", eight_rows, 3, at_most=True),
    Goal("w8, M=1..8", 85, "% of copy", of_copy("w8", WIDE), 4),
    Goal("w3g128, M=1..8", 70, "% of copy", of_copy("w3g128", WIDE), 4),
    Goal("w2g64, M=1..8", 60, "% of copy", of_copy("w2g64", WIDE), 4),
    Goal("w4g128, M=64, against torch fp16", 2, "times as fast", times_as_fast("torch float16", (64,)), 3),
    Goal("w4g128, M=512", 65, "% of torch fp16", times_as_fast("torch float16", (512,), 100), 3),
    Goal("w4g128, M>=2048", 90, "% of torch fp16", times_as_fast("torch float16", (2048, 4096), 100), 3),
    Goal("Triton, w4g128, M=1", 60, "% of copy", of_copy("w4g128", LARGE, (1,), "qkern triton"), 3),
    Goal("GPTQ's column phase, 4096x4096", 10, "ms", column_phase, at_most=True),
    Goal("packing", 70, "% of copy", streams("pack_bits", "unpack_bits"), 6),
    Goal("quantizing", 70, "% of copy", streams("quantize_groupwise", "dequantize_groupwise"), 3),
    Goal("error against float64, of torch's linear", 2, "times", errors, 20, at_most=True),
    Goal("a call of QuantLinear beyond a launch", 5, "us", call_overhead, at_most=True),
)


def judge(records: list[Record]) -> list[Record]:
    """Hold every goal against the records of a run, which share its time and machine."""
    shared = {key: records[0].get(key) for key in ("time", "commit", "machine")} if records else {}
    return [shared | goal.judge(records) for goal in GOALS]


def table(judged: list[Record]) -> str:
    """Goal, measured, asked, holds, and where the worst was."""
    rows = [("goal", "measured", "asked", "", "holds", "worst at")]
    for goal in judged:
        measured = "-" if goal["measured"] is None else f"{goal['measured']:.3g}"
        asked = f"{'<=' if goal['at_most'] else '>='} {goal['asked']:g}"
        holds = goal["holds"]
        if holds == "in part":
            holds = f"in part ({goal['places']} of {goal['expected']})"
        rows.append((goal["goal"], measured, asked, goal["unit"], holds, goal["where"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
