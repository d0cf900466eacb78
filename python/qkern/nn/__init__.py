"""Modules that hold quantized weights, and putting them into a model."""

from qkern.nn.embedding import QuantEmbedding, TiedHead
from qkern.nn.linear import QuantLinear
from qkern.nn.replace import (
    compute_mode,
    expert_parameters,
    name_matches,
    named_linears,
    quant_linears,
    replace_linears,
)

__all__ = [
    "QuantEmbedding",
    "QuantLinear",
    "TiedHead",
    "compute_mode",
    "expert_parameters",
    "name_matches",
    "named_linears",
    "quant_linears",
    "replace_linears",
]
