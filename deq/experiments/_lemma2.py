"""Lemma 2 as corrected in the discussion: how far the fixed points of two contractions can lie apart.

If u and v map an interval into itself with Lipschitz constants L_u, L_v < 1, then |z_u - z_v| <= min(1 / (1 - L_u),
1 / (1 - L_v)) max |u - v|: |z_u - z_v| <= |u(z_u) - u(z_v)| + |u(z_v) - v(z_v)|, and the same with u and v exchanged.
The pointwise inequality |u(v(z)) - v(v(z))| <= |u(z) - v(z)| that the first version used does not hold.
"""

import torch
from torch import Tensor

F64 = torch.float64
KNOTS = 9


def draw(count: int, generator: torch.Generator) -> Tensor:
    """(count, KNOTS) values on equispaced knots of [0, 1] of random piecewise linear contractions of [0, 1]."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=F64, generator=generator, device=generator.device)

    steepest = uniform(count, 1)
    slopes = steepest * (2 * uniform(count, KNOTS - 1) - 1)
    values = torch.cat((torch.zeros_like(steepest), slopes.cumsum(1) / (KNOTS - 1)), 1)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return values - low + uniform(count, 1) * (1 - (high - low))


def lipschitz(u: Tensor) -> Tensor:
    return u.diff(dim=1).abs().amax(1) * (KNOTS - 1)


def at(u: Tensor, z: Tensor) -> Tensor:
    """u (count, KNOTS) at z (count,)."""
    piece = (z * (KNOTS - 1)).floor().clamp(0, KNOTS - 2).long()
    left, right = u.gather(1, piece[:, None])[:, 0], u.gather(1, piece[:, None] + 1)[:, 0]
    return left + (z * (KNOTS - 1) - piece) * (right - left)


def fixed_point(u: Tensor) -> Tensor:
    """(count,) the root of z - u(z), which increases: its piece is where the sign changes, and there it is a line."""
    knots = torch.linspace(0, 1, KNOTS, dtype=F64, device=u.device)
    piece = ((knots - u) <= 0).sum(1).clamp(1, KNOTS - 1) - 1
    left, right = u.gather(1, piece[:, None])[:, 0], u.gather(1, piece[:, None] + 1)[:, 0]
    slope = (right - left) * (KNOTS - 1)
    return (left - slope * knots[piece]) / (1 - slope)


def check(count: int, generator: torch.Generator) -> dict:
    """Random pairs, half of them close to each other, against the lemma and against the pointwise inequality."""
    u, v = draw(count, generator), draw(count, generator)
    near = torch.arange(count, device=u.device) % 2 == 0
    v[near] = 0.99 * u[near] + 0.01 * v[near]  # a mixture of contractions of [0, 1] is one
    z_u, z_v = fixed_point(u), fixed_point(v)
    gap = (u - v).abs().amax(1)  # piecewise linear on the same knots: the maximum is at one of them
    constant = 1 / (1 - torch.minimum(lipschitz(u), lipschitz(v)))
    rounding = 16 * torch.finfo(F64).eps * constant
    pointwise = (at(u, v[:, 0]) - at(v, v[:, 0])).abs() > (u - v)[:, 0].abs() + 1e-12  # at z = 0
    return {
        "draws": count,
        "violations": int(((z_u - z_v).abs() > constant * gap + rounding).sum()),
        "tightest": float(((z_u - z_v).abs() / (constant * gap)).max()),
        "residual": float(torch.maximum((at(u, z_u) - z_u).abs(), (at(v, z_v) - z_v).abs()).max()),
        "pointwise": int(pointwise.sum()),
    }
