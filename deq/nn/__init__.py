"""Layers whose output is an equilibrium."""

from .convolutions import MonotoneConv2d, contractive_convolution
from .dropout import VariationalDropout, reset_dropout
from .equilibrium import Equilibrium
from .equilibrium_linear import EquilibriumLinear
from .multiscale import MultiscaleBlock
from .normalisation import denormalise, normalise
from .stability import correction_loss, jacobian_penalty, spectral_radius
from .warm_start import WarmStart
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
    "MonotoneConv2d",
    "MonotoneWeight",
    "MultiscaleBlock",
    "VariationalDropout",
    "WarmStart",
    "contractive_convolution",
    "correction_loss",
    "denormalise",
    "jacobian_penalty",
    "normalise",
    "reset_dropout",
    "spectral_radius",
]
