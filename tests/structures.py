"""Weights of known structure and what their tests share."""

import pytest
import torch
from close import assert_as_accurate
from problems import exact, gaussian, torch_loop

import deq
from deq import _library, weights

needs_library = pytest.mark.skipif(_library.compiled is None, reason=f"no compiled library: {_library.reason}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_library)]
KINDS = ("lower_triangular", "strictly_lower", "diagonal", "diagonal_low_rank")
WORDS = {
    "lower_triangular": "substitution",
    "strictly_lower": "substitution",
    "diagonal": "closed form",
    "diagonal_low_rank": "reduced to R^",
    "dense": "direct",
}


def parts(kind: str, m: int, dtype=torch.float32, seed: int = 0, scale: float = 0.45) -> tuple[torch.Tensor, ...]:
    """The tensors of a structure whose plain iteration contracts."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    if kind in ("lower_triangular", "strictly_lower", "dense"):
        return ((draw(m, m) * (scale / m**0.5)).to(dtype),)
    d = (torch.rand(m, generator=generator, dtype=torch.float64) - 0.5) * scale
    if kind == "diagonal":
        return ((2 * d).to(dtype),)
    r = max(1, min(5, m // 2))
    factors = (draw(m, r) * (scale / (m**0.5 + r**0.5)) ** 0.5 / m**0.25 for _ in range(2))
    return tuple(t.to(dtype) for t in (d, *factors))


def structure(kind: str, *tensors: torch.Tensor):
    if kind == "strictly_lower":
        return weights.LowerTriangular(*tensors, strict=True)
    return {
        "lower_triangular": weights.LowerTriangular,
        "diagonal": weights.Diagonal,
        "diagonal_low_rank": weights.DiagonalLowRank,
        "dense": weights.Dense,
    }[kind](*tensors)


def injection(m: int, B: int, dtype=torch.float32) -> torch.Tensor:
    return gaussian(m, B, dtype, seed=m + B)[1]


def check_solution(W, c, activation, backend="auto", **options):
    solution = deq.solve(W, c, activation, solver="direct", backend=backend, on_failure="raise", **options)
    D = W.dense()
    assert_as_accurate(solution.z, torch_loop(D, c, activation), exact(D, c, activation))
    assert solution.converged.all() and solution.z.dtype == c.dtype
    assert (solution.residual <= solution.plan.tol).all()
    return solution
