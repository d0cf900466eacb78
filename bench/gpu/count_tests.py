"""Count what pytest ran on the GPU, from its JUnit file.

    python bench/gpu/count_tests.py test.xml [--gpu]

Ends with status 1 if a test failed, if none ran, or if there is a GPU and none ran on it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from xml.etree import ElementTree

# What the tests of a kind have in their names, and the kinds of which some must run where there is a GPU.
KINDS = {
    "CUDA on the GPU": ("cuda-gpu",),
    "what only a GPU has": ("test_gpu",),
    "Triton": ("test_triton",),
    "CUDA emulated": ("cuda-emulated", "test_cuda"),
}
ON_GPU = ("CUDA on the GPU", "what only a GPU has", "Triton")


def _is_of(kind: str, name: str) -> bool:
    of_gpu = kind == "CUDA emulated" and "cuda-gpu" in name
    return not of_gpu and any(part in name for part in KINDS[kind])


def counts(path: Path) -> dict[str, dict[str, int]]:
    """Count tests that passed, failed and were skipped, of each kind and in all."""
    found = {kind: {"passed": 0, "failed": 0, "skipped": 0} for kind in (*KINDS, "all")}
    for case in ElementTree.parse(path).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        name = f"{case.get('classname')} {case.get('name')}"
        for kind in (*(kind for kind in KINDS if _is_of(kind, name)), "all"):
            found[kind][outcome] += 1
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("xml", type=Path)
    parser.add_argument("--gpu", action="store_true", help="there is a GPU: tests must have run on it")
    options = parser.parse_args(arguments)
    if not options.xml.exists():
        parser.exit(1, f"{options.xml} is not there: the tests did not come to their end\n")
    found = counts(options.xml)
    for kind, outcomes in found.items():
        print(f"{kind}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    missing = [kind for kind in ON_GPU if options.gpu and not found[kind]["passed"] + found[kind]["failed"]]
    for kind in missing:
        print(f"there is a GPU, but no test ran of the kind {kind}")
    sys.exit(1 if missing or found["all"]["failed"] or not found["all"]["passed"] else 0)


if __name__ == "__main__":
    main()
