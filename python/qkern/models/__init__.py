"""Architectures as data, and the exact rescalings that they allow."""

from qkern.models.architecture import (
    Architecture,
    LinearPair,
    NormLinears,
    architecture_for,
    known_architectures,
)
from qkern.models.folding import column_weight, fold_linear, fold_norm, pair_channels, set_column_weight
from qkern.models.fusing import fuse_forwards
from qkern.models.injection import inject
from qkern.models.structure import Structure, describe, is_router

__all__ = [
    "Architecture",
    "LinearPair",
    "NormLinears",
    "Structure",
    "architecture_for",
    "column_weight",
    "describe",
    "fold_linear",
    "fold_norm",
    "fuse_forwards",
    "inject",
    "is_router",
    "known_architectures",
    "pair_channels",
    "set_column_weight",
]
