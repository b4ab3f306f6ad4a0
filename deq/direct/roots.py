"""Roots of the scalar equation ``z = act(d z + x)``, and what needs nothing else: diagonal and triangular weights.

``p = d act(p) + x`` has one root where ``1 - d act'`` is positive everywhere; ``z = act(p)``. Plain PyTorch: the
definition, and what runs where the compiled kernels (csrc/cpu/scalar_root_impl.h) do not.
"""

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, LEAKY_SLOPE

MAX_NEWTON = 60  # a bracket halves at worst: bisection alone would be done


def slopes(activation: str) -> tuple[float, float]:
    """Least and largest value of the activation's derivative."""
    most = ACTIVATIONS[activation].lipschitz
    # gelu and silu: act(x) - act(-x) = x, hence act'(-x) = 1 - act'(x)
    least = {"identity": 1.0, "leaky_relu": LEAKY_SLOPE, "gelu": 1.0 - most, "silu": 1.0 - most}.get(activation, 0.0)
    return least, most


def has_unique_root(activation: str, least: float, most: float) -> bool:
    """Does ``z = act(d z + x)`` have exactly one root for every x and every d in [least, most]?"""
    if activation == "identity":
        return not least <= 1.0 <= most
    return all(d * slope < 1.0 for d in (least, most) for slope in slopes(activation))


def scalar_root(d: Tensor, x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``z = act(d z + x)`` elementwise to rounding, and the pre-activation ``d z + x``; d broadcasts over x.

    Closed for the piecewise linear activations; otherwise Newton's method on ``h(p) = p - d act(p) - x`` inside a
    bracket: ``h' >= kappa > 0`` puts the root within ``|h(x)| / kappa`` of x. The caller has asked
    :func:`has_unique_root`.
    """
    if activation == "identity":
        z = x / (1 - d)
        return z, z
    if activation == "relu":
        z = torch.relu(x) / (1 - d)
        return z, torch.where(x > 0, z, x)
    if activation == "leaky_relu":
        p = x / torch.where(x > 0, 1 - d, 1 - LEAKY_SLOPE * d)
        return torch.where(x > 0, p, LEAKY_SLOPE * p), p
    entry = ACTIVATIONS[activation]
    least, most = slopes(activation)
    kappa = 1 - torch.maximum(d * least, d * most)
    tight = 2 * torch.finfo(x.dtype).eps
    p, a = x, entry.value(x)
    h = -d * a
    reach = 1.01 * h.abs() / kappa
    lo, hi = x - reach, x + reach
    done = h.abs() <= tight * (p.abs() + x.abs())
    for _ in range(MAX_NEWTON):
        if done.all():
            break
        lo, hi = torch.where(h < 0, p, lo), torch.where(h > 0, p, hi)
        following = p - h / (1 - d * entry.derivative(p))
        inside = (following > lo) & (following < hi)
        p = torch.where(done, p, torch.where(inside, following, 0.5 * lo + 0.5 * hi))
        a = entry.value(p)
        h = p - d * a - x
        done = done | (h.abs() <= tight * (p.abs() + (d * a).abs() + x.abs())) | ~torch.isfinite(h)
    return a, p


def substitute(W: Tensor, c: Tensor, activation: str) -> Tensor:
    """``z = act(W z + c)`` for lower triangular W (m, m), c (B, m): output j needs only those before it."""
    z = torch.zeros_like(c)
    for j in range(W.shape[0]):
        x = z[:, :j] @ W[j, :j] + c[:, j]
        z[:, j] = scalar_root(W[j, j], x, activation)[0]
    return z


def substitute_masked(W: Tensor, s: Tensor, g: Tensor, upper: bool = False) -> Tensor:
    """``u = s * (W u + g)`` for triangular W (m, m), s and g (B, m)."""
    u = torch.zeros_like(g)
    m = W.shape[0]
    for j in reversed(range(m)) if upper else range(m):
        before = slice(j + 1, m) if upper else slice(0, j)
        u[:, j] = s[:, j] * (u[:, before] @ W[j, before] + g[:, j]) / (1 - s[:, j] * W[j, j])
    return u
