"""The width-m DEQ of Theorem 1 in integers, and the bound on feed-forward nets.

z_t = relu(s_t), s_t = 2^t x - 1 - sum_{i<t} 2^(t-i+1) z_i on [0, 1]: strictly lower triangular, one equilibrium. It
obeys s_1 = 2x - 1, s_(t+1) = 1 - 2 |s_t|, the tent map, so every neuron folds the interval once more.

A grid point is an integer k, x = k / 2^(m+1): region j of 2^m is k = 2j .. 2j + 2, its midpoint k = 2j + 1. States are
integers in the same unit. Arrays are numpy int64 up to INT64_WIDTH and Python integers (dtype object) above, so that
everything here is exact.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ._nets import smallest

INT64_WIDTH = 30  # |s| <= 2^(2m+1) must fit


def grid(m: int, k) -> np.ndarray:
    """Grid points as integers wide enough for width m."""
    return np.asarray(k, dtype=np.int64 if m <= INT64_WIDTH else object)


def iterate(m: int, k: np.ndarray, z: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Pre-activations s_1 .. s_m of one evaluation of the DEQ at states ``z``; without ``z`` those at the equilibrium,
    by forward substitution of the same equation. Each has the shape of ``k``."""
    unit = 2 ** (m + 1)
    s, fed = [], k * 0  # fed: sum_{i<t} 2^(t-i+1) z_i, doubled from one t to the next
    for t in range(1, m + 1):
        s.append(2**t * k - unit - fed)
        fed = 2 * fed + 4 * (np.maximum(s[-1], 0) if z is None else z[t - 1])
    return s


def relu(s: list[np.ndarray]) -> list[np.ndarray]:
    return [np.maximum(v, 0) for v in s]


@dataclass(frozen=True)
class Pieces:
    """What :func:`examine` saw on runs of consecutive grid points.

    kinks, kinks_last, kinks_sum, kinks_staircase: interior grid points where the slope changes of the vector z, of
    z_m, of sum z_t, and of the readout sum 2^(m-t+2) z_t. misplaced: interior grid points where z has a kink though
    they are no j / 2^m, or none though they are. bent: cells in which some s_t changes sign: z is not affine there.
    unlike_gray: midpoints whose activation pattern is not the Gray code of their region. unlike_tent: points where
    s_(t+1) = 1 - 2 |s_t| fails.
    """

    kinks: int
    kinks_last: int
    kinks_sum: int
    kinks_staircase: int
    misplaced: int
    bent: int
    unlike_gray: int
    unlike_tent: int

    def __add__(self, other: "Pieces") -> "Pieces":
        return Pieces(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def examine(m: int, k: np.ndarray) -> Pieces:
    """Count on runs of consecutive grid points, shape (runs, points). A cell where no s_t changes sign is one on which
    every s_t, and so z, is affine; then comparing neighbouring slopes finds every kink there is."""
    s = iterate(m, k)
    z = relu(s)
    unit, zero = 2 ** (m + 1), k * 0
    bent = np.zeros(k[:, 1:].shape, dtype=bool)
    kink = np.zeros(k[:, 1:-1].shape, dtype=bool)
    pattern, total, stairs, unlike_tent = zero, zero, zero, 0
    for t in range(m):
        bent |= ((s[t][:, 1:] > 0) & (s[t][:, :-1] < 0)) | ((s[t][:, 1:] < 0) & (s[t][:, :-1] > 0))
        kink |= _kink(z[t])
        pattern = 2 * pattern + (s[t] > 0)
        total = total + z[t]
        stairs = stairs + 2 ** (m - t + 1) * z[t]
        if t + 1 < m:
            unlike_tent += int((s[t + 1] != unit - 2 * np.abs(s[t])).sum())
    middle = (k % 2 == 1).astype(bool)
    region = (k - 1) // 2
    return Pieces(
        kinks=int(kink.sum()),
        kinks_last=int(_kink(z[-1]).sum()),
        kinks_sum=int(_kink(total).sum()),
        kinks_staircase=int(_kink(stairs).sum()),
        misplaced=int((kink == middle[:, 1:-1]).sum()),
        bent=int(bent.sum()),
        unlike_gray=int((pattern != (region ^ (region // 2)))[middle].sum()),
        unlike_tent=unlike_tent,
    )


def _kink(y: np.ndarray) -> np.ndarray:
    slope = y[:, 1:] - y[:, :-1]
    return (slope[:, 1:] != slope[:, :-1]).astype(bool)


def evaluations_to_fixed_point(m: int, k: np.ndarray) -> int:
    """Evaluations from z = 0 until every point has reached its equilibrium, in exact integers; m + 1 if m do not."""
    answer = relu(iterate(m, k))
    z = [k * 0] * m
    for count in range(1, m + 1):
        z = relu(iterate(m, k, z))
        if all(np.array_equal(a, b) for a, b in zip(z, answer, strict=True)):
            return count
    return m + 1


def moved_from_answer(m: int, k: np.ndarray) -> int:
    """Entries that one evaluation at the equilibrium changes; 0 says that it is one."""
    answer = relu(iterate(m, k))
    return sum(int((a != b).sum()) for a, b in zip(relu(iterate(m, k, answer)), answer, strict=True))


def weight(m: int, dtype: torch.dtype) -> Tensor:
    """(m, m) W, powers of two: exact in every dtype that reaches 2^m."""
    t = torch.arange(m, dtype=torch.float64)
    return torch.tril(-torch.exp2(t.unsqueeze(1) - t + 1), -1).to(dtype)


def as_float(m: int, values: list[np.ndarray], dtype: torch.dtype) -> Tensor:
    """Integer states (m arrays of n) as (n, m) numbers, rounded if ``dtype`` cannot hold them."""
    rows = [[math.ldexp(float(v), -(m + 1)) for v in column] for column in values]
    return torch.tensor(rows, dtype=torch.float64).mT.contiguous().to(dtype)


def injection(m: int, k: np.ndarray, dtype: torch.dtype) -> Tensor:
    """(n, m) c = U x + b at grid points k (n,): 2^t x - 1."""
    return as_float(m, [2**t * k - 2 ** (m + 1) for t in range(1, m + 1)], dtype)


def piece_bound(widths: list[int]) -> int:
    """Most affine pieces of a ReLU net with scalar input and these hidden widths: prod (n + 1) (Serra et al. 2018)."""
    bound = 1
    for n in widths:
        bound *= n + 1
    return bound


def spread_neurons(neurons: int, depth: int) -> list[int]:
    """Hidden widths that maximise :func:`piece_bound` for so many neurons in ``depth`` layers: as equal as possible."""
    return [neurons // depth + (layer < neurons % depth) for layer in range(depth)]


def parameters(widths: list[int]) -> int:
    """Weights and biases of a net with scalar input and output."""
    sizes = [1, *widths, 1]
    return sum((i + 1) * o for i, o in pairwise(sizes))


def deq_parameters(m: int) -> int:
    """Of the DEQ: W below the diagonal, U, b, readout and its bias."""
    return m * (m - 1) // 2 + 3 * m + 1


def widest(depth: int, budget: int) -> list[int] | None:
    """Hidden widths, as equal as possible, of the largest net of this depth within so many parameters."""
    beyond = smallest(lambda neurons: parameters(spread_neurons(neurons, depth)) > budget, depth)
    return spread_neurons(beyond - 1, depth) if beyond > depth else None
