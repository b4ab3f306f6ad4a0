"""Layers whose output is an equilibrium."""

from .equilibrium import Equilibrium
from .equilibrium_linear import EquilibriumLinear
from .weight_modules import (
    ContractiveWeight,
    DenseWeight,
    DiagonalLowRankWeight,
    DiagonalWeight,
    LowerTriangularWeight,
    MonotoneWeight,
)

__all__ = [
    "ContractiveWeight",
    "DenseWeight",
    "DiagonalLowRankWeight",
    "DiagonalWeight",
    "Equilibrium",
    "EquilibriumLinear",
    "LowerTriangularWeight",
    "MonotoneWeight",
]
