"""FLOP formulas of the engine's operators, registered with torch.utils.flop_counter when deq is imported.

A multiplication and an addition count as two. What counts is what the solution needs in exact arithmetic, whatever the
engine saves or adds underneath: ``2 m^2`` for every evaluation of every sample but the first from zero, which is
``act(c)`` and takes no product. How many evaluations there were is an output of the operator, so the formulas read the
buffer it has written (:mod:`deq.stats`); of tensors without data, FakeTensorMode's, one evaluation a sample is counted.
Importing torch.utils.flop_counter costs 0.15 s, once, most of it Triton.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .. import _library, stats


def solve(W: Tensor, c: Tensor, z0: Tensor, z: Tensor, said: Tensor, *_, **__) -> int:
    """``2 m^2`` an evaluation that multiplies."""
    return 2 * c.shape[-1] ** 2 * evaluations(z, said, starts_at_zero=z0.numel() == 0)


def masked_linear(A: Tensor, g: Tensor, d: Tensor, u0: Tensor, u: Tensor, said: Tensor, *_, **__) -> int:
    """The same for ``u = d * (A u + g)``, where the first evaluation from zero is ``d * g``."""
    return solve(A, g, u0, u, said)


def evaluations(z: Tensor, said: Tensor, starts_at_zero: bool) -> int:
    """Products with W, summed over the samples of z (..., m) whose statistics are ``said``."""
    samples = z.numel() // z.shape[-1]
    if isinstance(z, FakeTensor) or z.is_meta:
        return samples
    counts = stats.iterations(z, said)
    return int((counts - int(starts_at_zero)).clamp(min=0).sum(dtype=torch.int64))


def derivative(W: Tensor, c: Tensor, *_, **__) -> int:
    """``act'(W z + c)``: one product a sample."""
    return 2 * c.numel() * c.shape[-1]


def product(left: Tensor, right: Tensor, out: Tensor, *_, **__) -> int:
    """A product of two matrices, or a stack of them: the gradient of W, the blocks of the Cayley map's inverse."""
    return 2 * out.numel() * right.shape[-2]


def substitute(packed: Tensor, diagonal: Tensor, c: Tensor, *_, **__) -> int:
    """The strict lower triangle, m (m - 1) / 2 multiplications a sample; none for a diagonal W."""
    return c.numel() * (c.shape[-1] - 1) if packed.numel() else 0


def reduced(P: Tensor, Q: Tensor, diagonal: Tensor, c: Tensor, mask: Tensor, q: Tensor, *_, **__) -> int:
    """``Q^T z(q)`` with ``z(q)`` of ``P q``: 4 r m a sample."""
    return 4 * q.numel() * c.shape[-1]


def reduced_iterate(
    P: Tensor,
    Q: Tensor,
    diagonal: Tensor,
    c: Tensor,
    mask: Tensor,
    gram: Tensor,
    q: Tensor,
    following: Tensor,
    residual: Tensor,
    iterations: Tensor,
    *_,
    **__,
) -> int:
    """4 r m an evaluation."""
    is_fake = isinstance(iterations, FakeTensor) or iterations.is_meta
    return 4 * q.shape[-1] * c.shape[-1] * (iterations.numel() if is_fake else int(iterations.sum(dtype=torch.int64)))


FORMULAS = {
    "solve_": solve,
    "masked_linear_": masked_linear,
    "derivative_": derivative,
    "product_": product,
    "substitute_": substitute,
    "reduced_": reduced,
    "reduced_iterate_": reduced_iterate,
}


def register() -> None:
    """Make FlopCounterMode count the operators that the compiled library has registered."""
    if _library.compiled is None:
        return
    for name, formula in FORMULAS.items():
        operator = getattr(torch.ops.deq, name)
        if operator not in flop_registry:
            register_flop_formula(operator, get_raw=True)(formula)
