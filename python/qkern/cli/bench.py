"""``qkern bench``: the benchmarks of a checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

# Scripts of bench/ beside bench_<op>.py, and what each does.
OTHERS: Final = {
    "roofline": "the machine's ceilings",
    "plot": "pictures, and the tables of docs/speed.md, from bench/results",
    "quality": "quantizers against each other",
    "micro": "overhead of a call, by pytest-benchmark (.[test] installs it)",
}


def command(
    name: Annotated[str | None, typer.Argument(help="Benchmark; without one: list them.")] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Passed on; -- --help shows them.", metavar="[-- OPTIONS]")
    ] = None,
) -> None:
    """Run a benchmark of a checkout; without a name, list them.

    For example `qkern bench dequant_matmul -- --set speed --peers-python PYTHON`.
    """
    folder = checkout()
    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    scripts |= {other: folder / f"{other}.py" for other in OTHERS}
    if name is None:
        from rich.console import Console
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for known, path in scripts.items():
            grid.add_row(known, OTHERS.get(known) or summary(path))
        Console(markup=False, highlight=False).print(grid)
        return
    if name not in scripts:
        raise typer.BadParameter(f"unknown benchmark {name!r}: there are {', '.join(scripts)}")
    run = ["-m", "pytest"] if name == "micro" else []
    done = subprocess.run([sys.executable, *run, str(scripts[name]), *(arguments or [])], check=False)
    raise typer.Exit(done.returncode)


def summary(path: Path) -> str:
    """First sentence of a script's docstring, without its opening quotes."""
    return path.read_text(encoding="utf-8").split("\n")[0].strip('"').rstrip(".")


def checkout() -> Path:
    """Find bench/ of the checkout that this package, or the working directory, lies in.

    Raises
    ------
    UnsupportedError
        If neither does.
    """
    from qkern.errors import UnsupportedError

    for start in (Path(__file__).resolve(), Path.cwd() / "here"):
        for parent in start.parents:
            if (parent / "bench" / "contestant.py").exists() and (parent / "csrc").is_dir():
                return parent / "bench"
    raise UnsupportedError(
        "qkern bench needs a checkout of qkern's repository, whose bench/ is no part of the package: "
        "run it inside one"
    )
