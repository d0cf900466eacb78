"""The benchmark of an op that is one call: named cases of it, contestants for each, one table.

A ``bench_<op>.py`` on this has ``VERSION`` and ``prepare`` (see contestant.py), whose case has ``variant``
(one of its names), ``N`` and ``K``, and calls `main`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import measure
import roofline

if TYPE_CHECKING:
    from torch import Tensor


def VERSION() -> str:
    import qkern

    return f"qkern {qkern.__version__}"


def tier() -> str:
    """Name the CPU tier that is active in this process."""
    from qkern.ops._native import core

    return core().active_tier()


def differing(results: tuple[Tensor | None, ...], truths: tuple[Tensor | None, ...]) -> float:
    """Part of the elements that are not the same, NaN counted as equal to NaN."""
    different = total = 0
    for result, truth in zip(results, truths, strict=True):
        if result is None or truth is None:
            different += result is not truth
            continue
        same = (result == truth) | ((result != result) & (truth != truth))
        different, total = different + int((~same).sum()), total + same.numel()
    return different / max(total, 1)


def main(
    description: str | None,
    file: str,
    cases: list[str],
    *,
    peers: tuple[str, ...] = (),
    unit: str = "GB/s",
    N: int = 4096,
    K: int = 4096,
    arguments: list[str] | None = None,
) -> None:
    """Measure every case with qkern and the peers, print a table, write the records.

    With `unit` ``"GB/s"`` the bytes of a case are held against the copy bandwidth; with ``"GOP/s"`` its
    operations against the fp32 peak.
    """
    module = Path(file).stem
    op = module.removeprefix("bench_")
    made = measure.parser(description)
    made.add_argument("--shape", type=measure.shape, default=f"{N}x{K}", help="NxK")
    made.add_argument("--cases", help="parts of their names, separated by commas")
    options = measure.parse(made, arguments)
    N, K = options.shape
    chosen = [name for name in cases if any(part in name for part in (options.cases or "").split(","))]
    modules = [module, *(() if options.no_peers else peers)]
    entries = [
        measure.Contestant(
            name=name,
            module=each,
            tier=options.tier if each == module else None,
            case={"op": op, "variant": name, "N": N, "K": K},
        )
        for name in chosen
        for each in modules
    ]
    results = measure.race([*roofline.contestants(), *entries], options)
    records = measure.records(op, results, options, shape=f"{N}x{K}", forced=options.tier)
    kind, work = ("copy", "bytes") if unit == "GB/s" else ("fp32", "operations")
    limits = roofline.ceilings(records).get(kind, [])
    print(f"{op} {N}x{K}, {options.threads} thread(s); {roofline.summary(records)} (GB/s and GOP/s)")
    for record in records:
        if record["module"] == "roofline":
            continue
        label = f"{record['contestant']:30}{record['version'].split(' ')[0]:8}"
        if "seconds" not in record:
            print(f"{label}{record['absent']}")
            continue
        rate = record[work] / record["seconds"] / 1e9
        facts = "".join(f"  {name} {value}" for name, value in record["facts"].items() if name != "tier")
        reached = f"{100 * roofline.part(record, work, limits):5.0f} % of {kind}"
        print(f"{label}{1e3 * record['seconds']:10.3f} ms{rate:9.2f} {unit}{reached}{facts}")
    measure.save(records, options)
    sys.exit(1 if any(record.get("absent", "").startswith(measure.FAULTS) for record in records) else 0)
