"""Modules that hold quantized weights, and putting them into a model."""

from qkern.nn.embedding import QuantEmbedding, TiedHead
from qkern.nn.fake_quant import FakeQuantLinear
from qkern.nn.linear import QuantLinear
from qkern.nn.outlier import OutlierLinear
from qkern.nn.replace import (
    compute_mode,
    expert_parameters,
    name_matches,
    named_linears,
    quant_linears,
    replace_linears,
)
from qkern.nn.shared_input import SharedInput

__all__ = [
    "FakeQuantLinear",
    "OutlierLinear",
    "QuantEmbedding",
    "QuantLinear",
    "SharedInput",
    "TiedHead",
    "compute_mode",
    "expert_parameters",
    "name_matches",
    "named_linears",
    "quant_linears",
    "replace_linears",
]
