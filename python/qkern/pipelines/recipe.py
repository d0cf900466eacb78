"""What a quantization run did: the report for people and the recipe that lies beside the output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qkern.pipelines.layerwise import LayerRecord

__all__ = ["QuantizationReport", "recipe_layers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """Result of `quantize` with an output folder.

    Parameters
    ----------
    output : Path or None
        Folder that was written; None when the model stayed in memory.
    method, scheme : str
        What was done; `scheme` in its one spelling.
    format : str or None
        Checkpoint format; None for a 16-bit model or one in memory.
    layers : mapping of str to LayerRecord
        Every quantized linear: scheme, relative error, seconds, notes.
    kept : mapping of str to str
        Every linear that stayed 16-bit, and why.
    kept_parameters : int
        Parameters that stayed 16-bit: those of `kept`, embeddings (tied ones once), norms and biases.
    bpw_linear : float
        Bits per weight of the quantized linears, scales and zero points included.
    seconds : float
        Time of the whole run.
    recipe : mapping
        What ``qkern.json`` holds beside the versions.
    """

    output: Path | None
    method: str
    scheme: str
    format: str | None
    layers: Mapping[str, LayerRecord]
    kept: Mapping[str, str]
    kept_parameters: int
    bpw_linear: float
    seconds: float
    recipe: Mapping[str, Any] = field(repr=False)

    @property
    def mean_error(self) -> float:
        """Mean of the linears' relative errors."""
        return sum(record.error for record in self.layers.values()) / max(len(self.layers), 1)

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "output": None if self.output is None else str(self.output),
            "method": self.method,
            "scheme": self.scheme,
            "format": self.format,
            "bpw_linear": self.bpw_linear,
            "mean_error": self.mean_error,
            "seconds": self.seconds,
            "layers": {
                name: {**facts, "seconds": self.layers[name].seconds}
                for name, facts in recipe_layers(self.layers).items()
            },
            "kept": dict(self.kept),
            "kept_parameters": self.kept_parameters,
        }


def recipe_layers(records: Mapping[str, LayerRecord]) -> dict[str, dict[str, Any]]:
    """Per-layer part of the recipe; without times, so that the same run gives the same bytes."""
    return {
        name: {
            "scheme": record.scheme,
            "error": record.error,
            "notes": list(record.notes),
            **({} if record.alpha is None else {"alpha": record.alpha}),
        }
        for name, record in records.items()
    }
