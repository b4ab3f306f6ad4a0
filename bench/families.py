"""Families of problems ``z = relu(W z + c)`` with known spectra, from easy to impossible for the plain iteration.

A family is a name and a number, such as ``outlier0.95``; ``_FAMILIES`` says what each is;
``trained20`` is W after 20 epochs of bench/trained.py. All are drawn in float64.
"""

import re

import torch
from torch import Generator, Tensor

from . import trained


def draw(family: str, m: int, B: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """W (m, m) and c (B, m) in float64. Raises ValueError for an unknown family or sizes that one does not have."""
    name, number = split(family)
    if name == "trained":
        return trained.draw(float(number or trained.EPOCHS[-1]), m, B)
    make, default = _FAMILIES[name]
    W = make(m, float(number or default), generator)
    c = _normal(B, m, generator)
    return W, c + 0.3 if name == "outlier" else c  # a mean that excites the slow mode, as trained biases do


def names() -> tuple[str, ...]:
    """Of all families, without numbers."""
    return (*_FAMILIES, "trained")


def split(family: str) -> tuple[str, str]:
    """Name and number, such as ("outlier", "0.95"); the number may be empty. Raises ValueError if it is unknown."""
    found = re.fullmatch(r"([a-z]+)((?:\d+(?:\.\d+)?)?)", family)
    if found is None or found[1] not in names():
        known = ", ".join(names())
        raise ValueError(f"family must be one of {known}, with a number or without; got {family!r}")
    return found[1], found[2]


def _normal(rows: int, columns: int, generator: Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def gaussian(m: int, norm: float, generator: Generator) -> Tensor:
    """Independent entries, 2-norm about ``norm``: an untrained layer. ReLU contracts it by 0.38 norm."""
    return _normal(m, m, generator) * (norm / 2 / m**0.5)


def radius(m: int, r: float, generator: Generator) -> Tensor:
    """Independent entries, spectral radius about r, 2-norm about 2 r: no contraction in the norm from r = 0.5 on."""
    return _normal(m, m, generator) * (r / m**0.5)


def orthogonal(m: int, norm: float, generator: Generator) -> Tensor:
    """``norm`` times an orthogonal matrix."""
    return norm * torch.linalg.qr(_normal(m, m, generator)).Q


def symmetric(m: int, norm: float, generator: Generator) -> Tensor:
    """Symmetric of 2-norm ``norm``."""
    A = _normal(m, m, generator)
    A = A + A.mT
    return A * (norm / torch.linalg.eigvalsh(A).abs().max())


def outlier(m: int, r: float, generator: Generator) -> Tensor:
    """A Gaussian bulk of radius 0.7 and one eigenvalue r with a non-negative eigenvector: the slow mode of a trained
    layer. The ReLU leaves it whole, so that the plain iteration contracts by no more than r."""
    u = _normal(m, 1, generator).abs()
    u /= torch.linalg.vector_norm(u)
    bulk = radius(m, 0.7, generator)
    return bulk + (r * u - bulk @ u) @ u.mT


def monotone(m: int, mu: float, generator: Generator) -> Tensor:
    """``(1 - mu) I - A^T A + S - S^T`` (Winston and Kolter 2020): one equilibrium, and the plain iteration diverges."""
    A, S = (_normal(m, m, generator) / m**0.5 for _ in range(2))
    return (1 - mu) * torch.eye(m, dtype=torch.float64) - A.mT @ A + S - S.mT


# How W is made and the family's number where none is given.
_FAMILIES = {
    "gaussian": (gaussian, 0.9),
    "radius": (radius, 1.0),
    "orthogonal": (orthogonal, 0.9),
    "symmetric": (symmetric, 0.99),
    "outlier": (outlier, 0.95),
    "monotone": (monotone, 0.1),
}
