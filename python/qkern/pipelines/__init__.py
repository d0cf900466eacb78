"""The public verbs: each checks, calls the packages below, and writes all or nothing."""

from qkern.pipelines.compare import Comparison, compare
from qkern.pipelines.convert import ConversionReport, convert
from qkern.pipelines.export_gguf import GGUFReport, export_gguf
from qkern.pipelines.imatrix import imatrix
from qkern.pipelines.load import load
from qkern.pipelines.plan import Plan, plan
from qkern.pipelines.qat import convert_qat, prepare_qat
from qkern.pipelines.quantize import quantize
from qkern.pipelines.recipe import QuantizationReport
from qkern.pipelines.save import save
from qkern.pipelines.search import search_assignment, sensitivity
from qkern.pipelines.search_report import SearchReport, SensitivityReport
from qkern.pipelines.verify import Verification, verify

__all__ = [
    "Comparison",
    "ConversionReport",
    "GGUFReport",
    "Plan",
    "QuantizationReport",
    "SearchReport",
    "SensitivityReport",
    "Verification",
    "compare",
    "convert",
    "convert_qat",
    "export_gguf",
    "imatrix",
    "load",
    "plan",
    "prepare_qat",
    "quantize",
    "save",
    "search_assignment",
    "sensitivity",
    "verify",
]
