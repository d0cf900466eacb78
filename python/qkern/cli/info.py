"""``qkern info``: what this installation can do on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Annotated, Any, Final

import typer

# One spelling for each family of kernels; a row that runs these runs the family.
SCHEMES: Final = (
    "w2g64",
    "w3g128",
    "w4g128",
    "w4g128z",
    "w4",
    "w8",
    "w8t",
    "w4g128a8",
    "w8a8",
    "nf4g64",
    "nf4g64d",
)
PACKAGES: Final = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "gguf",
    "llama-cpp-python",
    "triton",
    "pymoo",
)


def command(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Versions, CPU tiers, CUDA module, and which op runs where for which scheme."""
    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)


def collect() -> dict[str, Any]:
    """Everything that ``qkern info`` prints, ready for JSON."""
    import torch

    import qkern.ops  # enters every implementation into the registry  # noqa: F401
    from qkern._version import __version__
    from qkern.ops import _native, registry
    from qkern.ops.gguf_types import GGUF_TYPES
    from qkern.schemes import Scheme

    reason = _native.why_not_cpu(torch.device("cpu"))
    cpu: dict[str, Any] = {"native_module": reason or "loaded"}
    if reason is None:
        core = _native.core()
        cpu |= {
            "features": core.cpu_features().split(),
            "compiled_tiers": list(core.compiled_tiers()),
            "usable_tiers": list(core.usable_tiers()),
            "active_tier": core.active_tier(),
            "thread_pool": core.thread_pool(),
            "threads": _native.threads(),
        }
    schemes = [Scheme.parse(spelling) for spelling in SCHEMES]
    matrix = registry.matrix(torch.device("cpu"), schemes, torch.float32)
    if reason is None:
        ops = [row["op"] for row in matrix if row["backend"] == "cpu"]
        cpu["kernels"] = {op: core.kernel_tier(registry.folder(op, registry.Backend.CPU)) for op in ops}
    cuda = _cuda()
    on_cuda = []
    if cuda["device"] is not None:
        on_cuda = registry.matrix(torch.device("cuda", 0), schemes, torch.float16)
    return {
        "qkern": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version_of(name) for name in PACKAGES},
        "cpu": cpu,
        "cuda": cuda,
        "matrix": matrix,
        "cuda_matrix": on_cuda,
        "gguf_types": list(GGUF_TYPES),
    }


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch_built_for": torch.version.cuda, "device": None}
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    from qkern.ops import _cuda as door

    try:
        module = importlib.import_module("qkern._cuda")
    except ModuleNotFoundError:
        facts["native_module"] = f"not built ({door.build() or 'the CPU module does not load'})"
    except ImportError as error:
        facts["native_module"] = f"does not load: {error}"
    else:
        facts["native_module"] = f"built by {door.build()} for {module.ARCHITECTURES}"
        if facts["device"] is not None:
            facts["native_module"] += f"; {door.why_not_cuda(torch.device('cuda', 0)) or 'runs here'}"
    return facts


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    cpu, cuda = facts["cpu"], facts["cuda"]
    lines = {
        "qkern": facts["qkern"],
        "python": f"{facts['python']} on {facts['platform']}",
        "packages": ", ".join(f"{name} {version or '-'}" for name, version in facts["packages"].items()),
        "CPU module": cpu["native_module"],
    }
    if "features" in cpu:
        lines |= {
            "CPU features": " ".join(cpu["features"]),
            "compiled tiers": " ".join(cpu["compiled_tiers"]),
            "usable tiers": " ".join(cpu["usable_tiers"]),
            "active tier": cpu["active_tier"],
            "threads": f"{cpu['threads']} ({cpu['thread_pool']})",
        }
    lines |= {
        "CUDA module": cuda["native_module"],
        "CUDA device": cuda["device"]
        or f"none (torch is built for {cuda['torch_built_for'] or 'the CPU only'})",
    }
    console = Console(highlight=False)
    grid = Table.grid("name", "value", padding=(0, 2))
    grid.columns[0].style = "bold"
    for name, value in lines.items():
        grid.add_row(name, value)
    console.print(grid, markup=False)
    console.print(_matrix("this CPU, natively by tier", facts["matrix"], cpu.get("kernels", {})))
    if facts["cuda_matrix"]:
        console.print(_matrix("this GPU", facts["cuda_matrix"], {}))
    console.print(f"types of gguf_encode and gguf_decode: {' '.join(facts['gguf_types'])}", markup=False)
    console.print(f"schemes asked for, one of each kind: {' '.join(SCHEMES)}", markup=False)
    for line in _refusals(facts["matrix"]) + _refusals(facts["cuda_matrix"]):
        console.print(line, markup=False)


def _matrix(where: str, rows: list[dict[str, Any]], tiers: dict[str, str]) -> Any:
    """Table of op by backend: the tier of the native kernels, or in how many of the schemes it runs."""
    from rich.table import Table

    table = Table(title=f"\nwhat runs on {where}", title_justify="left", box=None, pad_edge=False)
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for name in ("op", *backends):
        table.add_column(name)
    for op in dict.fromkeys(row["op"] for row in rows):
        cells = []
        for backend in backends:
            reasons = [row["reason"] for row in rows if (row["op"], row["backend"]) == (op, backend)]
            runs = reasons.count(None)
            some = "" if runs == len(reasons) else f", {runs} of {len(reasons)} schemes"
            how = tiers[op] if backend == "cpu" and runs else "yes"
            cells.append(f"{how}{some}" if runs else "-")
        table.add_row(op, *cells)
    return table


def _refusals(rows: list[dict[str, Any]]) -> list[str]:
    """Why something does not run: a line for the ops that have the reason and the schemes in common."""
    schemes: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["reason"] is not None:
            schemes.setdefault((row["op"], row["backend"], row["reason"]), []).append(row["scheme"])
    ops: dict[tuple[str, str, str], list[str]] = {}
    for (op, backend, reason), refused in schemes.items():
        which = "" if len(refused) == len(SCHEMES) else f" in {' '.join(refused)}"
        ops.setdefault((backend, which, reason), []).append(op)
    return [f"not {', '.join(names)} on {key[0]}{key[1]}: {key[2]}" for key, names in ops.items()]
