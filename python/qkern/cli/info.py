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
    return {
        "qkern": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version_of(name) for name in PACKAGES},
        "cpu": cpu,
        "cuda": _cuda(),
        "matrix": registry.matrix(torch.device("cpu"), schemes, torch.float32),
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
    try:
        importlib.import_module("qkern._cuda")
    except ModuleNotFoundError:
        facts["native_module"] = "not built: this build has the CPU kernels only"
    except ImportError as error:
        facts["native_module"] = f"does not load: {error}"
    else:
        facts["native_module"] = "loaded"
    return facts


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def line(name: str, value: object) -> None:
        console.print(f"[bold]{name:<15}[/bold] {value}", soft_wrap=True)

    line("qkern", facts["qkern"])
    line("python", f"{facts['python']} on {facts['platform']}")
    line("packages", ", ".join(f"{name} {version or '-'}" for name, version in facts["packages"].items()))
    cpu = facts["cpu"]
    line("CPU module", cpu["native_module"])
    if "features" in cpu:
        line("CPU features", " ".join(cpu["features"]))
        line("compiled tiers", " ".join(cpu["compiled_tiers"]))
        line("usable tiers", " ".join(cpu["usable_tiers"]))
        line("active tier", cpu["active_tier"])
        line("threads", f"{cpu['threads']} ({cpu['thread_pool']})")
    cuda = facts["cuda"]
    line("CUDA module", cuda["native_module"])
    line(
        "CUDA device",
        cuda["device"] or f"none (torch is built for {cuda['torch_built_for'] or 'the CPU only'})",
    )

    table = Table(title="\nwhat runs on this CPU", title_justify="left", box=None, pad_edge=False)
    table.add_column("op")
    table.add_column("backend")
    for scheme in SCHEMES:
        table.add_column(scheme, justify="center")
    rows: dict[tuple[str, str], dict[str, bool]] = {}
    for row in facts["matrix"]:
        rows.setdefault((row["op"], row["backend"]), {})[row["scheme"]] = row["reason"] is None
    for (op, backend), cells in rows.items():
        table.add_row(op, backend, *("yes" if cells[scheme] else "-" for scheme in SCHEMES))
    # Wide enough for the whole matrix even where stdout is not a terminal.
    Console(width=max(console.width, 160), highlight=False).print(table)
