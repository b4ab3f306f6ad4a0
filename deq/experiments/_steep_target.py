"""The steep target of Theorem 2, the DEQs built for it, and the floor under every feed-forward net.

Target: g(x) = delta / (1 + delta - x_1), delta = 2^-d, on [0, 1]^d. It is flat but for a rise of slope 2^d at x_1 = 1.
Inputs are given as t = 1 - x_1, where g = delta / (delta + t), so that the rise is resolved for every d.
The reviewed discussion of the paper names width, weights, error and bisection count of the DEQs but prints no formulas;
these are constructions that meet all of its numbers. Everything is float64: slopes span 2^d.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64


def target(t: Tensor, delta: float) -> Tensor:
    """g at x_1 = 1 - t."""
    return delta / (delta + t)


def floor(lipschitz: float, delta: float) -> float:
    """Smallest sup error that a function with this Lipschitz constant in x_1 can have: (1 - sqrt(L delta))^2 / 2.

    With error e, f(1) >= 1 - e and f(1 - t) <= g + e, so L t >= 1 - g(t) - 2 e for every t; :func:`binding_point` is
    the t that says most.
    """
    t = binding_point(lipschitz, delta)
    return max(0.0, (1 - delta / (delta + t) - lipschitz * t) / 2)


def binding_point(lipschitz: float, delta: float) -> float:
    """t at which a function with this Lipschitz constant, exact at t = 0, is furthest above the target."""
    return min(1.0, max(0.0, math.sqrt(delta / lipschitz) - delta)) if lipschitz > 0 else 1.0


def inputs(delta: float, knots: Tensor, count: int) -> Tensor:
    """Increasing t in [0, 1]: ends, ``count`` points at every scale from delta/1000 to 1, and the points between
    neighbouring ``knots`` (at most 4096 pairs, evenly chosen) where the chord of g is furthest from g."""
    u = delta + knots.sort().values
    pairs = torch.arange(len(u) - 1, device=u.device)
    if len(pairs) > 4096:
        pairs = torch.linspace(0, len(u) - 2, 4096, dtype=F64, device=u.device).round().long()
    tangency = (u[pairs] * u[pairs + 1]).sqrt() - delta
    scales = torch.logspace(math.log10(delta / 1000), 0, count, dtype=F64, device=u.device)
    ends = torch.tensor([0.0, 1.0], dtype=F64, device=u.device)
    return torch.cat((ends, scales, tangency)).clamp(0, 1).unique()


@dataclass(frozen=True)
class SelfLoops:
    """Construction A, K neurons that listen only to themselves: z_j = relu(w_j z_j + u_j (x_1 - x_j)), y = y0 + sum z.

    y interpolates g at K + 1 knots equispaced in (delta + t)^(-1/2), which spreads the error evenly: sup error
    delta (r_K - r_0)^2 / K^2 < 1 / K^2 with r = (delta + t)^(-1/2). A hinge of slope A is u / (1 - w) with
    u = A / G and w = 1 - 1 / G, so no weight exceeds 1. The gain G >= A is a power of two: 1 - w is then exact.
    """

    knots: Tensor  # (K,) t of every hinge, decreasing from 1
    jumps: Tensor  # (K,) A
    gain: Tensor  # (K,) G
    y0: float

    @classmethod
    def build(cls, delta: float, K: int, device: torch.device | None = None) -> "SelfLoops":
        r = torch.linspace((1 + delta) ** -0.5, delta**-0.5, K + 1, dtype=F64, device=device)
        slopes = delta * (r[:-1] * r[1:]) ** 2
        jumps = torch.cat((slopes[:1], delta * r[1:-1] ** 2 * (r[2:] ** 2 - r[:-2] ** 2)))
        knots = torch.cat((torch.ones(1, dtype=F64, device=device), 1 / r[1:-1] ** 2 - delta))
        return cls(knots, jumps, torch.exp2(jumps.clamp(min=1).log2().ceil()), delta / (1 + delta))

    @property
    def weight(self) -> Tensor:
        """(K, K) diagonal W."""
        return torch.diag(1 - 1 / self.gain)

    def injection(self, t: Tensor) -> Tensor:
        """(n, K) U x + b at t (n,)."""
        return self.jumps / self.gain * (self.knots - t.unsqueeze(-1))

    def equilibrium(self, t: Tensor) -> Tensor:
        """(n, K): relu(c) / (1 - w)."""
        return torch.relu(self.injection(t)) * self.gain

    def readout(self, z: Tensor) -> Tensor:
        return self.y0 + z.sum(-1)

    def norms(self) -> float:
        """Product of the infinity norms of U and the readout, with W's counted as 1."""
        return len(self.gain) * float((self.jumps / self.gain).max())

    def largest_weight(self) -> float:
        """Over W, U, b and the readout (ones and y0)."""
        u = self.jumps / self.gain
        parts = (1 - 1 / self.gain, u, u * (1 - self.knots), torch.ones(1), torch.tensor([self.y0]))
        return max(float(p.abs().max()) for p in parts)


