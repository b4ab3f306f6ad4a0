"""Roots of the scalar equation ``z = act(d z + x)``, and what needs nothing else: diagonal and triangular weights.

``p = d act(p) + x`` has one root where ``1 - d act'`` is positive everywhere; ``z = act(p)``. Plain PyTorch: the
definition, and what runs where the compiled kernels (csrc/cpu/scalar_root_impl.h) do not.
"""

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, LEAKY_SLOPE

NEWTON_ALONE = 8  # steps; it takes three to five, and more only where |d| is large: there it takes turns with bisection


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
    bracket: ``h' >= kappa > 0`` puts the root within ``|h(x)| / kappa`` of x. It ends where h is its own rounding, or
    where another step would be changed by its curvature in less than the rounding of p. That step is still taken, for p
    and along the tangent for z, which is then right to rounding where ``act(p)`` is only as good as p. The caller has
    asked :func:`has_unique_root`.
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
    kind = torch.finfo(x.dtype)
    p, a = x, entry.value(x)
    h = -d * a
    reach = 1.01 * h.abs() / kappa
    lo, hi = (x - reach).clamp(min=kind.min), (x + reach).clamp(max=kind.max)
    most_steps = NEWTON_ALONE + 2 * kind.bits  # the bracket loses half of its numbers at every second one
    for n in range(most_steps + 1):
        s = entry.derivative(p)
        step = h / (1 - d * s)
        done = h.abs() <= 2 * kind.eps * (p.abs() + (d * a).abs() + x.abs())
        done = done | ((step * step <= kind.eps / 4 * p.abs().clamp(max=1.0)) & (step.abs() <= 0.5 * p.abs()))
        done = (done & torch.isfinite(h)) | ~torch.isfinite(x)
        if n == most_steps or bool(done.all()):
            break
        lo, hi = torch.where(h < 0, p, lo), torch.where(h > 0, p, hi)
        following = p - step
        following = torch.where((following > lo) & (following < hi), following, 0.5 * lo + 0.5 * hi)
        if n >= NEWTON_ALONE and n % 2 == 0:
            following = _middle(lo, hi)
        p = torch.where(done, p, following)
        a = entry.value(p)
        h = torch.where(done, h, p - d * a - x)  # of the first p = x it has more digits
    finite = torch.isfinite(step)
    return torch.where(finite, a - s * step, a), torch.where(finite, p - step, p)


def _middle(a: Tensor, b: Tensor) -> Tensor:
    """The number in the middle between a and b, both finite, by counting the numbers there are: half of the exponents
    lie below 1."""
    integer = torch.int32 if a.dtype == torch.float32 else torch.int64
    sign, magnitude = torch.iinfo(integer).bits - 1, torch.iinfo(integer).max
    i, k = (bits ^ ((bits >> sign) & magnitude) for bits in (a.view(integer), b.view(integer)))
    middle = (i & k) + ((i ^ k) >> 1)
    return (middle ^ ((middle >> sign) & magnitude)).view(a.dtype)


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
