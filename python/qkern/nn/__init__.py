"""Modules that hold quantized weights, and putting them into a model."""

from qkern.nn.embedding import QuantEmbedding, TiedHead
from qkern.nn.experts import (
    ExpertPart,
    Experts,
    as_linears,
    expert_parameters,
    expert_parts,
    refuse_experts,
    unfuse_experts,
)
from qkern.nn.fake_quant import FakeQuantLinear
from qkern.nn.linear import QuantLinear
from qkern.nn.names import ROUTERS, FirstMatch, FirstPart, lies_in, name_matches, role
from qkern.nn.naming import own_name, stored_name
from qkern.nn.outlier import OutlierLinear
from qkern.nn.replace import compute_mode, named_linears, quant_linears, replace_linears
from qkern.nn.shared_input import SharedInput

__all__ = [
    "ROUTERS",
    "ExpertPart",
    "Experts",
    "FakeQuantLinear",
    "FirstMatch",
    "FirstPart",
    "OutlierLinear",
    "QuantEmbedding",
    "QuantLinear",
    "SharedInput",
    "TiedHead",
    "as_linears",
    "compute_mode",
    "expert_parameters",
    "expert_parts",
    "lies_in",
    "name_matches",
    "named_linears",
    "own_name",
    "quant_linears",
    "refuse_experts",
    "replace_linears",
    "role",
    "stored_name",
    "unfuse_experts",
]