@dataclass(frozen=True)
class ScalarState:
    """Construction B, a scalar state fed through K + 3 neurons: z = V relu(W z + U x_1 + b) = z - s (f(z) - x_1).

    f is increasing and interpolates the inverse of g, 1 + delta - delta / z, at z_j = j / K, so the root of
    f(z) = x_1 is unique and within 1 / K of g. Knots where the inverse is below 0 are out of reach of any x_1 >= 0:
    f goes on there as a line through 0, which keeps every slope in (0, K] and so every weight within max(1, s K).
    Neurons: relu(z); the K hinges relu(z - z_j), j < K; relu(x_1); the constant 1.
    """

    slopes: Tensor  # (K,) of f between z_j and z_(j+1)
    below: Tensor  # (K + 1,) 1 - f(z_j), decreasing to 0
    scale: float  # s

    @classmethod
    def build(cls, delta: float, K: int, scale: float = 1.0, device: torch.device | None = None) -> "ScalarState":
        j = torch.arange(K + 1, dtype=F64, device=device)
        first = math.floor(delta * K / (1 + delta)) + 1  # the first knot with 1 + delta - delta / z_j > 0
        slopes = delta * K**2 / (j[:-1].clamp(min=1) * j[1:])
        below = delta * (K / j.clamp(min=1) - 1)
        rise = 1 - float(below[first])
        slopes[:first] = K * rise
        below[:first] = 1 + rise * (first - 1 - j[:first])
        return cls(slopes, below, scale)

    @property
    def K(self) -> int:
        return len(self.slopes)

    def layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """V, W, U, b, each (K + 3,)."""
        K, s = self.K, self.scale
        one, none = self.slopes.new_ones(1), self.slopes.new_zeros(1)
        z_j = torch.arange(K, dtype=F64, device=one.device) / K
        jumps = torch.diff(self.slopes, prepend=none)
        V = torch.cat((one, -s * jumps, s * one, -s * (1 - self.below[:1])))
        W = torch.cat((one.expand(K + 1), none, none))
        U = torch.cat((none.expand(K + 1), one, none))
        b = torch.cat((none, -z_j, none, one))
        return V, W, U, b

    def step(self, z: Tensor, t: Tensor) -> Tensor:
        """V relu(W z + U x_1 + b) for z, t (n,)."""
        return self.hidden(z, t) @ self.layers()[0]

    def rounding(self, z: Tensor, t: Tensor) -> Tensor:
        """Bound (n,) on the rounding error of :meth:`step` and of its comparison with z."""
        V = self.layers()[0]
        return (len(V) + 4) * torch.finfo(F64).eps * (self.hidden(z, t) @ V.abs() + 1)

    def root(self, t: Tensor) -> Tensor:
        """The equilibrium (n,) in closed form: f inverted piece by piece."""
        piece = self.K - torch.searchsorted(
            self.below.flip(0), t.contiguous(), right=True
        )  # below[piece] > t >= below[piece + 1]
        piece = piece.clamp(0, self.K - 1)
        top = self.below[piece]
        return (piece + (top - t) / (top - self.below[piece + 1])) / self.K

    def bisect(self, t: Tensor, steps: int) -> Tensor:
        """The equilibrium (n,) by ``steps`` halvings of [0, 1], one evaluation of the network each."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(steps):
            middle = (low + high) / 2
            above = middle > self.step(middle, t)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    def vanilla(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Lemma 1: the DEQ h = relu(W V h + U x_1 + b) with the same equilibria, z = V h. Its weight and injection."""
        V, W, U, b = self.layers()
        return torch.outer(W, V), torch.outer(1 - t, U) + b

    def hidden(self, z: Tensor, t: Tensor) -> Tensor:
        """h (n, K + 3) that belongs to the state z."""
        _, W, U, b = self.layers()
        return torch.relu(torch.outer(z, W) + torch.outer(1 - t, U) + b)

    def largest_weight(self) -> float:
        return max(float(p.abs().max()) for p in self.layers())


def bisection_steps(K: int) -> int:
    """ceil(log2 K) + 1: halvings of [0, 1] after which construction B's state is within 2 / K of g."""
    return (K - 1).bit_length() + 1
