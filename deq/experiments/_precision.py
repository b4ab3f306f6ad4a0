"""What floating point leaves of Theorem 1: where the iteration stops being exact, and a form that outlives the float
range."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..reference import cell
from ._sawtooth import as_float, grid, injection, iterate, relu, weight

LIMITS = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52}  # significand bits - 1
BEYOND = {"float16": 20, "float32": 200, "float64": 1100}  # widths whose largest weight 2^(m + 1) overflows


def iterated_exactly(m: int, regions: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether m plain steps in ``dtype`` itself, plain PyTorch from z = 0, give every region's midpoint to the last
    bit."""
    k = grid(m, [2 * j + 1 for j in regions])
    W, c = weight(m, dtype), injection(m, k, dtype)
    z = torch.zeros_like(c)
    for _ in range(m):
        z = cell(W, c, z, "relu")
    answer = as_float(m, relu(iterate(m, k)), torch.float64)
    return torch.equal(z.double(), answer) and torch.equal(cell(W, c, z, "relu").double(), answer)


def rescaled(m: int, regions: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """W (m, m), c (n, m) and the exact z of the DEQ in the units y_t = 2^(h - t) z_t, h = m // 2, at region midpoints.

    y_t = relu(2^h (x - 2^-t) - 2 sum_{i<t} y_i): every weight is 2, the same for all widths, and inputs and biases span
    2^h to 2^-(m - h) where the weights of the theorem reach 2^(m + 1).
    """
    h = m // 2
    k = [2 * j + 1 for j in regions]
    states = relu(iterate(m, grid(m, k)))
    z = [[_ldexp(int(v), h - t - (m + 1)) for v in states[t - 1]] for t in range(1, m + 1)]
    c = [[_ldexp(v - 2 ** (m + 1 - t), h - (m + 1)) for v in k] for t in range(1, m + 1)]
    W = torch.full((m, m), -2.0, dtype=dtype).tril(-1)
    return W, torch.tensor(np.array(c).T).to(dtype).contiguous(), torch.tensor(np.array(z).T).to(dtype).contiguous()


def _ldexp(v: int, exponent: int) -> float:
    """v 2^exponent for integers that a float cannot hold."""
    excess = max(0, abs(v).bit_length() - 64)
    return math.ldexp(float((abs(v) >> excess) * (1 if v >= 0 else -1)), exponent + excess)


def solve_rescaled(m: int, regions: Sequence[int], dtype: torch.dtype) -> dict:
    """Entries of the rescaled DEQ that forward substitution in ``dtype`` gets wrong, or that move from the answer.

    Plain PyTorch: the engine measures a sample by its largest entry, and here entries span the whole range of floats.
    """
    W, c, answer = rescaled(m, regions, dtype)
    total, z = torch.zeros_like(c[:, 0]), []
    for t in range(m):
        z.append(torch.relu(c[:, t] - 2 * total))
        total = total + z[-1]
    moved = cell(W, c, answer, "relu") != answer
    return {
        "m": m,
        "case": f"{str(dtype).partition('.')[2]}, m = {m}",
        "points": len(regions),
        "wrong": int((torch.stack(z, 1) != answer).sum()) + int(moved.sum()),
        "active": int((answer > 0).sum()),
    }
