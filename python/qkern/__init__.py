"""qkern: low-bit kernels for LLM weights, and the Python layer that makes them useful."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qkern._version import __version__
from qkern.errors import FormatError, InputError, NativeError, OutputError, QkernError, UnsupportedError
from qkern.schemes import QuantizedWeight, Scheme

if TYPE_CHECKING:
    from qkern.integrations.hf_methods import QkernConfig, disable, enable
    from qkern.models import fuse_forwards
    from qkern.nn import (
        FakeQuantLinear,
        OutlierLinear,
        QuantEmbedding,
        QuantLinear,
        replace_linears,
        unfuse_experts,
    )
    from qkern.pipelines.compare import compare
    from qkern.pipelines.convert import convert
    from qkern.pipelines.export_gguf import export_gguf
    from qkern.pipelines.imatrix import imatrix
    from qkern.pipelines.load import load
    from qkern.pipelines.plan import plan
    from qkern.pipelines.qat import convert_qat, prepare_qat
    from qkern.pipelines.quantize import quantize
    from qkern.pipelines.save import save
    from qkern.pipelines.search import search_assignment, sensitivity
    from qkern.pipelines.verify import verify
    from qkern.search import MixedPrecision

# Loaded on first use, so that `import qkern` costs little beyond `import torch`.
_LAZY = {
    "FakeQuantLinear": "qkern.nn",
    "MixedPrecision": "qkern.search",
    "OutlierLinear": "qkern.nn",
    "QkernConfig": "qkern.integrations.hf_methods",
    "QuantEmbedding": "qkern.nn",
    "QuantLinear": "qkern.nn",
    "compare": "qkern.pipelines",
    "convert": "qkern.pipelines",
    "convert_qat": "qkern.pipelines",
    "disable": "qkern.integrations.hf_methods",
    "enable": "qkern.integrations.hf_methods",
    "export_gguf": "qkern.pipelines",
    "fuse_forwards": "qkern.models",
    "imatrix": "qkern.pipelines",
    "load": "qkern.pipelines",
    "plan": "qkern.pipelines",
    "prepare_qat": "qkern.pipelines",
    "quantize": "qkern.pipelines",
    "replace_linears": "qkern.nn",
    "save": "qkern.pipelines",
    "search_assignment": "qkern.pipelines",
    "sensitivity": "qkern.pipelines",
    "unfuse_experts": "qkern.nn",
    "verify": "qkern.pipelines",
}

__all__ = [
    "FakeQuantLinear",
    "FormatError",
    "InputError",
    "MixedPrecision",
    "NativeError",
    "OutlierLinear",
    "OutputError",
    "QkernConfig",
    "QkernError",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizedWeight",
    "Scheme",
    "UnsupportedError",
    "__version__",
    "compare",
    "convert",
    "convert_qat",
    "disable",
    "enable",
    "export_gguf",
    "fuse_forwards",
    "imatrix",
    "load",
    "plan",
    "prepare_qat",
    "quantize",
    "replace_linears",
    "save",
    "search_assignment",
    "sensitivity",
    "unfuse_experts",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'qkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
